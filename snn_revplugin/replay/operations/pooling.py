"""Pooling. Max pooling's indices, 8 bytes each, are recomputed together with its output."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...torch_internals.graph import Node, shape_of_output
from ..kind import LAYER
from ..recipe import Replay
from .operation import DecidedBy, Operation, register

INDICES = {"result1": 1}
CHUNK = 1 << 17  # elements pooled at a time on a CPU
aten = torch.ops.aten


def _decided_by(function: Replay, *names: str) -> DecidedBy:
    return DecidedBy(
        lambda *values: partial(function, **dict(zip(names, values, strict=True))), *names
    )


def _max_pool(function: Replay) -> DecidedBy:
    return _decided_by(function, "kernel_size", "stride", "padding", "dilation", "ceil_mode")


def _average_pool(function: Replay) -> DecidedBy:
    return _decided_by(
        function,
        "kernel_size",
        "stride",
        "padding",
        "ceil_mode",
        "count_include_pad",
        "divisor_override",
    )


def _max_pool2d(x: Tensor, **arguments) -> tuple[Tensor, Tensor]:
    """``aten.max_pool2d_with_indices``, on a CPU in the memory format channels_last.

    The kernel for that format finds the same maxima at the same indices. It is vectorised, and so
    twice as fast where the other kernel's branches cannot be predicted. It runs on a part of the
    batch at a time, to keep the copies small.
    """
    if x.device.type != "cpu" or x.dim() != 4 or not x.is_contiguous() or x.numel() == 0:
        return aten.max_pool2d_with_indices(x, **arguments)

    def pool(part: Tensor) -> tuple[Tensor, Tensor]:
        outputs = aten.max_pool2d_with_indices(
            part.contiguous(memory_format=torch.channels_last), **arguments
        )
        return tuple(each.contiguous() for each in outputs)

    batch = max(1, CHUNK // (x.numel() // len(x)))
    if batch >= len(x):
        return pool(x)
    first = pool(x[:batch])
    pooled = tuple(each.new_empty((len(x), *each.shape[1:])) for each in first)
    for start in range(0, len(x), batch):
        for whole, part in zip(
            pooled, pool(x[start : start + batch]) if start else first, strict=True
        ):
            whole[start : start + batch] = part
        first = part = None  # free a part before the next one is allocated
    return pooled


def _adaptive(function: Replay, dimensions: int) -> Callable[[Node], Replay]:
    def replay(node: Node) -> Replay:
        return partial(function, output_size=tuple(shape_of_output(node)[-dimensions:]))

    return replay


def _pool(
    node: str, replay: DecidedBy, outputs: dict[str, int], of_spikes: DecidedBy | None = None
) -> Operation:
    return Operation(
        node,
        LAYER,
        ("self",),
        replay,
        outputs,
        shape_only=("self",),  # backward reads no element
        of_spikes=of_spikes,
        by_sample=0,
    )


register(
    _pool(
        "MaxPool2DWithIndicesBackward0",
        _max_pool(_max_pool2d),
        INDICES,
        of_spikes=_max_pool(aten.max_pool2d_with_indices),
    ),
    _pool("MaxPool3DWithIndicesBackward0", _max_pool(aten.max_pool3d_with_indices), INDICES),
    _pool("AvgPool2DBackward0", _average_pool(aten.avg_pool2d), {}),
    _pool("AvgPool3DBackward0", _average_pool(aten.avg_pool3d), {}),
    _pool("AdaptiveAvgPool2DBackward0", _adaptive(aten._adaptive_avg_pool2d, 2), {}),
    _pool("AdaptiveAvgPool3DBackward0", _adaptive(aten._adaptive_avg_pool3d, 3), {}),
    _pool("AdaptiveMaxPool2DBackward0", _adaptive(aten.adaptive_max_pool2d, 2), INDICES),
    _pool("AdaptiveMaxPool3DBackward0", _adaptive(aten.adaptive_max_pool3d, 3), INDICES),
)

"""Padding, interpolation, sampling on a grid. Most save a shape at most; the node above may save
their output."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ...torch_internals import capture
from ...torch_internals.graph import Node, attribute_of, shape_of_output
from ..kind import LAYER, PLAIN
from ..recipe import Replay
from .operation import ONE, DecidedBy, Operation, register
from .shape import applying

aten = torch.ops.aten


def _padded_with_a_number(node: Node, output: Tensor) -> Replay | None:
    """The number is not saved; a corner of the output tells it. On a device that is not asked for
    values it stays there. Borders that were written into since are NaN: then they are so all over,
    or which number they were is unknown."""
    pad, corner, number = attribute_of(node, "pad"), [0] * output.dim(), 0.0
    for i, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        if (before > 0 or after > 0) and output.numel():
            corner[-1 - i] = 0 if before > 0 else -1
            there = output.detach()[tuple(corner)]
            if not capture.may_compare(output):
                return partial(_pad_with_a_number_there, pad, there.clone())
            number = there.item()
            break
    if math.isnan(number):
        inner = output.new_zeros(tuple(shape_of_output(*node.next_functions[0])))
        if not (output.isnan() | (_pad(pad, 1.0, inner) == 0)).all():
            return None
        number = 0.0
    return partial(_pad, pad, number)


def _pad(pad: tuple[int, ...], number: float, x: Tensor) -> Tensor:
    return aten.constant_pad_nd(x, pad, number)


def _pad_with_a_number_there(pad: tuple[int, ...], number: Tensor, x: Tensor) -> Tensor:
    is_padding = aten.constant_pad_nd(torch.zeros_like(x, dtype=torch.bool), pad, True)
    return torch.where(is_padding, number, aten.constant_pad_nd(x, pad))


def _pad_from_within(name: str, dimensions: int) -> Operation:
    """Reflection and replication."""
    function = getattr(aten, f"{name.lower()}_pad{dimensions}d")
    node = f"{name}Pad{dimensions}DBackward0"
    return Operation(node, LAYER, ("self",), applying(function, "padding"), shape_only=("self",))


def _interpolation(name: str, dimensions: int, function: Replay, *more: str) -> Operation:
    scales = (
        ("scales",) if dimensions == 1 else tuple("scales_" + axis for axis in "dhw"[-dimensions:])
    )
    node = f"Upsample{name}{dimensions}DBackward0"
    return Operation(node, LAYER, ONE, applying(function, "output_size", *more, *scales))


def _sample(function: Replay, arguments: tuple, x: Tensor, grid: Tensor) -> Tensor:
    return function(x, grid, *arguments)


def _sampling(dimensions: int) -> Operation:
    modes = DecidedBy(
        lambda *arguments: partial(
            _sample, getattr(aten, f"grid_sampler_{dimensions}d"), arguments
        ),
        "interpolation_mode",
        "padding_mode",
        "align_corners",
    )
    return Operation(f"GridSampler{dimensions}DBackward0", LAYER, ("input", "grid"), modes)


register(
    Operation(
        "ConstantPadNdBackward0", PLAIN, ONE, lambda _: None, of_output=_padded_with_a_number
    ),
    *(
        _pad_from_within(name, dimensions)
        for name in ("Reflection", "Replication")
        for dimensions in (1, 2, 3)
    ),
    _interpolation("Nearest", 1, aten.upsample_nearest1d),
    _interpolation("Nearest", 2, aten.upsample_nearest2d),
    _interpolation("Nearest", 3, aten.upsample_nearest3d),
    _interpolation("NearestExact", 1, aten._upsample_nearest_exact1d),
    _interpolation("NearestExact", 2, aten._upsample_nearest_exact2d),
    _interpolation("NearestExact", 3, aten._upsample_nearest_exact3d),
    _interpolation("Linear", 1, aten.upsample_linear1d, "align_corners"),
    _interpolation("Bilinear", 2, aten.upsample_bilinear2d, "align_corners"),
    _interpolation("Bicubic", 2, aten.upsample_bicubic2d, "align_corners"),
    _interpolation("Trilinear", 3, aten.upsample_trilinear3d, "align_corners"),
    _sampling(2),
    _sampling(3),
)

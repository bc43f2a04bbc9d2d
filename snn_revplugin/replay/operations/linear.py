"""Weight layers: linear, matrix products and convolutions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...torch_internals.graph import Node, attribute_of
from ...torch_internals.saved_tensors import saved_by
from .operation import DecidedBy, Operation, Replay, register

HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
VECTOR = 16  # channels that oneDNN takes at a time
FEWEST_CHANNELS = 4  # of an image, say: there are kernels for fewer


def _scaled(function: Replay) -> DecidedBy:
    return DecidedBy(lambda alpha, beta: partial(function, alpha=alpha, beta=beta), "alpha", "beta")


def _convolve(arguments: tuple, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.convolution(x, weight, bias, *arguments)


def _without_bias(node: Node) -> tuple[int, ...]:
    return (2,) if attribute_of(node, "bias_sym_sizes_opt") in (None, (0,)) else ()


def _spikes_of_convolution(node: Node) -> torch.memory_format | None:
    """oneDNN has the gradient of a convolution's weight in half the time from an input with its
    channels last, where their number does not fill the vectors of AVX-512; where it does, the other
    way round."""
    weight = saved_by(node, "weight")
    if (
        weight is None
        or weight.dim() != 4
        or weight.dtype is not torch.float32
        or not weight.is_cpu
        or not HAS_AVX512
    ):
        return None
    if attribute_of(node, "transposed") or attribute_of(node, "groups") != 1:  # not measured
        return None
    out, channels = weight.shape[:2]
    return (
        torch.channels_last
        if out >= VECTOR and channels >= FEWEST_CHANNELS and channels % VECTOR
        else None
    )


CONVOLUTION = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")


def _weight_norm(node: Node) -> Replay:
    """``weight_norm`` of torch.nn.utils, the old one and the parametrisation: direction and length
    of a weight."""
    return partial(_normalised, attribute_of(node, "dim"))


def _normalised(dim: int, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._weight_norm_interface(v, g, dim)


register(
    Operation(
        "WeightNormInterfaceBackward0",
        ("v", "g"),
        _weight_norm,
        {"result1": 1},
        recompute_always=True,
        multiple_outputs=True,
    ),
    Operation(
        "AddmmBackward0", (None, "mat1", "mat2"), _scaled(torch.addmm), recompute_on_data=True
    ),
    Operation("MmBackward0", ("self", "mat2"), lambda _: torch.mm, recompute_on_data=True),
    Operation("MvBackward0", ("self", "vec"), lambda _: torch.mv, recompute_always=True),
    Operation("VdotBackward0", ("self", "other"), lambda _: torch.vdot, recompute_always=True),
    Operation("BmmBackward0", ("self", "mat2"), lambda _: torch.bmm, recompute_on_data=True),
    Operation(
        "BaddbmmBackward0",
        (None, "batch1", "batch2"),
        _scaled(torch.baddbmm),
        recompute_on_data=True,
    ),
    Operation(
        "ConvolutionBackward0",
        ("input", "weight", None),
        DecidedBy(lambda *arguments: partial(_convolve, arguments), *CONVOLUTION),
        absent=_without_bias,
        recompute_on_data=True,
        reads_spikes_as=_spikes_of_convolution,
    ),
)

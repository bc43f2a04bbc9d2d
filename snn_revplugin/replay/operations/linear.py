"""Weight layers: linear, matrix products and convolutions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...torch_internals.graph import Node, attribute_of
from ...torch_internals.saved_tensors import saved_by
from ..kind import LAYER, PARAMETRISATION
from ..recipe import Replay
from .operation import DecidedBy, Operation, register

HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
VECTOR = 16  # channels that oneDNN processes at a time
MIN_CHANNELS = 4  # oneDNN has other kernels for fewer, an image's


def _scaled(function: Replay) -> DecidedBy:
    return DecidedBy(lambda alpha, beta: partial(function, alpha=alpha, beta=beta), "alpha", "beta")


def _add_product(alpha: float, beta: float, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if bias.dim() == 2 and len(bias) not in (1, len(x)):  # several time steps side by side
        bias = bias.repeat(len(x) // len(bias), 1)
    return torch.addmm(bias, x, weight, alpha=alpha, beta=beta)


def _convolve(arguments: tuple, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.convolution(x, weight, bias, *arguments)


def _without_bias(node: Node) -> tuple[int, ...]:
    return (2,) if attribute_of(node, "bias_sym_sizes_opt") in (None, (0,)) else ()


def _spikes_of_convolution(node: Node) -> torch.memory_format | None:
    """channels_last where the number of channels does not fill the vectors of AVX-512: oneDNN then
    computes the weight's gradient in half the time. Where it does, the other format is faster."""
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
        if out >= VECTOR and channels >= MIN_CHANNELS and channels % VECTOR
        else None
    )


NORM = {"result1": 1}  # of a weight norm
CONVOLUTION = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")


def _weight_norm(node: Node) -> Replay:
    """``weight_norm`` of torch.nn.utils, the old one and the parametrisation: direction and length
    of a weight."""
    return partial(_normalised, attribute_of(node, "dim"))


def _normalised(dim: int, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._weight_norm_interface(v, g, dim)


register(
    Operation("WeightNormInterfaceBackward0", PARAMETRISATION, ("v", "g"), _weight_norm, NORM),
    Operation("MvBackward0", PARAMETRISATION, ("self", "vec"), lambda _: torch.mv),
    Operation("VdotBackward0", PARAMETRISATION, ("self", "other"), lambda _: torch.vdot),
    Operation(
        "AddmmBackward0",
        LAYER,
        (None, "mat1", "mat2"),
        DecidedBy(lambda *scales: partial(_add_product, *scales), "alpha", "beta"),
        by_sample=1,
        weight_and_bias=(2, 0),
    ),
    Operation("MmBackward0", LAYER, ("self", "mat2"), lambda _: torch.mm, by_sample=0),
    Operation("BmmBackward0", LAYER, ("self", "mat2"), lambda _: torch.bmm),
    Operation("BaddbmmBackward0", LAYER, (None, "batch1", "batch2"), _scaled(torch.baddbmm)),
    Operation(
        "ConvolutionBackward0",
        LAYER,
        ("input", "weight", None),
        DecidedBy(lambda *arguments: partial(_convolve, arguments), *CONVOLUTION),
        absent=_without_bias,
        reads_spikes_as=_spikes_of_convolution,
        by_sample=0,
        weight_and_bias=(1, 2),
    ),
)

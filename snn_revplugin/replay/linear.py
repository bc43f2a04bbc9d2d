"""Weight layers: linear, matrix products and convolutions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..autograd_internals import Node, attribute_of
from .operation import Operation, Replay, register


def _addmm(node: Node) -> Replay:
    return partial(torch.addmm, alpha=attribute_of(node, "alpha"), beta=attribute_of(node, "beta"))


def _baddbmm(node: Node) -> Replay:
    return partial(torch.baddbmm, alpha=attribute_of(node, "alpha"), beta=attribute_of(node, "beta"))


def _convolution(node: Node) -> Replay:
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    return partial(_convolve, tuple(attribute_of(node, name) for name in names))


def _convolve(arguments: tuple, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.convolution(x, weight, bias, *arguments)


def _without_bias(node: Node) -> tuple[int, ...]:
    return (2,) if attribute_of(node, "bias_sym_sizes_opt") in (None, (0,)) else ()


register(
    Operation("AddmmBackward0", (None, "mat1", "mat2"), _addmm),
    Operation("MmBackward0", ("self", "mat2"), lambda _: torch.mm),
    Operation("MvBackward0", ("self", "vec"), lambda _: torch.mv),
    Operation("BmmBackward0", ("self", "mat2"), lambda _: torch.bmm),
    Operation("BaddbmmBackward0", (None, "batch1", "batch2"), _baddbmm),
    Operation("ConvolutionBackward0", ("input", "weight", None), _convolution, absent=_without_bias, weighs=True),
)

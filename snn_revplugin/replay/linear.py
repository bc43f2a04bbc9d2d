"""Weight layers: linear, matrix products and convolutions."""

from __future__ import annotations

import torch

from ..autograd_internals import Node, attribute_of
from .operation import Operation, Replay, register


def _addmm(node: Node) -> Replay:
    alpha, beta = attribute_of(node, "alpha"), attribute_of(node, "beta")
    return lambda bias, x, weight: torch.addmm(bias, x, weight, alpha=alpha, beta=beta)


def _baddbmm(node: Node) -> Replay:
    alpha, beta = attribute_of(node, "alpha"), attribute_of(node, "beta")
    return lambda bias, x, weight: torch.baddbmm(bias, x, weight, alpha=alpha, beta=beta)


def _convolution(node: Node) -> Replay:
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    arguments = [attribute_of(node, name) for name in names]
    return lambda x, weight, bias: torch.convolution(x, weight, bias, *arguments)


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

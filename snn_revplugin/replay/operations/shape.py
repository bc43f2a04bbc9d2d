"""Operations that move elements: views, slices, stacks. They save nothing, but the node above may
save their output."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ...torch_internals import capture
from ...torch_internals.graph import Node, attribute_of, shape_of_output
from ..kind import PLAIN, SPLIT, VIEW
from ..recipe import Replay
from .operation import ONE, VARIADIC, DecidedBy, Operation, register


def _of_any_length(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape in which several time steps stand side by side, too."""
    return (-1, *shape[1:]) if shape and math.prod(shape[1:]) else shape


def _output_shape(node: Node) -> tuple[int, ...]:
    return tuple(shape_of_output(node))


aten = torch.ops.aten

# A view stays a view where the recomputed tensor has the saved strides; otherwise reshape
# copies, and the elements are equal.
RESHAPE = DecidedBy(
    lambda shape: partial(Tensor.reshape, shape=_of_any_length(shape)), read=_output_shape
)
EXPAND = DecidedBy(lambda shape: partial(Tensor.expand, size=shape), read=_output_shape)


def applying(function: Replay, *names: str) -> DecidedBy:
    """A replay that calls ``function`` with the operand and the named attributes."""
    return DecidedBy(lambda *arguments: partial(_applied, function, arguments), *names)


def _applied(function: Replay, arguments: tuple, x: Tensor) -> Tensor | tuple[Tensor, ...]:
    return function(x, *arguments)


def _joined(function: Replay) -> DecidedBy:
    return DecidedBy(lambda dim: partial(_join, function, dim), "dim")


def _join(function: Replay, dim: int, *tensors: Tensor) -> Tensor:
    return function(tensors, dim)


def _joined_with_number(node: Node, output: Tensor) -> Replay | None:
    """A ``cat`` with one tensor of a constant: the number that fills it."""
    dim = attribute_of(node, "dim") % output.dim()
    sizes = [
        None if below is None else shape_of_output(below, index)[dim]
        for below, index in node.next_functions
    ]
    if sizes.count(None) != 1 or not capture.may_synchronise(output):
        return None
    position = sizes.index(None)
    start, known = sum(sizes[:position]), sum(each for each in sizes if each is not None)
    part = output.narrow(dim, start, output.shape[dim] - known)
    if part.numel() == 0 or not (part == part.flatten()[0]).all():
        return None
    return partial(_join_around, dim, tuple(part.shape), part.flatten()[0].item())


def _join_around(
    dim: int, shape: tuple[int, ...], number: float, *tensors: Tensor | None
) -> Tensor:
    known = next(each for each in tensors if each is not None)
    constant = known.new_full(shape, number)
    return torch.cat([constant if each is None else each for each in tensors], dim)


def _unviewed(node: Node, position: int, output: Tensor) -> Tensor:
    below, index = node.next_functions[position]
    return output.reshape(tuple(shape_of_output(below, index)))


def _reshape(node: str) -> Operation:
    return Operation(node, VIEW, ONE, RESHAPE, before=_unviewed, by_sample=0)


def _unstacked(node: Node, position: int, output: Tensor) -> Tensor:
    return output.select(attribute_of(node, "dim"), position)


register(
    _reshape("ViewBackward0"),
    _reshape("UnsafeViewBackward0"),
    _reshape("ReshapeAliasBackward0"),
    Operation("AliasBackward0", VIEW, ONE, lambda _: lambda x: x),
    Operation("TBackward0", VIEW, ONE, lambda _: torch.t),
    Operation("TransposeBackward0", VIEW, ONE, applying(torch.transpose, "dim0", "dim1")),
    Operation("PermuteBackward0", VIEW, ONE, applying(torch.permute, "dims")),
    Operation("SqueezeBackward0", VIEW, ONE, lambda _: torch.squeeze),
    Operation("SqueezeBackward1", VIEW, ONE, applying(torch.squeeze, "dim")),
    Operation("SqueezeBackward2", VIEW, ONE, applying(torch.squeeze, "dim")),
    *(
        Operation(f"UnsqueezeBackward{form}", VIEW, ONE, applying(torch.unsqueeze, "dim"))
        for form in (0, 1)  # 1: in place
    ),
    Operation("ExpandBackward0", VIEW, ONE, EXPAND),
    Operation("SelectBackward0", VIEW, ONE, applying(torch.select, "dim", "index")),
    Operation(
        "SliceBackward0",
        VIEW,
        ONE,
        applying(aten.slice.Tensor, "dim", "start", "end", "step"),
    ),
    Operation("UnbindBackward0", SPLIT, ONE, applying(torch.unbind, "dim")),
    Operation("SplitBackward0", SPLIT, ONE, applying(torch.split, "split_size", "dim")),
    Operation("SplitWithSizesBackward0", SPLIT, ONE, applying(torch.split, "split_sizes", "dim")),
    Operation("FlipBackward0", PLAIN, ONE, applying(torch.flip, "dims")),
    Operation("RollBackward0", PLAIN, ONE, applying(torch.roll, "shifts", "dims")),
    Operation("PixelShuffleBackward0", PLAIN, ONE, applying(torch.pixel_shuffle, "upscale_factor")),
    Operation(
        "PixelUnshuffleBackward0", PLAIN, ONE, applying(torch.pixel_unshuffle, "downscale_factor")
    ),
    Operation("ChannelShuffleBackward0", PLAIN, ONE, applying(aten.channel_shuffle, "groups")),
    Operation("UnfoldBackward0", VIEW, ONE, applying(Tensor.unfold, "dimension", "size", "step")),
    Operation(
        "Im2ColBackward0",
        PLAIN,
        ONE,
        applying(aten.im2col, "kernel_size", "dilation", "padding", "stride"),
    ),
    Operation("TrilBackward0", PLAIN, ONE, applying(torch.tril, "diagonal")),
    Operation("TriuBackward0", PLAIN, ONE, applying(torch.triu, "diagonal")),
    Operation("RepeatBackward0", PLAIN, ONE, applying(Tensor.repeat, "repeats")),
    Operation("StackBackward0", PLAIN, VARIADIC, _joined(torch.stack), before=_unstacked),
    Operation("CatBackward0", PLAIN, VARIADIC, _joined(torch.cat), of_output=_joined_with_number),
)

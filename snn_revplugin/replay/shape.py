"""Operations that move elements about: views, slices, stacks. They save nothing; what stands above them needs their output."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..autograd_internals import Node, shape_of_output
from .operation import VARIADIC, DecidedBy, Operation, Replay, register

ONE = (None,)


def _output_shape(node: Node) -> tuple[int, ...]:
    return tuple(shape_of_output(node))


# A view stays a view where the strides of what it views came back; where they did not, the elements still have.
VIEW = DecidedBy(lambda shape: partial(Tensor.reshape, shape=shape), read=_output_shape)
EXPAND = DecidedBy(lambda shape: partial(Tensor.expand, size=shape), read=_output_shape)


def _with(function: Replay, *names: str) -> DecidedBy:
    """A replay that passes the named attributes on."""
    return DecidedBy(lambda *arguments: partial(_applied, function, arguments), *names)


def _applied(function: Replay, arguments: tuple, x: Tensor) -> Tensor | tuple[Tensor, ...]:
    return function(x, *arguments)


def _joined(function: Replay) -> DecidedBy:
    return DecidedBy(lambda dim: partial(_join, function, dim), "dim")


def _join(function: Replay, dim: int, *tensors: Tensor) -> Tensor:
    return function(tensors, dim)


register(
    Operation("ViewBackward0", ONE, VIEW, is_view=True),
    Operation("UnsafeViewBackward0", ONE, VIEW, is_view=True),
    Operation("ReshapeAliasBackward0", ONE, VIEW, is_view=True),
    Operation("AliasBackward0", ONE, lambda _: lambda x: x, is_view=True),
    Operation("TBackward0", ONE, lambda _: torch.t, is_view=True),
    Operation("TransposeBackward0", ONE, _with(torch.transpose, "dim0", "dim1"), is_view=True),
    Operation("PermuteBackward0", ONE, _with(torch.permute, "dims"), is_view=True),
    Operation("SqueezeBackward0", ONE, lambda _: torch.squeeze, is_view=True),
    Operation("SqueezeBackward1", ONE, _with(torch.squeeze, "dim"), is_view=True),
    Operation("SqueezeBackward2", ONE, _with(torch.squeeze, "dim"), is_view=True),
    Operation("UnsqueezeBackward0", ONE, _with(torch.unsqueeze, "dim"), is_view=True),
    Operation("ExpandBackward0", ONE, EXPAND, is_view=True),
    Operation("SelectBackward0", ONE, _with(torch.select, "dim", "index"), is_view=True),
    Operation("SliceBackward0", ONE, _with(torch.ops.aten.slice.Tensor, "dim", "start", "end", "step"), is_view=True),
    Operation("UnbindBackward0", ONE, _with(torch.unbind, "dim"), is_view=True, several=True),
    Operation("SplitBackward0", ONE, _with(torch.split, "split_size", "dim"), is_view=True, several=True),
    Operation("SplitWithSizesBackward0", ONE, _with(torch.split, "split_sizes", "dim"), is_view=True, several=True),
    Operation("RepeatBackward0", ONE, _with(Tensor.repeat, "repeats")),
    Operation("StackBackward0", VARIADIC, _joined(torch.stack)),
    Operation("CatBackward0", VARIADIC, _joined(torch.cat)),
)

"""Operations that move elements about: views, slices, stacks. They save nothing; what stands above them needs their output."""

from __future__ import annotations

import torch

from ..autograd_internals import Node, attribute_of, shape_of_output
from .operation import VARIADIC, Operation, Replay, register

ONE = (None,)


def _view(node: Node) -> Replay:
    shape = tuple(shape_of_output(node))
    return lambda x: x.view(shape)


def _expand(node: Node) -> Replay:
    shape = tuple(shape_of_output(node))
    return lambda x: x.expand(shape)


def _repeat(node: Node) -> Replay:
    repeats = attribute_of(node, "repeats")
    return lambda x: x.repeat(repeats)


def _with(function, *names: str):
    """A replay that passes the named attributes on."""

    def replay(node: Node) -> Replay:
        arguments = [attribute_of(node, name) for name in names]
        return lambda x: function(x, *arguments)

    return replay


def _slice(node: Node) -> Replay:
    dim, start, end, step = (attribute_of(node, name) for name in ("dim", "start", "end", "step"))
    return lambda x: torch.ops.aten.slice.Tensor(x, dim, start, end, step)


def _joined(function):
    def replay(node: Node) -> Replay:
        dim = attribute_of(node, "dim")
        return lambda *tensors: function(tensors, dim)

    return replay


register(
    Operation("ViewBackward0", ONE, _view, is_view=True),
    Operation("UnsafeViewBackward0", ONE, _view, is_view=True),
    Operation("ReshapeAliasBackward0", ONE, _view, is_view=True),
    Operation("AliasBackward0", ONE, lambda _: lambda x: x, is_view=True),
    Operation("TBackward0", ONE, lambda _: torch.t, is_view=True),
    Operation("TransposeBackward0", ONE, _with(torch.transpose, "dim0", "dim1"), is_view=True),
    Operation("PermuteBackward0", ONE, _with(torch.permute, "dims"), is_view=True),
    Operation("SqueezeBackward0", ONE, lambda _: torch.squeeze, is_view=True),
    Operation("SqueezeBackward1", ONE, _with(torch.squeeze, "dim"), is_view=True),
    Operation("SqueezeBackward2", ONE, _with(torch.squeeze, "dim"), is_view=True),
    Operation("UnsqueezeBackward0", ONE, _with(torch.unsqueeze, "dim"), is_view=True),
    Operation("ExpandBackward0", ONE, _expand, is_view=True),
    Operation("SelectBackward0", ONE, _with(torch.select, "dim", "index"), is_view=True),
    Operation("SliceBackward0", ONE, _slice, is_view=True),
    Operation("UnbindBackward0", ONE, _with(torch.unbind, "dim"), is_view=True, several=True),
    Operation("SplitBackward0", ONE, _with(torch.split, "split_size", "dim"), is_view=True, several=True),
    Operation("SplitWithSizesBackward0", ONE, _with(torch.split, "split_sizes", "dim"), is_view=True, several=True),
    Operation("RepeatBackward0", ONE, _repeat),
    Operation("StackBackward0", VARIADIC, _joined(torch.stack)),
    Operation("CatBackward0", VARIADIC, _joined(torch.cat)),
)

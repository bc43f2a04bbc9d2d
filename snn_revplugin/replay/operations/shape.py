"""Operations that move elements about: views, slices, stacks. They save nothing; what stands above
them needs their output."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...torch_internals.graph import Node, attribute_of, shape_of_output
from .operation import VARIADIC, DecidedBy, Operation, Replay, register

ONE = (None,)


def _output_shape(node: Node) -> tuple[int, ...]:
    return tuple(shape_of_output(node))


# A view stays a view where the strides of what it views came back; where they did not, the elements
# still have.
VIEW = DecidedBy(lambda shape: partial(Tensor.reshape, shape=shape), read=_output_shape)
EXPAND = DecidedBy(lambda shape: partial(Tensor.expand, size=shape), read=_output_shape)


def applying(function: Replay, *names: str) -> DecidedBy:
    """A replay that passes the named attributes on."""
    return DecidedBy(lambda *arguments: partial(_applied, function, arguments), *names)


def _applied(function: Replay, arguments: tuple, x: Tensor) -> Tensor | tuple[Tensor, ...]:
    return function(x, *arguments)


def _joined(function: Replay) -> DecidedBy:
    return DecidedBy(lambda dim: partial(_join, function, dim), "dim")


def _join(function: Replay, dim: int, *tensors: Tensor) -> Tensor:
    return function(tensors, dim)


def _unviewed(node: Node, position: int, output: Tensor) -> Tensor:
    below, index = node.next_functions[position]
    return output.reshape(tuple(shape_of_output(below, index)))


def _unstacked(node: Node, position: int, output: Tensor) -> Tensor:
    return output.select(attribute_of(node, "dim"), position)


register(
    Operation("ViewBackward0", ONE, VIEW, is_view=True, before=_unviewed),
    Operation("UnsafeViewBackward0", ONE, VIEW, is_view=True, before=_unviewed),
    Operation("ReshapeAliasBackward0", ONE, VIEW, is_view=True, before=_unviewed),
    Operation("AliasBackward0", ONE, lambda _: lambda x: x, is_view=True),
    Operation("TBackward0", ONE, lambda _: torch.t, is_view=True),
    Operation("TransposeBackward0", ONE, applying(torch.transpose, "dim0", "dim1"), is_view=True),
    Operation("PermuteBackward0", ONE, applying(torch.permute, "dims"), is_view=True),
    Operation("SqueezeBackward0", ONE, lambda _: torch.squeeze, is_view=True),
    Operation("SqueezeBackward1", ONE, applying(torch.squeeze, "dim"), is_view=True),
    Operation("SqueezeBackward2", ONE, applying(torch.squeeze, "dim"), is_view=True),
    Operation("UnsqueezeBackward0", ONE, applying(torch.unsqueeze, "dim"), is_view=True),
    Operation("ExpandBackward0", ONE, EXPAND, is_view=True),
    Operation("SelectBackward0", ONE, applying(torch.select, "dim", "index"), is_view=True),
    Operation(
        "SliceBackward0",
        ONE,
        applying(torch.ops.aten.slice.Tensor, "dim", "start", "end", "step"),
        is_view=True,
    ),
    Operation(
        "UnbindBackward0", ONE, applying(torch.unbind, "dim"), is_view=True, multiple_outputs=True
    ),
    Operation(
        "SplitBackward0",
        ONE,
        applying(torch.split, "split_size", "dim"),
        is_view=True,
        multiple_outputs=True,
    ),
    Operation(
        "SplitWithSizesBackward0",
        ONE,
        applying(torch.split, "split_sizes", "dim"),
        is_view=True,
        multiple_outputs=True,
    ),
    Operation("FlipBackward0", ONE, applying(torch.flip, "dims")),
    Operation("RollBackward0", ONE, applying(torch.roll, "shifts", "dims")),
    Operation("PixelShuffleBackward0", ONE, applying(torch.pixel_shuffle, "upscale_factor")),
    Operation("PixelUnshuffleBackward0", ONE, applying(torch.pixel_unshuffle, "downscale_factor")),
    Operation("RepeatBackward0", ONE, applying(Tensor.repeat, "repeats")),
    Operation("StackBackward0", VARIADIC, _joined(torch.stack), before=_unstacked),
    Operation("CatBackward0", VARIADIC, _joined(torch.cat)),
)

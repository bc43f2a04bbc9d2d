"""In-place writes into a whole tensor through a view of it.

For example ``out += identity``, where ``out`` is a view, of shape [T, batch, ...], of a tensor of
shape [T * batch, ...], as in the residual sum of a ResNet in step mode 'm'.

Autograd records the write as ``CopySlices`` on the viewed tensor, around the operation that wrote,
and makes a new view of that, ``as_strided``. What a node takes of its tensor is told by the strides
that its backward uses, see :func:`...torch_internals.graph.strided_by`. Anything but all elements
in their order is a boundary.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...torch_internals.graph import (
    Node,
    Strided,
    attribute_of,
    name_of,
    shape_of_output,
    strided_by,
    wrapped_node,
)
from ..kind import PLAIN, VIEW
from ..recipe import Replay
from .operation import ONE, VARIADIC, WRITE_INTO_VIEW, Operation, register

WRITES = {"AddBackward0": torch.add, "SubBackward0": torch.sub}


def _view_again(node: Node) -> Replay | None:
    shape, below = tuple(shape_of_output(node)), tuple(shape_of_output(*node.next_functions[0]))
    return partial(Tensor.reshape, shape=shape) if _in_order(node, below, shape) else None


def _written(node: Node) -> Replay | None:
    write = wrapped_node(node)
    function = None if write is None else WRITES.get(name_of(write))
    if function is None or len(node.next_functions) != 2 or attribute_of(write, "alpha") != 1:
        return None
    whole, part = tuple(shape_of_output(node)), tuple(shape_of_output(write))
    operand, output = node.next_functions[1]
    if operand is None or tuple(shape_of_output(operand, output)) != part:
        return None
    return partial(_write, function, part) if _in_order(node, whole, part) else None


def _write(function: Replay, part: tuple[int, ...], whole: Tensor, operand: Tensor) -> Tensor:
    result = whole.clone()
    view = result.view(part)
    function(view, operand, out=view)
    return result


def _in_order(node: Node, whole: tuple[int, ...], part: tuple[int, ...]) -> bool:
    """Whether a node takes of a tensor of the shape ``whole`` all elements, in their order, as a
    view of the shape ``part``."""
    geometry = strided_by(node)
    return geometry is not None and set(geometry) == {_dense(whole), _dense(part)}


def _dense(shape: tuple[int, ...]) -> Strided:
    """A tensor without gaps and offset; the strides of dimensions of size one say nothing."""
    return Strided(shape, torch.empty(shape, device="meta").stride(), 0).normal()


register(
    Operation("AsStridedBackward0", VIEW, ONE, _view_again),
    Operation(WRITE_INTO_VIEW, PLAIN, VARIADIC, _written),
)

"""In-place writes into a whole tensor through a view of it.

For example ``out += identity``, where ``out`` is a view, of shape [T, batch, ...], of a tensor of
shape [T * batch, ...], as in the residual sum of a ResNet in step mode 'm'.

Autograd records the write as ``CopySlices`` on the viewed tensor, around the operation that wrote,
and makes a new view of that, ``as_strided``. Neither node says which elements the view has. So each
is called with the elements' numbers as a gradient. Anything but all elements in their order is a
boundary.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...torch_internals.graph import (
    Node,
    attribute_of,
    gradient_through,
    name_of,
    shape_of_output,
    wrapped_node,
)
from ..kind import PLAIN, VIEW
from ..recipe import Replay
from .operation import ONE, VARIADIC, WRITE_INTO_VIEW, Operation, register

WRITES = {"AddBackward0": torch.add, "SubBackward0": torch.sub}


def _view_again(node: Node) -> Replay | None:
    shape, below = tuple(shape_of_output(node)), tuple(shape_of_output(*node.next_functions[0]))
    in_order = _in_order(gradient_through(node, _numbers(shape))[0], below)
    return partial(Tensor.reshape, shape=shape) if in_order else None


def _written(node: Node) -> Replay | None:
    write = wrapped_node(node)
    function = None if write is None else WRITES.get(name_of(write))
    if function is None or len(node.next_functions) != 2 or attribute_of(write, "alpha") != 1:
        return None
    whole, part = tuple(shape_of_output(node)), tuple(shape_of_output(write))
    operand, output = node.next_functions[1]
    if operand is None or tuple(shape_of_output(operand, output)) != part:
        return None
    # The gradient at what was written is the gradient at the view's elements.
    numbers = gradient_through(node, _numbers(whole))[1]
    in_order = _in_order(numbers if function is torch.add else -numbers, part)
    return partial(_write, function, part) if in_order else None


def _write(function: Replay, part: tuple[int, ...], whole: Tensor, operand: Tensor) -> Tensor:
    result = whole.clone()
    view = result.view(part)
    function(view, operand, out=view)
    return result


def _numbers(shape: tuple[int, ...]) -> Tensor:
    """A number for each element, from 1."""
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1, dtype=torch.int32 if count < 1 << 31 else torch.int64).view(
        shape
    )


def _in_order(numbers: Tensor | None, shape: tuple[int, ...]) -> bool:
    return numbers is not None and numbers.shape == shape and torch.equal(numbers, _numbers(shape))


register(
    Operation("AsStridedBackward0", VIEW, ONE, _view_again),
    Operation(WRITE_INTO_VIEW, PLAIN, VARIADIC, _written),
)

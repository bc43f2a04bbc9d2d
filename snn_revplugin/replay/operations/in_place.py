"""Writing in place into a whole tensor through a view of it: ``out += identity`` where ``out`` is a
folded tensor seen with its time steps apart, as a ResNet's residual sum in step mode 'm'.

Autograd records the write as ``CopySlices`` on the tensor that is viewed, around the operation that
wrote, and sees the view anew as ``as_strided`` of that. Neither says which elements the view has;
so both are asked, by the gradient of the elements' numbers, and anything but all elements in their
order is a boundary.
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
from .operation import VARIADIC, WRITE_INTO_VIEW, Operation, Replay, register

WRITES = {"AddBackward0": torch.add, "SubBackward0": torch.sub}


def _seen_anew(node: Node) -> Replay | None:
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
    asked = gradient_through(node, _numbers(whole))[
        1
    ]  # the gradient of what was written is that of the view's elements
    return (
        partial(_write, function, part)
        if _in_order(asked if function is torch.add else -asked, part)
        else None
    )


def _write(function: Replay, part: tuple[int, ...], whole: Tensor, operand: Tensor) -> Tensor:
    result = whole.clone()
    view = result.view(part)
    function(view, operand, out=view)
    return result


def _numbers(shape: tuple[int, ...]) -> Tensor:
    """A number for each element, from 1 on."""
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1, dtype=torch.int32 if count < 1 << 31 else torch.int64).view(
        shape
    )


def _in_order(numbers: Tensor | None, shape: tuple[int, ...]) -> bool:
    return numbers is not None and numbers.shape == shape and torch.equal(numbers, _numbers(shape))


register(
    Operation("AsStridedBackward0", (None,), _seen_anew, is_view=True),
    Operation(WRITE_INTO_VIEW, VARIADIC, _written),
)

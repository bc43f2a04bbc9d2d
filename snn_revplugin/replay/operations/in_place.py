"""In-place writes into a tensor through a view of it.

For example ``out += identity``, where ``out`` is a view, of shape [T, batch, ...], of a tensor of
shape [T * batch, ...], as in the residual sum of a ResNet in step mode 'm'; or borders that are
written into a padded tensor.

Autograd records the write as ``CopySlices`` on the viewed tensor, around the operation that wrote,
and makes a new view of that, ``as_strided``. What a node takes of its tensor is told by the strides
that its backward uses, see :func:`...torch_internals.graph.strided_by`, where these are all
elements in their order. Otherwise it is called with the elements' numbers as a gradient, and these
tell. Elements that do not lie in one regular pattern are a boundary.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ...torch_internals import capture
from ...torch_internals.graph import (
    Node,
    Strided,
    attribute_of,
    gradient_through,
    is_on_one_device,
    name_of,
    shape_of_output,
    strided_by,
    type_of_output,
    wrapped_node,
)
from ..kind import PLAIN, VIEW
from ..recipe import Replay
from .operation import ONE, VARIADIC, WRITE_INTO_VIEW, Operation, register

ADDS = {"AddBackward0": torch.add, "SubBackward0": torch.sub}
COPY = "CopyBackwards"
SCALE = "MulBackward0"
DIGIT = 1 << 8  # whole numbers up to which every dtype is exact


def _view_again(node: Node) -> Replay | None:
    shape, below = tuple(shape_of_output(node)), tuple(shape_of_output(*node.next_functions[0]))
    if _in_order(node, below, shape):
        return partial(Tensor.reshape, shape=shape)
    found = _numbers_through(node, shape, 0)
    if found is None or found.shape != below:
        return None
    found = found.reshape(-1)
    places = found.nonzero().reshape(-1)
    if len(places) != math.prod(shape):
        return None
    places = places[found[places].argsort()].view(shape)
    part = _part_of(places, shape)
    if part is None:
        return None
    if _is_whole(part, below):
        return partial(Tensor.reshape, shape=shape)
    return partial(_view_part, part)


def _view_part(part: Strided, whole: Tensor) -> Tensor:
    return part.of(whole.contiguous())


def _written(node: Node) -> Replay | None:
    """A write that the graph tells all of: ``view += operand``, ``view[...] = operand``, ``view *=
    number``."""
    write = wrapped_node(node)
    if write is None or not is_on_one_device(node):
        return None
    if _factor_absent(node):
        return _scaled(node)
    function = Tensor.copy_ if name_of(write) == COPY else ADDS.get(name_of(write))
    if function is None or len(node.next_functions) != 2 or node.next_functions[1][0] is None:
        return None
    if function is not Tensor.copy_ and attribute_of(write, "alpha") != 1:
        return None
    part = _part_written(node, write)
    return part and partial(_write, function, part)


def _write(function: Replay, part: Strided, whole: Tensor, operand: Tensor) -> Tensor:
    result = whole.clone(memory_format=torch.contiguous_format)
    view = part.of(result)
    if function is Tensor.copy_:
        view.copy_(operand)
    else:
        function(view, operand, out=view)
    return result


def _scaled(node: Node) -> Replay | None:
    """A part multiplied by one number."""
    whole = tuple(shape_of_output(node))
    factors = gradient_through(node, _ones(node))[0]
    if factors is None or factors.shape != whole:
        return None
    box = _box_of(factors != 1)
    if box is None:
        return None
    factor = factors[_slices(box)].reshape(-1)[:1]
    return partial(_scale, box, factor.item()) if (factors[_slices(box)] == factor).all() else None


def _factor_absent(node: Node) -> tuple[int, ...]:
    """The position of a factor without a gradient, which the gradient tells."""
    write, operands = wrapped_node(node), node.next_functions[1:]
    if write is None or name_of(write) != SCALE or any(each is not None for each, _ in operands):
        return ()
    return tuple(range(1, 1 + len(operands)))


def _scale(
    box: tuple[tuple[int, int], ...], factor: float, whole: Tensor, _: Tensor | None = None
) -> Tensor:
    result = whole.clone(memory_format=torch.contiguous_format)
    result[_slices(box)] *= factor
    return result


def _told_by_output(node: Node, output: Tensor) -> Replay | None:
    """A write of a constant, or into a tensor that was a constant: one number, or one for each
    channel (dimension 1).

    Elements that are written again later are NaN in ``output``, and do not count.
    """
    write, edges = wrapped_node(node), node.next_functions
    if write is None or not capture.may_synchronise(output):
        return None
    overwritten = _overwritten(node)
    if overwritten is None:
        return None
    if edges[0][0] is not None:
        box, values = _box_of(overwritten), _constant_at(overwritten, output)
        return None if box is None or values is None else partial(_fill, box, values)
    operand = edges[1][0] if len(edges) > 1 else None
    if operand is None or name_of(write) != COPY:
        return None
    part, values = _part_written(node, write), _constant_at(~overwritten, output)
    if part is None or values is None:
        return None
    return partial(_write_into, part, tuple(output.shape), values)


def _fill(
    box: tuple[tuple[int, int], ...], values: Tensor, whole: Tensor, _: Tensor | None = None
) -> Tensor:
    result = whole.clone(memory_format=torch.contiguous_format)
    view = result[_slices(box)]
    view.copy_(values.expand(result.shape)[_slices(box)])
    return result


def _write_into(
    part: Strided, shape: tuple[int, ...], values: Tensor, _: Tensor | None, operand: Tensor
) -> Tensor:
    result = values.to(operand).expand(shape).clone(memory_format=torch.contiguous_format)
    part.of(result).copy_(operand)
    return result


def _before_write(node: Node, position: int, output: Tensor) -> Tensor:
    """What a tensor was before a write, as far as is known: NaN where it was written."""
    overwritten = _overwritten(node)
    if overwritten is None:
        return torch.full_like(output, math.nan)
    return output.masked_fill(overwritten, math.nan)


def _overwritten(node: Node) -> Tensor | None:
    """Where a node wrote, whatever it wrote; None where that is unknown."""
    write = wrapped_node(node)
    if write is None:
        return None
    if name_of(write) == COPY or name_of(write).startswith(("FillBackward", "ZeroBackward")):
        passed = gradient_through(node, _ones(node))[0]
        return passed == 0 if passed is not None else _written_by(node, write)
    return _written_by(node, write) if name_of(write) in ADDS else None


def _written_by(node: Node, write: Node) -> Tensor | None:
    part = _part_written(node, write) if len(node.next_functions) == 2 else None
    if part is None:
        return None
    written = torch.zeros_like(_ones(node), dtype=torch.bool)
    part.of(written).fill_(True)
    return written


def _constant_at(mask: Tensor, output: Tensor) -> Tensor | None:
    """The number that an output is where a mask is set, for each channel; NaN does not count. None
    if there are several."""
    counts = mask & ~output.isnan()
    others = [i for i in range(output.dim()) if i != 1]
    values = torch.where(counts, output, -math.inf).amax(others, keepdim=True)
    values = torch.where(values == -math.inf, 0, values)
    if not ((output == values) | ~counts).all():
        return None
    return values.flatten()[:1] if (values == values.flatten()[0]).all() else values


def _box_of(mask: Tensor) -> tuple[tuple[int, int], ...] | None:
    """First and last index, in each dimension, of a block that a mask sets; None for another
    pattern."""
    indices = mask.nonzero()
    if len(indices) == 0:
        return None
    box = tuple(zip(indices.amin(0).tolist(), (indices.amax(0) + 1).tolist(), strict=True))
    return box if len(indices) == math.prod(stop - start for start, stop in box) else None


def _slices(box: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def _part_written(node: Node, write: Node) -> Strided | None:
    """The part of a tensor that a node wrote into; None where the operand is of another shape."""
    shape = tuple(shape_of_output(write))
    operand, output = node.next_functions[1]
    if operand is None or tuple(shape_of_output(operand, output)) != shape:
        return None
    whole = tuple(shape_of_output(node))
    if _in_order(node, whole, shape):
        return _dense(shape)
    # The gradient at what was written is the gradient at the view's elements.
    numbers = _numbers_through(node, whole, 1)
    if numbers is None or numbers.shape != shape:
        return None
    return _part_of((-numbers if name_of(write) == "SubBackward0" else numbers) - 1, shape)


def _ones(node: Node) -> Tensor:
    return torch.ones(tuple(shape_of_output(node)), device=type_of_output(node)[1])


def _numbers_through(node: Node, shape: tuple[int, ...], which: int) -> Tensor | None:
    """What the elements' numbers, from 1, become as a gradient, digit by digit."""
    device = type_of_output(node)[1]
    numbers = torch.arange(1, math.prod(shape) + 1, device=device).view(shape)
    total, scale = None, 1
    while scale <= math.prod(shape):
        found = gradient_through(node, (numbers // scale % DIGIT).float())[which]
        if found is None:
            return None
        total = found.long() * scale + (0 if total is None else total)
        scale *= DIGIT
    return total


def _part_of(places: Tensor, shape: tuple[int, ...]) -> Strided | None:
    """The pattern of elements at these places of a contiguous tensor."""
    if places.numel() == 0:
        return None
    first = places[(0,) * places.dim()]
    strides = tuple(
        (int(places.select(i, 1)[(0,) * (places.dim() - 1)] - first) if size > 1 else 0)
        for i, size in enumerate(shape)
    )
    if min(strides, default=0) < 0:
        return None
    part = Strided(shape, strides, int(first))
    regular = torch.full_like(places, part.offset)
    for i, stride in enumerate(strides):
        steps = torch.arange(shape[i], device=places.device) * stride
        regular += steps.view(-1, *(1,) * (len(shape) - 1 - i))
    return part if torch.equal(regular, places) else None


def _is_whole(part: Strided, shape: tuple[int, ...]) -> bool:
    """Whether a part has all elements of a contiguous tensor in their order."""
    return math.prod(part.size) == math.prod(shape) and part.normal() == _dense(part.size)


def _in_order(node: Node, whole: tuple[int, ...], part: tuple[int, ...]) -> bool:
    """Whether a node takes of a tensor of the shape ``whole`` all elements, in their order, as a
    view of the shape ``part``. No element is computed."""
    geometry = strided_by(node)
    return geometry is not None and set(geometry) == {_dense(whole), _dense(part)}


def _dense(shape: tuple[int, ...]) -> Strided:
    """A tensor without gaps and offset; the strides of dimensions of size one say nothing."""
    return Strided(shape, torch.empty(shape, device="meta").stride(), 0).normal()


register(
    Operation("AsStridedBackward0", VIEW, ONE, _view_again),
    Operation(
        WRITE_INTO_VIEW,
        PLAIN,
        VARIADIC,
        _written,
        absent=_factor_absent,
        of_output=_told_by_output,
        before=_before_write,
    ),
)

"""Choices by a mask: ``where`` and ``masked_fill``. The mask is kept at one bit an element.

Their nodes do not save a number that is filled in; the output tells it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...torch_internals import capture
from ...torch_internals.graph import Node
from ...torch_internals.saved_tensors import saved_by
from ..kind import ELEMENTWISE
from ..recipe import Replay
from .operation import Operation, register


def _choose(
    number: float | None, chosen: Tensor | None, other: Tensor | None, condition: Tensor
) -> Tensor:
    return torch.where(
        condition, number if chosen is None else chosen, number if other is None else other
    )


def _choose_number(node: Node, output: Tensor) -> Replay | None:
    condition = saved_by(node, "condition")
    if condition is None:
        return None
    number = number_at(condition if node.next_functions[0][0] is None else ~condition, output)
    return None if number is None else partial(_choose, number)


def _fill_number(node: Node, output: Tensor) -> Replay | None:
    mask = saved_by(node, "mask")
    number = None if mask is None else number_at(mask, output)
    return None if number is None else partial(_fill, number)


def _fill(number: float, x: Tensor, *filled_and_mask: Tensor | None) -> Tensor:
    return x.masked_fill(filled_and_mask[-1], number)


def _fill_value(x: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(mask, value)


def number_at(mask: Tensor, output: Tensor) -> float | None:
    """The one number that an output is where a mask is set; None if there are several."""
    if not capture.may_synchronise(output):
        return None
    elements = output.masked_select(mask)
    if elements.numel() == 0:
        return 0.0
    return elements[0].item() if bool((elements == elements[0]).all()) else None


register(
    Operation(
        "WhereBackward0",
        ELEMENTWISE,
        (None, None, "condition"),
        lambda _: partial(_choose, None),
        of_output=_choose_number,
    ),
    Operation(
        "MaskedFillBackward0",
        ELEMENTWISE,
        (None, "mask"),
        lambda _: None,
        of_output=_fill_number,
    ),
    Operation(
        "MaskedFillBackward1",
        ELEMENTWISE,
        (None, None, "mask"),
        lambda _: _fill_value,
        of_output=_fill_number,
    ),
)

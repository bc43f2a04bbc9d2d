"""Outputs that a module's own code leaves in an attribute (``self.spk``): they are kept as bits
until the attribute is read."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..replay import FIRED
from .module_copy import LEFT
from .outputs import HeldOutputs, Offered

EDITED = (
    "Attribute {name!r}: the outputs that it stood for were written into in place, and are freed."
    " Keep the tensor that the neuron returned"
)


class Left(dict[str, "LeftOutputs"]):
    """The attributes of a module that stand for its outputs, by name. A copy or a pickle of the
    module has none, as the host can copy no tensor with a graph."""

    def __deepcopy__(self, memo: dict) -> Left:
        return Left()

    def __reduce__(self) -> tuple[type[Left], tuple]:
        return Left, ()


class LeftOutputs:
    """The outputs of a call: the tensor that was given out for as long as anything holds it, then
    one that is equal and has the same place in the graph."""

    __slots__ = ("_given_out", "_offered", "_place")

    def __init__(self, outputs: Tensor, offered: Offered) -> None:
        self._given_out, self._offered = weakref.ref(outputs), offered
        self._place = _Place.apply(outputs)

    def tensor(self, name: str) -> Tensor:
        """The outputs.

        Raises:
            RuntimeError: they were written into, and nothing has what was written.
        """
        outputs = self._given_out()
        if outputs is None:
            if self._offered.were_edited():
                raise RuntimeError(EDITED.format(name=name))
            outputs = _WithValues.apply(self._place, self._offered.value())
        return outputs


def let_go(module: nn.Module, outputs: Tensor) -> None:
    """Put what outputs are kept as in the place of the module's attributes that are these, unless
    they are kept as they are."""
    names = [name for name, value in vars(module).items() if value is outputs]
    offered = getattr(outputs.grad_fn, FIRED, None)
    if not names or offered is None or isinstance(offered, HeldOutputs):
        return
    left = module.__dict__.setdefault(LEFT, Left())
    for name in names:
        del module.__dict__[name]
        left[name] = LeftOutputs(outputs, offered)


class _Place(torch.autograd.Function):
    """A tensor of the outputs' shape and with their place in the graph, and one element large."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor) -> Tensor:
        return outputs.new_zeros(()).expand(outputs.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _WithValues(torch.autograd.Function):
    """The values, with the other tensor's place in the graph."""

    @staticmethod
    def forward(ctx: Any, place: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None

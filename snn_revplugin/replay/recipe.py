"""Recipes: how a tensor that autograd would keep is had again in backward.

Every class here answers ``value()`` with a tensor. :class:`Spikes` unpacks bits, :class:`Kept` holds a tensor that is there
anyway, a :class:`Recipe` runs an operation on the values of others. A recipe that several readers share is computed once
a backward pass and dropped by its last reader:

    expect()    a reader announces itself, in forward
    value()     a reader reads, in backward
    release()   a reader that announced itself will not read
    peek()      the value for someone who never announced himself; nothing is counted and nothing kept

Values are computed without gradients, without autocast (the operands carry the dtypes that it chose in forward), and in
the arithmetic of the first time, so that they come back bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from .. import autograd_internals as internals
from ..spikes import PackedSpikes
from ..versioned import Versioned


class Value:
    """A tensor that can be had in backward."""

    __slots__ = ()
    derived = False  # whether it depends on spikes or data, and so costs memory at every time step if it is kept
    cheap = False  # spikes or a view of spikes: to be had again for less than it costs to keep
    identity: tuple | None = None  # equal for two values that are sure to be the same at every time step

    def value(self) -> Tensor:
        raise NotImplementedError

    def peek(self) -> Tensor:
        return self.value()

    def take(self) -> tuple[Tensor, bool]:
        """The value, and whether the reader may overwrite it."""
        return self.value(), False

    def expect(self) -> None:
        """Announce a reader."""

    def release(self) -> None:
        """Withdraw a reader."""


class Kept(Value):
    """A tensor that is there anyway: data, a parameter, or what an operation that nobody knows gave out."""

    __slots__ = ("held",)

    def __init__(self, tensor: Tensor) -> None:
        self.held = Versioned(tensor)

    @property
    def identity(self) -> tuple:
        # The tensor object may be one of several for the same memory: autograd makes a new one each time it is asked.
        tensor = self.held.tensor
        return tensor.data_ptr(), self.held.version, tensor.dtype, tensor.shape, tensor.stride()

    def value(self) -> Tensor:
        return self.held.get("an activation").detach()


class Shape(Value):
    """A tensor of zeros, four bytes large, for a backward that reads the shape of what it saved and no element."""

    __slots__ = ("shape", "zero")
    derived = True

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.zero = tensor.shape, tensor.new_zeros(())

    def value(self) -> Tensor:
        return self.zero.expand(self.shape)


class Spikes(Value):
    """The spikes of a neuron below. Unpacking is cheap, so every reader gets a copy of its own and nothing is counted."""

    __slots__ = ("factor", "packed")
    derived = True
    cheap = True

    def __init__(self, packed: PackedSpikes) -> None:
        self.packed = packed
        self.factor = None if packed.factor is None else Versioned(packed.factor)

    def value(self) -> Tensor:
        if self.factor is not None:
            self.factor.get("graded spikes")
        with torch.no_grad():
            return self.packed.spikes()

    def take(self) -> tuple[Tensor, bool]:
        return self.value(), True


class Recipe(Value):
    """The output of an operation, from the values of its inputs.

    Args:
        operation: takes the inputs' tensors to the output, or to a tuple of outputs.
        inputs: their values; None stands for an absent operand.
        is_view: whether the output shares memory with the first input.
    """

    __slots__ = (
        "__weakref__", "cache", "cheap", "derived", "identity", "inputs", "is_view", "left", "operation", "pass_id", "readers",
    )  # fmt: skip

    def __init__(
        self,
        operation: Callable[..., Tensor],
        inputs: tuple[Value | None, ...],
        is_view: bool,
        derived: bool,
        identity: tuple | None = None,
    ) -> None:
        self.operation, self.inputs, self.is_view, self.derived = operation, inputs, is_view, derived
        self.identity, self.cheap = identity, is_view and inputs[0].cheap
        self.readers, self.left, self.pass_id, self.cache = 0, 0, internals.NO_PASS, None
        for each in inputs:
            if each is not None:
                each.expect()

    def expect(self) -> None:
        self.readers += 1

    def value(self) -> Tensor:
        return self.take()[0]

    def take(self) -> tuple[Tensor, bool]:
        self._enter_pass()
        self.left -= 1
        value, owned = self.cache, False
        if value is None:
            value, owned = self._compute(reading=True)
        if self.left > 0 and not self.cheap:
            if self.cache is None:
                self.cache = value
                _forget_at_end_of_pass(self)
            return value, False
        self.cache = None
        return value, owned

    def peek(self) -> Tensor:
        return self.cache if self.cache is not None else self._compute(reading=False)[0]

    def release(self) -> None:
        self._enter_pass()
        self.left -= 1
        if self.left <= 0:
            if self.cache is None:
                for each in self.inputs:
                    if each is not None:
                        each.release()
            self.cache = None

    def _enter_pass(self) -> None:
        pass_id = internals.current_pass()
        if self.pass_id != pass_id:
            self.pass_id, self.left, self.cache = pass_id, self.readers, None

    def _compute(self, reading: bool) -> tuple[Tensor, bool]:
        operands, owned = [], not self.is_view
        for position, each in enumerate(self.inputs):
            if each is None:
                operands.append(None)
            elif reading and position == 0 and self.is_view:
                operand, owned = each.take()
                operands.append(operand)
            else:
                operands.append(each.value() if reading else each.peek())
        return _run(self.operation, operands), owned


class Output(Value):
    """One of several outputs of a recipe, such as the indices that max pooling found."""

    __slots__ = ("index", "recipe")

    def __init__(self, recipe: Recipe, index: int) -> None:
        self.recipe, self.index = recipe, index

    @property
    def derived(self) -> bool:
        return self.recipe.derived

    def value(self) -> Tensor:
        return self.recipe.value()[self.index]

    def take(self) -> tuple[Tensor, bool]:
        outputs, owned = self.recipe.take()
        return outputs[self.index], owned

    @property
    def identity(self) -> tuple | None:
        return self.recipe.identity and (*self.recipe.identity, self.index)

    def peek(self) -> Tensor:
        return self.recipe.peek()[self.index]

    def expect(self) -> None:
        self.recipe.expect()

    def release(self) -> None:
        self.recipe.release()


def _run(operation: Callable[..., Tensor], operands: list[Tensor | None]) -> Tensor:
    device = next((each.device.type for each in operands if each is not None), "cpu")
    if torch.is_autocast_enabled(device):
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return operation(*operands)
    if torch.is_grad_enabled():
        with torch.no_grad():
            return operation(*operands)
    return operation(*operands)


_caching: dict[int, list[weakref.ref]] = {}  # the recipes that hold a value, by backward pass


def _forget_at_end_of_pass(recipe: Recipe) -> None:
    """Where part of a graph is not walked some readers never come; nobody holds a value beyond its pass."""
    pass_id = recipe.pass_id
    if pass_id == internals.NO_PASS:
        recipe.cache = None
        return
    recipes = _caching.get(pass_id)
    if recipes is None:
        # A pass that raised never calls back: its list, of weak references only, goes with the next pass.
        for stale, left in list(_caching.items()):
            if all(each() is None for each in left):
                _caching.pop(stale, None)
        recipes = _caching[pass_id] = []
        internals.at_end_of_pass(lambda: _forget(pass_id))
    recipes.append(weakref.ref(recipe))


def _forget(pass_id: int) -> None:
    for each in _caching.pop(pass_id, ()):
        recipe = each()
        if recipe is not None:
            recipe.cache = None

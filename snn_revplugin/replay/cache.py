"""What the walks of a neuron share from one time step to the next: the parameters, and whatever
does not change with time.

An image shown at every time step goes through the same first layer each time: one recipe, computed
once a backward pass, serves them all. Everything here is held weakly, so nothing outlives the
graphs that read it.
"""

from __future__ import annotations

from functools import partial
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .operations.operation import Operation, Replay
from .recipe import HeldTensor, Recipe, Recomputable, Shape

# tensors made of parameters that may stand in the same place: of layers alike, or taking turns
MOST_ALIKE = 4


class RecipeCache:
    """The values that a neuron's walks have met before."""

    def __init__(self) -> None:
        self.small: set[tuple] = (
            set()
        )  # shapes and graph nodes of currents that take less than noting how to have them again
        self._kept: WeakValueDictionary[int, HeldTensor] = WeakValueDictionary()
        self._made: WeakValueDictionary[tuple, HeldTensor] = WeakValueDictionary()
        self._shapes: WeakValueDictionary[tuple, Shape] = WeakValueDictionary()
        self._recipes: WeakValueDictionary[tuple, Recipe] = WeakValueDictionary()

    def kept(self, tensor: Tensor) -> HeldTensor:
        """A tensor that is there anyway."""
        kept = self._kept.get(id(tensor))
        if kept is None or kept.held.tensor is not tensor or not kept.held.unchanged():
            kept = self._kept[id(tensor)] = HeldTensor(tensor)
        return kept

    def made(self, tensor: Tensor, place: tuple[str, int]) -> HeldTensor | None:
        """A tensor that was made of parameters: the one of an earlier time step, if that holds the
        same numbers.

        Args:
            place: which operand of which operation it is.

        Returns:
            None if there are enough others that do not.
        """
        alike = *place, tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        for i in range(MOST_ALIKE):
            earlier = self._made.get((alike, i))
            if earlier is None or not earlier.held.unchanged():
                self._made[alike, i] = kept = self.kept(tensor)
                return kept
            if earlier.held.tensor is tensor or torch.equal(earlier.value(), tensor.detach()):
                return earlier
        return None

    def shape(self, tensor: Tensor) -> Shape:
        """The shape of a tensor."""
        key = tensor.shape, tensor.dtype, tensor.device
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = Shape(tensor)
        return shape

    def recipe(
        self, function: Replay, values: tuple[Recomputable | None, ...], operation: Operation
    ) -> Recipe:
        """A recipe; the same one again for an operation that an earlier time step did on the very
        same tensors."""
        identity, flags = (
            _identity(function, values),
            (operation.is_view, operation.recompute_always, operation.recompute_on_data),
        )
        if identity is None:
            return Recipe(function, values, *flags, None, operation.pointwise)
        recipe = self._recipes.get(identity)
        if recipe is None:
            recipe = self._recipes[identity] = Recipe(
                function, values, *flags, identity, operation.pointwise
            )
        return recipe


def _identity(function: Replay, values: tuple[Recomputable | None, ...]) -> tuple | None:
    for each in values:  # spikes, nearly always, and soon said
        if each is not None and each.derived and each.identity is None:
            return None
    identities = []
    for each in values:
        identities.append(None if each is None else each.identity)
        if each is not None and identities[-1] is None:
            return None
    if isinstance(function, partial):
        return function.func, function.args, tuple(function.keywords.items()), tuple(identities)
    return getattr(function, "identity", function), tuple(identities)

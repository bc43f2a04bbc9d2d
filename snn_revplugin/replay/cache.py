"""What the walks of a neuron share between time steps: parameters, and recipes that do not change
with time.

An image shown at every time step goes through the same first layer each time. One recipe, computed
once per backward pass, serves all time steps. The cache holds everything weakly, so nothing
outlives the graphs that read it.
"""

from __future__ import annotations

from functools import partial
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..torch_internals import capture
from ..torch_internals.tensors import storage_of
from .keeping import PlannedStep
from .operations.operation import Operation
from .plan import Plan
from .recipe import HeldTensor, Recipe, Recomputable, Replay, Shape, TransposedLeaf

# different tensors computed from parameters that may stand in one place: of layers alike, or in
# turns
MAX_ALIKE = 4


class RecipeCache:
    """The values that a neuron's walks have met.

    Attributes:
        small: the currents that are not worth a recipe, by shape and graph node, with the bytes
            that autograd saves on the way to one.
        unpackable: the outputs of boundaries that are no small whole numbers, by the boundary's
            name and shape.
        unsolvable: the sums with something else than a number, by the operation and shape.
        frozen: weights with frozen biases that have given their layer's output, by both.
        plans: what the last walk to a kind of graph node left for the next, by the node's type.
        memory_budget: the neuron's own, or None for that of the settings.
        planned_steps: what training steps keep that begin with this neuron, by their first call.
    """

    def __init__(self, memory_budget: float | str | None = None) -> None:
        self.memory_budget = memory_budget
        self.small: dict[tuple, int] = {}
        self.unpackable: set[tuple] = set()
        self.unsolvable: set[tuple] = set()
        self.frozen: WeakValueDictionary[tuple, Tensor] = WeakValueDictionary()
        self.plans: dict[type, Plan | None] = {}
        self.planned_steps: dict[tuple, PlannedStep] = {}
        self._held: WeakValueDictionary[int, HeldTensor] = WeakValueDictionary()
        self._transposed: WeakValueDictionary[int, TransposedLeaf] = WeakValueDictionary()
        self._shared: WeakValueDictionary[tuple, HeldTensor] = WeakValueDictionary()
        self._constants: WeakValueDictionary[tuple, HeldTensor] = WeakValueDictionary()
        self._shapes: WeakValueDictionary[tuple, Shape] = WeakValueDictionary()
        self._recipes: WeakValueDictionary[tuple, Recipe] = WeakValueDictionary()
        self._counted: WeakValueDictionary[int, torch.UntypedStorage] = WeakValueDictionary()

    def held(self, tensor: Tensor) -> HeldTensor:
        """A tensor that is not recomputed."""
        held = self._held.get(id(tensor))
        if held is None or held.held.tensor is not tensor or not held.held.unchanged():
            held = self._held[id(tensor)] = HeldTensor(tensor)
        return held

    def transposed(self, leaf: Tensor) -> TransposedLeaf:
        """The transpose of a leaf."""
        held = self._transposed.get(id(leaf))
        if held is None or not held.is_of(leaf):
            held = self._transposed[id(leaf)] = TransposedLeaf(leaf)
        return held

    def shared(self, tensor: Tensor, place: tuple[str, int]) -> HeldTensor | None:
        """A tensor that was computed from parameters: that of an earlier time step, if it holds the
        same numbers.

        Args:
            tensor: it.
            place: which operand of which operation it is.

        Returns:
            None if ``MAX_ALIKE`` others hold different numbers, or numbers that may not be compared
            now.
        """
        alike = *place, tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        for i in range(MAX_ALIKE):
            earlier = self._shared.get((alike, i))
            if earlier is None or not earlier.held.unchanged():
                self._shared[alike, i] = held = self.held(tensor)
                return held
            if earlier.held.tensor is tensor:
                return earlier
            if capture.may_synchronise(tensor) and torch.equal(earlier.value(), tensor.detach()):
                return earlier
        return None

    def repeated(self, constant: Tensor, place: tuple[str, int]) -> HeldTensor:
        """A constant, or the last one that was met in its place if that holds the same numbers:
        autocast makes a copy of the same image at every time step.

        Args:
            constant: it, which no other code can write into, and whose numbers may be compared.
            place: which operand of which operation it is.
        """
        key = *place, constant.shape, constant.stride(), constant.dtype
        last = self._constants.get(key)
        if last is None or not torch.equal(last.value(), constant):
            last = self._constants[key] = self.held(constant)
        return last

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
        """A recipe; that of an earlier time step where that did the same operation on the very same
        tensors."""
        identity = _identity(function, values)
        recipe = None if identity is None else self._recipes.get(identity)
        if recipe is None:
            recipe = Recipe(function, values, operation.kind, identity, operation.by_sample)
            if identity is not None:
                self._recipes[identity] = recipe
        return recipe

    def bytes_to_count(self, tensor: Tensor) -> int:
        """The bytes of a tensor's memory at the first call for that memory, and 0 afterwards."""
        storage = storage_of(tensor)
        if storage is None or id(storage) in self._counted:
            return 0
        self._counted[id(storage)] = storage
        return storage.nbytes()

    def has_counted(self, storage: torch.UntypedStorage) -> bool:
        """Whether :meth:`bytes_to_count` has counted this memory."""
        return id(storage) in self._counted


def _identity(function: Replay, values: tuple[Recomputable | None, ...]) -> tuple | None:
    for each in values:  # spikes, nearly always: a quick answer
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

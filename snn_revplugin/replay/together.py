"""Time steps recomputed together.

The input of a neuron is recomputed by the same operations at every time step, and backward needs
one step after the other. For a small layer the calls cost more than the arithmetic. So the first
reader of a step computes the steps before it, too: their spikes, which lie in one block of memory,
are unpacked side by side along dimension 0, each operation runs once for all of them, and every
step's recipe is left its slice of the result.

Bits decide the spikes, so what another number of samples changes in the last place of a product
stays rounding. Steps stay on their own where an operation couples the samples of a step (a batch
norm), where a weight changes between steps, and where several would take much memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..packed.rows import MOST_BYTES
from ..torch_internals.distributed import is_freed
from ..torch_internals.pass_cache import PassCache, pass_cache
from ..torch_internals.tensors import storage_of
from .recipe import HeldTensor, Output, Recipe, Recomputable, Spikes, run

BYTES_OF_STEP = "bytes that recomputing a step takes"
Computed = Tensor | tuple[Tensor, ...]


def read_together(
    value: Recomputable, earlier: Iterator[Recomputable | None], layer: object
) -> Tensor:
    """Read a value in backward, and leave those of earlier time steps for their own readers.

    Args:
        value: the input of a neuron at a time step.
        earlier: at the steps before, the nearest one first.
        layer: the same object at all steps.
    """
    recipe = _recipe_of(value)
    if recipe is not None and recipe.by_sample is not None:
        values = pass_cache()
        if recipe not in values:
            with torch.no_grad():
                _compute_with_earlier(recipe, earlier, layer, values)
    return value.value()


def _recipe_of(value: Recomputable | None) -> Recipe | None:
    if type(value) is Output:
        return value.recipe
    return value if type(value) is Recipe else None


def _compute_with_earlier(
    recipe: Recipe, earlier: Iterator[Recomputable | None], layer: object, values: PassCache
) -> None:
    # The first step of a pass is computed on its own, and tells what a step takes.
    key = BYTES_OF_STEP, layer
    nbytes = values.get(key)
    most = MOST_BYTES // nbytes if nbytes else 1
    if (nbytes is not None and most < 2) or _has_computed_operand(recipe, values):
        return
    recipes = [recipe]
    while len(recipes) < most:
        before = _recipe_of(next(earlier, None))
        if before is None or before in values or not _are_alike(before, recipes[-1]):
            break
        if _has_computed_operand(before, values):
            break
        recipes.append(before)
    if nbytes is not None and len(recipes) == 1:
        return
    recipes.reverse()
    steps = _Steps(len(recipes))
    slices = steps.slices_of(steps.compute(recipes))
    values[key] = max(steps.given, steps.computed) // len(recipes)
    for each, part in zip(recipes, slices, strict=True):
        each.leave(part, values)


def _has_computed_operand(recipe: Recipe, values: PassCache) -> bool:
    """Whether another reader of this pass has had an operand on the way to the spikes computed."""
    while recipe is not None and recipe.by_sample is not None:
        recipe = _recipe_of(recipe.inputs[recipe.by_sample])
        reading = values.get(recipe)
        if reading is not None and reading.value is not None:
            return True
    return False


def _are_alike(earlier: Recomputable | None, later: Recomputable | None) -> bool:
    """Whether two values are computed by the same operations from spikes or data of two time steps,
    one step apart."""
    if type(earlier) is not type(later) or earlier is later:
        return False
    if type(later) is Output:
        return earlier.index == later.index and _are_alike(earlier.recipe, later.recipe)
    if type(later) is Spikes:
        return later.follows(earlier)
    if type(later) is HeldTensor:
        return _are_like_data(earlier, later)
    if type(later) is not Recipe or later.by_sample is None:
        return False
    if earlier.function is not later.function or len(earlier.inputs) != len(later.inputs):
        return False
    for position, (a, b) in enumerate(zip(earlier.inputs, later.inputs, strict=True)):
        same = _are_alike if position == later.by_sample else _are_same
        if not same(a, b):
            return False
    return True


def _are_same(earlier: Recomputable | None, later: Recomputable | None) -> bool:
    """Whether two operands are one tensor."""
    return earlier is later or (
        type(earlier) is type(later) is HeldTensor
        and earlier.identity == later.identity
        and earlier.held.unchanged()
    )


def _are_like_data(earlier: HeldTensor, later: HeldTensor) -> bool:
    """Whether two tensors of data can stand side by side. (Of a tensor that is not data any more
    its own reader will tell.)"""
    a, b = earlier.held.tensor, later.held.tensor
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and a.device == b.device
        and a.stride() == b.stride()
        and a.dim() > 0
        and earlier.held.unchanged()
        and not is_freed(a)
    )


class _Steps:
    """Consecutive time steps on the way to be computed together.

    Attributes:
        given, computed: bytes of the spikes or data, and of what was computed from them.
    """

    def __init__(self, count: int) -> None:
        self.count, self.given, self.computed = count, 0, 0

    def slices_of(self, computed: Computed) -> tuple[Computed, ...]:
        """Each step's part."""
        if self.count == 1:
            return (computed,)
        if isinstance(computed, tuple):
            return tuple(zip(*map(self.slices_of, computed), strict=True))
        return computed.chunk(self.count)

    def compute(self, recipes: list[Recipe]) -> Computed:
        """The outputs of recipes that are alike, side by side. Their inputs count as read."""
        last = recipes[-1]
        operands = []
        for position, operand in enumerate(last.inputs):
            if position == last.by_sample:
                operands.append(self._joined([each.inputs[position] for each in recipes]))
            else:
                operands.append(operand and operand.value())
                for each in recipes[:-1]:
                    if operand is not None:
                        each.inputs[position].drop_reader()
        computed = run(last.function, operands)
        if not last.is_view:
            parts = computed if isinstance(computed, tuple) else (computed,)
            self.computed += sum(each.nbytes for each in parts)
        return computed

    def _joined(self, values: list[Recomputable]) -> Tensor:
        last = values[-1]
        if type(last) is Output:
            return self._read([each.recipe for each in values])[last.index]
        if type(last) is Recipe and last.by_sample is not None:
            return self._read(values)
        if self.count == 1:
            joined = last.value()
        elif type(last) is Spikes:
            joined = last.joined(values[0])
        else:
            joined = _side_by_side([each.value() for each in values])
        self.given += joined.nbytes
        return joined

    def _read(self, recipes: list[Recipe]) -> Computed:
        """The outputs of recipes that others of them read. What has more readers is left for
        them."""
        computed, slices = self.compute(recipes), None
        for i, each in enumerate(recipes):
            reading = each.count_reader()
            if reading is not None and reading.value is None and not each.cheap:
                slices = slices or self.slices_of(computed)
                reading.value = slices[i]
        return computed


def _side_by_side(tensors: list[Tensor]) -> Tensor:
    """Tensors one after the other along dimension 0: a view, where they lie so in memory."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    size, start, storage = first.numel(), first.storage_offset(), storage_of(first)
    if first.is_contiguous() and all(
        storage_of(each) is storage and each.storage_offset() == start + i * size
        for i, each in enumerate(tensors)
    ):
        return first.as_strided((len(tensors) * len(first), *first.shape[1:]), first.stride())
    return torch.cat(tensors)

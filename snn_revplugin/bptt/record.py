"""What a reversible neuron remembers between calls."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import BackendChoice
from ..neurons.transition import Transition
from ..replay import RecipeCache
from ..torch_internals import capture
from ..torch_internals.versioned import mark_of
from .statistics import CallStatistics

if TYPE_CHECKING:
    from .trial import Trial


class NeuronRecord:
    """The part of a neuron that the host does not know about. Copies and pickles of a neuron start
    with a fresh one, of the same memory budget.

    Args:
        owner: the neuron, held weakly.
        statistics: those of a neuron that this one is a replica of.
        memory_budget: the neuron's own, or None for that of the settings.

    Attributes:
        statistics: what the neuron's calls kept and recomputed.
        cache: what the walks below the neuron share from one time step to the next.
        backend: what computes its arithmetic.
        trials: what the trials of its module's own step found, of a neuron without equations, by
            who runs it.
        host_step: what runs such a neuron's step, if its adapter has to look for it.
        in_call: whether a call of such a neuron is being taken as a whole.
    """

    def __init__(
        self,
        owner: object | None = None,
        statistics: CallStatistics | None = None,
        memory_budget: float | str | None = None,
    ) -> None:
        self._owner = None if owner is None else weakref.ref(owner)
        self.statistics = CallStatistics() if statistics is None else statistics
        self.cache = RecipeCache(memory_budget)
        self.backend = BackendChoice(self.statistics)
        self.trials: dict[object, Trial] = {}
        self.host_step: object = None
        self.in_call = False
        self._key: TransitionKey | None = None
        self._transition: Transition | None = None

    def belongs_to(self, owner: object) -> bool:
        """Whether this is the record of ``owner`` itself."""
        return self._owner is not None and self._owner() is owner

    def transition(
        self,
        tensors: tuple[Tensor, ...],
        others: tuple,
        build: Callable[[], Transition | None],
        starts: bool = False,
    ) -> Transition | None:
        """The equations of a neuron. Time steps with the same equations form a chain.

        Args:
            tensors, others: all that the equations are made of.
            build: makes them.
            starts: whether a chain of time steps starts. Values on another device than a CPU are
                not compared, which would wait for it; where a chain starts they count as new.
        """
        key = self._key
        if key is None or not key.equals(tensors, others, starts):
            built, earlier = build(), self._transition
            if built is not None:
                built.follow(earlier)
            self._key, self._transition = TransitionKey(tensors, others), built
        return self._transition

    def remember(self, transition: Transition) -> None:
        """Keep equations that their caller compares itself."""
        self._key, self._transition = None, transition

    @property
    def latest_transition(self) -> Transition | None:
        """The equations of the last reversible call."""
        return self._transition

    def __deepcopy__(self, memo: dict) -> NeuronRecord:
        return NeuronRecord(memory_budget=self.cache.memory_budget)

    def __reduce__(self) -> tuple[type[NeuronRecord], tuple]:
        return NeuronRecord, (None, None, self.cache.memory_budget)


class TransitionKey:
    """All that a neuron's equations are made of: tensors, and other objects.

    A key holds what it is made of, so that no later object takes the identity of an earlier one.
    Tensors are compared by their values too, where they lie on a CPU: a write through ``.data``, or
    by FSDP, leaves no version.
    """

    __slots__ = ("_noted", "_others")

    def __init__(self, tensors: tuple[Tensor, ...], others: tuple) -> None:
        self._noted, self._others = [NotedTensor(each) for each in tensors], others

    def equals(self, tensors: tuple[Tensor, ...], others: tuple, starts: bool) -> bool:
        """Whether these are the same, unchanged; arguments of :meth:`NeuronRecord.transition`."""
        if others != self._others or len(tensors) != len(self._noted):
            return False
        for noted, tensor in zip(self._noted, tensors, strict=True):
            if not noted.is_unchanged(tensor, starts):
                return False
        return True


class NotedTensor:
    """A tensor, and what tells one of its states from another."""

    __slots__ = ("_mark", "_numbers", "_tensor", "_value")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._mark = tensor, mark_of(tensor)
        # A single number is compared as one, others as tensors.
        self._value = self._numbers = None
        if capture.may_compare(tensor):
            if tensor.numel() == 1:
                self._value = tensor.item()
            else:
                self._numbers = tensor.detach().clone()

    def is_unchanged(self, tensor: Tensor, starts: bool) -> bool:
        """Whether a tensor is the one that was noted, in the same state."""
        if tensor is not self._tensor or mark_of(tensor) != self._mark:
            return False
        if not capture.may_compare(tensor):
            return not starts or tensor.is_cpu
        if self._numbers is not None:
            return torch.equal(tensor.detach(), self._numbers)
        return self._value is None or tensor.item() == self._value

"""What a reversible neuron remembers between calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import BackendChoice
from ..neurons.transition import Transition
from ..replay import RecipeCache
from .statistics import CallStatistics


class NeuronRecord:
    """The part of a neuron that the host does not know about. Copies and pickles of a neuron start
    with a fresh one.

    Attributes:
        statistics: what the neuron's calls kept and recomputed.
        cache: what the walks below the neuron share from one time step to the next.
        backend: what computes its arithmetic.
    """

    def __init__(self) -> None:
        self.statistics = CallStatistics()
        self.cache = RecipeCache()
        self.backend = BackendChoice(self.statistics)
        self._key: TransitionKey | None = None
        self._transition: Transition | None = None

    def transition(
        self, key: TransitionKey, build: Callable[[], Transition | None], starts: bool = False
    ) -> Transition | None:
        """The equations for ``key``. Time steps with the same equations form a chain.

        Args:
            key: all that the equations are made of.
            build: makes them.
            starts: whether a chain of time steps starts. Then tensors are compared by value too:
                a write through ``.data``, or FSDP, leaves no version.
        """
        if self._key is None or not key.is_same(self._key, by_value=starts):
            self._key, self._transition = key.held(), build()
        return self._transition

    @property
    def latest_transition(self) -> Transition | None:
        """The equations of the last reversible call."""
        return self._transition

    def __deepcopy__(self, memo: dict) -> NeuronRecord:
        return NeuronRecord()

    def __reduce__(self) -> tuple[type[NeuronRecord], tuple]:
        return NeuronRecord, ()


class TransitionKey:
    """All that a neuron's equations are made of: tensors, and other objects.

    The key holds what it is made of, so that no later object takes the identity of an earlier one.
    """

    __slots__ = ("others", "tensors", "values", "versions")

    def __init__(self, tensors: tuple[Tensor, ...], *others: object) -> None:
        self.tensors, self.others = tensors, others
        self.versions = [(t._version, t.requires_grad, t.data_ptr()) for t in tensors]
        self.values: tuple[Tensor | None, ...] = ()

    def held(self) -> TransitionKey:
        """The key with copies of the tensors' values, to be compared with later ones. (On another
        device than a CPU a comparison would wait for it; there no value is the same.)"""
        self.values = tuple(
            t.detach().clone() if t.device.type == "cpu" else None for t in self.tensors
        )
        return self

    def is_same(self, earlier: TransitionKey, by_value: bool) -> bool:
        """Whether these are the equations of an earlier key that was :meth:`held`."""
        if self.versions != earlier.versions or len(self.others) != len(earlier.others):
            return False
        if any(a is not b for a, b in zip(self.tensors, earlier.tensors, strict=True)):
            return False
        if not all(a is b or a == b for a, b in zip(self.others, earlier.others, strict=True)):
            return False
        if not by_value:
            return True
        return all(
            value is not None and torch.equal(tensor.detach(), value)
            for tensor, value in zip(self.tensors, earlier.values, strict=True)
        )

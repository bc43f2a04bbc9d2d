"""What a reversible neuron remembers between calls."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..neurons.transition import Dynamics
from ..replay import RecipeCache
from .statistics import CallStatistics


class NeuronRecord:
    """The part of a neuron that the host does not know about. Copies and pickles of a neuron start
    with a fresh one."""

    def __init__(self) -> None:
        self.statistics = CallStatistics()
        self.cache = RecipeCache()
        self._dynamics: tuple[tuple, Dynamics | None] | None = None

    def dynamics(
        self, key: tuple, build: Callable[[], Dynamics | None], anew: bool = False
    ) -> Dynamics | None:
        """The dynamics built for ``key``: everything that they depend on. Time steps with the same
        dynamics form a chain.

        Args:
            anew: build them in any case. What they remember of their parameters' values does not
                follow from ``key`` where those were written through ``.data``, or gathered by FSDP,
                which moves no version.
        """
        known = self._dynamics
        if anew or known is None or known[0] != key:
            known = self._dynamics = (key, build())
        return known[1]

    def __deepcopy__(self, memo: dict) -> NeuronRecord:
        return NeuronRecord()

    def __reduce__(self) -> tuple[type[NeuronRecord], tuple]:
        return NeuronRecord, ()


def version_key(*tensors: Tensor) -> tuple:
    """What tells one state of some tensors from another."""
    key = []
    for each in tensors:
        key += id(each), each._version, each.requires_grad
    return tuple(key)

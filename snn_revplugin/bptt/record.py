"""What a reversible neuron remembers between calls."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import BackendChoice
from ..neurons.transition import Transition
from ..replay import RecipeCache
from ..torch_internals import capture
from .statistics import CallStatistics


class NeuronRecord:
    """The part of a neuron that the host does not know about. Copies and pickles of a neuron start
    with a fresh one.

    Args:
        owner: the neuron, held weakly.
        statistics: those of a neuron that this one is a replica of.

    Attributes:
        statistics: what the neuron's calls kept and recomputed.
        cache: what the walks below the neuron share from one time step to the next.
        backend: what computes its arithmetic.
    """

    def __init__(
        self, owner: object | None = None, statistics: CallStatistics | None = None
    ) -> None:
        self._owner = None if owner is None else weakref.ref(owner)
        self.statistics = CallStatistics() if statistics is None else statistics
        self.cache = RecipeCache()
        self.backend = BackendChoice(self.statistics)
        self._key: TransitionKey | None = None
        self._transition: Transition | None = None

    def belongs_to(self, owner: object) -> bool:
        """Whether this is the record of ``owner`` itself."""
        return self._owner is not None and self._owner() is owner

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
        if self._key is None or not key.is_same(self._key, starts):
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

    A key holds what it is made of, so that no later object takes the identity of an earlier one.
    Tensors are compared by their values too, where they lie on a CPU: a write through ``.data``
    leaves no version.
    """

    __slots__ = ("_copies", "_marks", "others", "tensors")

    def __init__(self, tensors: tuple[Tensor, ...], *others: object) -> None:
        self.tensors, self.others = tensors, others
        self._marks = [_mark(each) for each in tensors]
        self._copies: list[Tensor | None] = []

    def held(self) -> TransitionKey:
        """The key with copies of values that are no single numbers, to compare later keys with."""
        self._copies = [
            each.detach().clone() if each.numel() != 1 and capture.may_compare(each) else None
            for each in self.tensors
        ]
        return self

    def is_same(self, earlier: TransitionKey, starts: bool) -> bool:
        """Whether these are the equations of an earlier key that was :meth:`held`.

        Args:
            starts: whether a chain starts. Values on another device are not compared, which would
                wait for it; where a chain starts they count as new.
        """
        if self.others != earlier.others or len(self.tensors) != len(earlier.tensors):
            return False
        if self._marks != earlier._marks and any(map(_differ, self._marks, earlier._marks)):
            return False
        for tensor, before, copy in zip(
            self.tensors, earlier.tensors, earlier._copies, strict=True
        ):
            if tensor is not before or (starts and tensor.device.type != "cpu"):
                return False
            if copy is not None and not torch.equal(tensor.detach(), copy):
                return False
        return True


def _differ(mark: tuple, other: tuple) -> bool:
    """Whether two marks tell of two states; a value that may not be read tells nothing."""
    if mark[-1] is None or other[-1] is None:
        return mark[:-1] != other[:-1]
    return mark != other


def _mark(tensor: Tensor) -> tuple:
    """What tells one state of a tensor from another."""
    value = tensor.item() if tensor.numel() == 1 and capture.may_compare(tensor) else None
    return tensor._version, tensor.requires_grad, tensor.data_ptr(), value

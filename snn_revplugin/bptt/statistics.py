"""What one reversible neuron keeps, what is recomputed for it, and what prevented that: the
facts behind ``explain``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ..packed.spikes import PackedSpikes


@dataclass
class CallStatistics:
    """The account of a neuron's calls since :meth:`clear`; filled by the calls, read by
    :func:`snn_revplugin.explain`."""

    steps: int = 0  # time steps that were taken reversibly
    calls: int = 0  # ... in as many calls
    fallback_calls: int = 0  # calls that took the host's own path
    spike_bytes: int = 0  # of packed spikes
    block_bytes: int = 0  # of the blocks of memory that they are in, which may have room for more
    # of membrane potentials held between the first and the last of a chain
    potential_bytes: int = 0
    neuron_steps: int = 0
    small_calls: int = 0  # reversible calls whose current is kept as it is, being small
    hooked_calls: int = 0  # calls whose charged potentials hooks of another tool saved
    hooked_bytes: int = 0  # ... that they handed to those
    # time steps between anchors; None where a whole sequence is scanned again
    anchor_interval: int | None = None
    backend: str = ""  # what computed the last call, and why
    # whether the neuron rebuilds from its own outputs, which the next layer keeps anyway
    keeps_outputs: bool = False
    # recomputed, with the number of calls
    operations: Counter[str] = field(default_factory=Counter)
    # not in the table, so their saved tensors are kept
    boundaries: Counter[str] = field(default_factory=Counter)
    # bytes of the activations that autograd keeps, by what keeps them
    kept_bytes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)  # for taking the host's own path

    def took_step(
        self,
        packed: PackedSpikes,
        anchor_interval: int | None,
        potential_bytes: int,
        keeps_outputs: bool,
    ) -> None:
        """A time step was taken.

        Args:
            potential_bytes: of the potentials, or residues, that are kept from this step on.
            keeps_outputs: whether the step is recomputed from its outputs.
        """
        self.steps += 1
        self._took(packed)
        self.keeps_outputs = keeps_outputs
        self.anchor_interval = None if keeps_outputs else anchor_interval
        self.potential_bytes += potential_bytes

    def took_sequence(
        self, packed: PackedSpikes, charged: Tensor | None, keeps_outputs: bool
    ) -> None:
        """T time steps were taken; ``charged`` are the charged potentials, if they are kept."""
        self.steps += packed.shape[0]
        self._took(packed)
        self.keeps_outputs = keeps_outputs
        self.anchor_interval = None if charged is None else 1
        if charged is not None:
            self.potential_bytes += charged.nbytes

    def took_sequence_through_hooks(self, kept: Tensor) -> None:
        """A sequence was taken whose potentials hooks of another tool keep."""
        self.hooked_calls += 1
        self.hooked_bytes += kept.nbytes

    def _took(self, packed: PackedSpikes) -> None:
        self.calls += 1
        self.spike_bytes += packed.nbytes
        self.block_bytes += packed.allocated
        self.neuron_steps += packed.shape.numel()

    def fell_back(self, reason: str) -> None:
        """The host's own path was taken."""
        self.fallback_calls += 1
        self.reasons[reason] += 1

    def clear(self) -> None:
        self.__init__()

    def __deepcopy__(self, memo: dict) -> CallStatistics:
        return CallStatistics()  # a copy of a neuron has not been called yet

    def __reduce__(self) -> tuple[type[CallStatistics], tuple]:
        return CallStatistics, ()

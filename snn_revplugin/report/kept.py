"""What one training step keeps for backward, in bytes by cause."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ..replay import RecipeCache
from ..swap.module import ReversibleNeuron
from ..swap.watch import watches_of
from ..torch_internals.tensors import storage_of
from .memory import MemoryReport, memory_report

SPIKE_BITS = "spikes as bits"
POTENTIALS = "membrane potentials"
HOOKED = "membrane potentials in saved-tensor hooks"
OUTPUTS = "outputs that a neuron rebuilds from"
SPIKES_READ = "spikes that readers behind a neuron keep"
STATES_CARRIED = "states that code behind a neuron keeps"


def kept_in_one_step(
    net: nn.Module, step_fn: Callable[[], object]
) -> tuple[Counter[str], MemoryReport]:
    """Run one training step and count what it keeps when its first backward begins.

    Args:
        net: holds the neurons. Their statistics are cleared first.
        step_fn: as :func:`memory_report` takes it.

    Returns:
        Bytes by cause, and the memory that the step held.
    """
    neurons = [each for each in net.modules() if isinstance(each, ReversibleNeuron)]
    records = [each.record for each in (*neurons, *watches_of(net).values())]
    caches = [each.cache for each in records]
    outputs, kept = [_Outputs(each) for each in neurons], Counter()
    for each in records:
        each.statistics.clear()
    handles = [each.neuron.register_forward_hook(each.see) for each in outputs]
    try:
        report = memory_report(
            step_fn,
            at_first_backward=lambda: [kept.update(each.alive(caches)) for each in outputs],
        )
    finally:
        for each in handles:
            each.remove()
    for each in neurons:
        statistics = each.record.statistics
        kept[SPIKE_BITS] += statistics.block_bytes
        kept[POTENTIALS] += statistics.potential_bytes
        kept[HOOKED] += statistics.hooked_bytes
    for each in records:
        kept.update(each.statistics.kept_bytes)
    return +kept, report


class _Outputs:
    """What a neuron gave out, spikes and states, by the ``id`` of its memory."""

    def __init__(self, neuron: ReversibleNeuron) -> None:
        self.neuron = neuron
        self.spikes: dict[int, _Watched] = {}
        self.states: dict[int, _Watched] = {}
        self.last_states: set[int] = set()

    def see(self, module: nn.Module, inputs: tuple, outputs: Any) -> None:
        spikes, *states = outputs if isinstance(outputs, tuple | list) else (outputs,)
        self.spikes |= _watch(spikes)
        last = _watch(*states)
        self.states |= last
        self.last_states = set(last)

    def alive(self, caches: list[RecipeCache]) -> Counter[str]:
        """Bytes that are still held, by cause, and that no walk with one of these caches has
        counted."""
        statistics, kept = self.neuron.record.statistics, Counter()
        of_spikes = OUTPUTS if statistics.keeps_outputs else SPIKES_READ
        anchors = 0  # bytes of states whose memory lives without the tensor: anchors, or detached
        for outputs, cause in ((self.spikes, of_spikes), (self.states, STATES_CARRIED)):
            for key, watched in outputs.items():
                storage = watched.storage()
                if storage is None or any(each.has_counted(storage) for each in caches):
                    continue
                if outputs is self.states and key in self.last_states:
                    kept[POTENTIALS] += storage.nbytes()  # the neuron itself keeps it
                elif outputs is self.spikes or watched.tensor() is not None:
                    kept[cause] += storage.nbytes()
                else:
                    anchors += storage.nbytes()
        if anchors > statistics.potential_bytes:
            kept[STATES_CARRIED] += anchors
        return kept


class _Watched(NamedTuple):
    """A tensor that a neuron gave out, and its memory."""

    tensor: weakref.ref[Tensor]
    storage: weakref.ref[torch.UntypedStorage]


def _watch(*tensors: object) -> dict[int, _Watched]:
    watched = {}
    for each in tensors:
        storage = storage_of(each) if isinstance(each, Tensor) else None
        if storage is not None:
            watched[id(storage)] = _Watched(weakref.ref(each), weakref.ref(storage))
    return watched


def kept_in_words(kept: Mapping[str, int]) -> str:
    """Bytes by cause, the largest first.

    >>> kept_in_words({"silu": 2048, "gelu": 3 << 20})
    'gelu 3.0 MiB, silu 2.0 KiB'
    """
    largest_first = sorted(kept.items(), key=lambda each: -each[1])
    return ", ".join(f"{cause} {size_in_words(nbytes)}" for cause, nbytes in largest_first)


def size_in_words(nbytes: int) -> str:
    """A number of bytes."""
    if abs(nbytes) < 1024:
        return f"{nbytes} bytes"
    return f"{nbytes / 1024:.1f} KiB" if abs(nbytes) < 1 << 20 else f"{nbytes / 2**20:.1f} MiB"

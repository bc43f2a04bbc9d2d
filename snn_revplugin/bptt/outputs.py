"""What a neuron's graph node offers to the layers above: its outputs, as they recompute them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..neurons.transition import Transition
from ..packed.integers import PackedIntegers
from ..packed.spikes import PackedSpikes
from ..packed.values import PackedValues
from ..replay import Recipe, Recomputable, Spikes
from ..torch_internals.versioned import Versioned, version_counter

OUTPUT = "the input and the state of a coupled neuron (its output)"


class HeldOutputs(Recomputable):
    """The outputs of a neuron that keeps them: because its own backward reads them, or because they
    do not fit into a few bits."""

    __slots__ = ("held",)
    derived = True
    cheap = True
    strides = None

    def __init__(self, given_out: Tensor) -> None:
        self.held = Versioned(given_out.detach())

    @property
    def shape(self) -> torch.Size:
        return self.held.tensor.shape

    @property
    def nbytes(self) -> int:
        return self.held.tensor.nbytes

    allocated = nbytes

    def were_edited(self) -> bool:
        """Whether the outputs were written into since they were given out."""
        return not self.held.unchanged()

    def value(self) -> Tensor:
        return self.held.get(OUTPUT)


class PackedOutputs(Recomputable):
    """The outputs of a neuron that gives out small whole numbers, or few different numbers, packed.

    Args:
        packed: the numbers.
        given_out: the outputs, whose version tells of writes into them.
    """

    __slots__ = ("_counter", "_version", "packed", "shape")
    derived = True
    cheap = True
    strides = None

    def __init__(self, packed: PackedIntegers | PackedValues, given_out: Tensor) -> None:
        self.packed, self.shape = packed, given_out.shape
        self._counter, self._version = version_counter(given_out), given_out._version

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    allocated = nbytes

    def were_edited(self) -> bool:
        """Whether the outputs were written into since they were given out."""
        return self._counter._version != self._version

    def value(self) -> Tensor:
        with torch.no_grad():
            return self.packed.numbers()

    def consume(self) -> tuple[Tensor, bool]:
        return self.value(), True


Offered = HeldOutputs | PackedOutputs | Spikes


def offer(transition: Transition, kept: PackedSpikes | Offered, outputs: Tensor) -> Offered:
    """The outputs of a step or a sequence, for the graph node that gives them out."""
    if not isinstance(kept, PackedSpikes):
        return kept
    return HeldOutputs(outputs) if transition.from_outputs else Spikes(kept, outputs)


def recovered_input(
    transition: Transition, outputs: HeldOutputs, packed: PackedSpikes, time: bool = False
) -> Recipe:
    """The input of a neuron that is recomputed from its outputs, to rounding and without any
    state: computed by the first reader of a backward pass, shared by all, dropped by the last.

    Args:
        time: whether it is that of several time steps, ``[T, ...]``.
    """
    return Recipe(partial(transition.recover_inputs, packed, time), (outputs,))

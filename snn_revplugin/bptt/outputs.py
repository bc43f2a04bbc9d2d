"""What a neuron's graph node offers to the layers above: its outputs, as they recompute them."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..neurons.transition import Transition
from ..packed.spikes import PackedSpikes
from ..replay import Recipe, Recomputable, Spikes
from ..torch_internals.versioned import Versioned

OUTPUT = "the input and the state of a coupled neuron (its output)"


class HeldOutputs(Recomputable):
    """The outputs of a neuron that keeps them, since its own backward reads them."""

    __slots__ = ("held",)
    derived = True
    cheap = True

    def __init__(self, given_out: Tensor) -> None:
        self.held = Versioned(given_out.detach())

    def were_edited(self) -> bool:
        """Whether the outputs were written into since they were given out."""
        return not self.held.unchanged()

    def value(self) -> Tensor:
        return self.held.get(OUTPUT)


def offer(transition: Transition, packed: PackedSpikes, outputs: Tensor) -> HeldOutputs | Spikes:
    """The outputs of a step or a sequence, for the graph node that gives them out."""
    return HeldOutputs(outputs) if transition.from_outputs else Spikes(packed, outputs)


def recovered_input(
    transition: Transition, outputs: HeldOutputs, packed: PackedSpikes, time: bool = False
) -> Recipe:
    """The input of a neuron that is recomputed from its outputs, to rounding and without any
    state: computed by the first reader of a backward pass, shared by all, dropped by the last.

    Args:
        time: whether it is that of several time steps, ``[T, ...]``.
    """
    return Recipe(partial(transition.recover_inputs, packed, time), (outputs,))

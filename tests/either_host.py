"""A neuron's state and its time step, whichever host the neuron is from."""

from __future__ import annotations

import snntorch as snn
import torch.nn as nn
from torch import Tensor


def potential_of(neuron: nn.Module) -> Tensor:
    """The membrane potential that a neuron holds."""
    return neuron.mem if isinstance(neuron, snn.SpikingNeuron) else neuron.v


def step_of(neuron: nn.Module, current: Tensor, potential: Tensor) -> tuple[Tensor, Tensor]:
    """One time step from a potential: spikes and the next potential. Of snnTorch without
    ``init_hidden``, of SpikingJelly in step mode 's'."""
    if isinstance(neuron, snn.SpikingNeuron):
        return neuron(current, potential)
    neuron.v = potential
    return neuron(current), neuron.v


def clear(*neurons: nn.Module) -> None:
    """A new sequence begins."""
    for each in neurons:
        each.reset_mem() if isinstance(each, snn.SpikingNeuron) else each.reset()

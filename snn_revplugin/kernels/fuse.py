"""The kernels for a neuron."""

from __future__ import annotations

from ..neurons.transition import Transition
from .triton_coupled import TritonCoupled
from .triton_neuron import TritonNeuron
from .triton_transition import TritonTransition


def fuse(transition: Transition, interpreted: bool) -> TritonTransition:
    """A transition that computes by kernels what ``transition`` computes in plain torch code.

    Args:
        interpreted: whether Triton's interpreter runs the kernels.
    """
    kind = TritonCoupled if transition.from_outputs else TritonNeuron
    return kind(transition, interpreted)

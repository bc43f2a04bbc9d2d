"""snnTorch's second-order neuron, ``snntorch.Synaptic``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .leaky import Leaky, clamped, slope_of_clamp
from .one_state import PlainParts
from .transition import Derivative, Needed, States, StepView, add, sum_to


class SynapticParts(PlainParts):
    """A time step, see :class:`.transition.StepParts`."""

    __slots__ = ("synapse",)

    def __init__(self, neuron: Synaptic, x: Tensor, states: States) -> None:
        synapse, v = states
        self.synapse = neuron.integrate(x, synapse)
        super().__init__(neuron, self.synapse, v)

    def states(self) -> States:
        return self.synapse, *super().states()


@dataclass(eq=False)
class Synaptic(Leaky):
    r"""snnTorch's second-order neuron, ``snntorch.Synaptic``: a synaptic current ``i`` that leaks,
    and a leaky neuron which it charges.

        i' = alpha i + x
        v' = as of :class:`.leaky.Leaky` from v, with i' for its x

    with alpha clamped to [0, 1]. It resets by 'subtract', 'clear' or 'none', and nothing resets the
    current. Backwards in time, where the reset can be inverted:

        v = (v' - i' + theta r) / beta
        i = (i' - x) / alpha
    """

    alpha: Tensor = None

    has_synapse = True
    states_follow_charged = False
    single_steps_only = True
    parameter_names = (*Leaky.parameter_names, "alpha")

    @property
    def synapse_read_within(self) -> bool:
        return self.reset_kind == "clear"  # the host writes into both states

    @property
    def cascade(self) -> tuple[float, ...]:
        return self.clamped_alpha.min().item(), self.decay

    @cached_property
    def clamped_alpha(self) -> Tensor:
        return clamped(self.alpha)

    def integrate(self, x: Tensor, synapse: Tensor) -> Tensor:
        alpha = self.alpha.clamp(0, 1) if torch.is_grad_enabled() else self.clamped_alpha
        return add(alpha * synapse, x)

    def cleared(self, h: Tensor, signal: Tensor) -> Tensor:
        return super().cleared(h, signal).to(h.dtype)  # the host writes in place

    def begin(self, x: Tensor, states: States) -> SynapticParts:
        return SynapticParts(self, x, states)

    def again(self, view: StepView, states: States) -> tuple[Tensor, States]:
        synapse, v = states
        synapse = self.integrate(view.current, synapse)
        charged = self.charge(synapse, v, view.reset_signal)
        return charged, (synapse, *self.states_of(charged, view))

    def charged_of(self, view: StepView) -> Tensor:
        if self.reset_keeps_charged:
            return view.after[-1]
        return self.charge(view.after[0], view.before[-1], view.reset_signal)

    def invert(self, view: StepView) -> States:
        synapse = view.after[0]
        before = (synapse - view.current).div_(self.clamped_alpha)
        return before, self.invert_charge(view.charged, synapse, view.reset_signal)

    def vjp_of_synapse(self, view: StepView, grad_synapse: Tensor, needed: Needed) -> Derivative:
        view.hand_down()  # if no gradient has come by way of the potential
        grad_alpha = None
        if needed[-1]:
            total = sum_to(grad_synapse * view.before[0], self.alpha)
            grad_alpha = total * slope_of_clamp(self.alpha)
        return (
            grad_synapse,
            (grad_synapse * self.clamped_alpha,),
            self.gradients(alpha=grad_alpha),
        )

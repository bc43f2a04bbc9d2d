"""A neuron with one membrane potential as a transition: charge, fire and reset, put together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .one_state_equations import OneStateEquations
from .scan import scan, vjp_of_scan
from .transition import (
    Derivative,
    Gradients,
    GraphNodes,
    KeptSequence,
    Needed,
    Scan,
    SequenceGradients,
    States,
    StepView,
)


class PlainParts:
    """A time step in plain torch code, see :class:`.transition.StepParts`."""

    __slots__ = ("_fired", "charged", "neuron", "reset_signal")

    def __init__(self, neuron: OneStateNeuron, x: Tensor, v: Tensor) -> None:
        self.neuron = neuron
        self.reset_signal = neuron.reset_signal_at(v)
        self.charged = neuron.charge(x, v, self.reset_signal)
        self._fired: Tensor | None = None

    def fire(self) -> tuple[Tensor, Tensor]:
        self._fired = self.neuron.fires(self.charged, out=self._spare())
        return self._fired, self.neuron.spikes(self._fired)

    def _spare(self) -> Tensor | None:
        """Memory of the spikes' shape and dtype that is not read any more: where the charge was the
        reset, that of the reset signal."""
        signal, charged = self.reset_signal, self.charged
        if signal is None or self.neuron.nodes is not GraphNodes.FIRE:
            return None
        fits = signal.shape == charged.shape and signal.stride() == charged.stride()
        same = signal.dtype == self.neuron.surrogate.dtype_of_spikes(charged)
        return signal if fits and same else None

    def states(self) -> States:
        if self.neuron.nodes is GraphNodes.FIRE:
            return (self.charged,)
        return (self.neuron.reset(self.charged, self._fired, self.reset_signal),)


@dataclass(eq=False)
class OneStateNeuron(OneStateEquations):
    """A neuron whose only state is its membrane potential; all here follows from its equations."""

    @property
    def spikes_carry_gradient(self) -> bool:
        return self.surrogate.differentiable

    def begin(self, x: Tensor, states: States) -> PlainParts:
        return PlainParts(self, x, states[0])

    def again(self, view: StepView, states: States) -> tuple[Tensor, States]:
        charged = self.charge(view.current, states[0], view.reset_signal)
        return charged, self.states_of(charged, view)

    def states_of(self, charged: Tensor, view: StepView) -> States:
        if self.reset_keeps_charged:
            return (charged,)
        return (self.reset(charged, view.fired, view.reset_signal),)

    def charged_of(self, view: StepView) -> Tensor:
        if view.invertible or self.reset_keeps_charged:
            return self.invert_reset(view.after[0], view.packed)
        return self.charge(view.current, view.before[0], view.reset_signal)

    def invert(self, view: StepView) -> States:
        return (self.invert_charge(view.charged, view.current, view.reset_signal),)

    def vjp(
        self, view: StepView, grad_outputs: Tensor | None, grad_states: Gradients, needed: Needed
    ) -> Derivative:
        view.hand_down()  # first: what reversing takes is released before the gradients come
        grad_x, grad_v, grads = self.gradient(grad_outputs, grad_states[0], view, needed)
        return grad_x, (grad_v,), grads

    def vjp_of_charge(self, view: StepView, grad_charged: Tensor, needed: Needed) -> Derivative:
        view.hand_down()
        grad_x, grad_v, grads = self.gradient_of_charge(grad_charged, view, needed)
        return grad_x, (grad_v,), grads

    def vjp_of_fire(
        self, view: StepView, grad_outputs: Tensor, needed: Needed
    ) -> tuple[Tensor, Gradients]:
        return self.gradient_of_fire(grad_outputs, view, needed)

    def vjp_of_reset(
        self, view: StepView, grad_states: Gradients, needed: Needed
    ) -> tuple[Tensor, Tensor | None, Gradients]:
        return self.gradient_of_reset(grad_states[0], view, needed)

    def scan(
        self, inputs: Tensor, states: States, keep_charged: bool = False, with_path: bool = False
    ) -> Scan:
        return scan(self, inputs, states[0], keep_charged, with_path)

    def vjp_of_scan(
        self, kept: KeptSequence, gradients: SequenceGradients, needed: Needed
    ) -> Derivative:
        return vjp_of_scan(self, kept, gradients, needed)

"""Neurons with one membrane potential: charge, fire and reset, put together to a transition.

    charge      h = charge(x, v)
    fire        s = H(h - threshold)
    reset       v' = reset(h, s)

and backwards in time, given the spikes:

    h = invert_reset(v', s)        where the reset loses nothing
    v = invert_charge(h, x)

A subclass gives these five equations and the derivatives of charge, fire and reset; everything here
follows from them. Each expression is the host's own, in the host's order of operations and with its
mixture of dtypes, because spikes have to agree bit for bit.

A subtractive (soft) reset can be inverted. A hard reset forgets ``h`` where the neuron fired:
``invertible`` is False there, and potentials are rebuilt forward from an earlier one. The inverse
divides by the decay ``a < 1``, so a rounding error grows by ``1/a`` per step; ``bptt/anchors.py``
bounds it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..packed.spikes import PackedSpikes
from .scan import scan, vjp_of_scan
from .surrogate import AnySurrogate
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
    Transition,
    add,
    add_gradients,
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
class OneStateNeuron(Transition):
    """A neuron whose only state is its membrane potential."""

    surrogate: AnySurrogate

    reset_keeps_charged = False  # whether the potential after a step is the charged one

    def __post_init__(self) -> None:
        self.note_versions()

    # -------------------------------------------------------------------------------- equations

    def charge(
        self, x: Tensor, v: Tensor, signal: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """The charged potential.

        Args:
            signal: what a delayed reset acts on, see :meth:`reset_signal_at`.
            out: where it may be written; it may be ``x``.
        """
        raise NotImplementedError

    def fires(self, h: Tensor, out: Tensor | None = None) -> Tensor:
        """Ones where a charged potential is over the threshold, zeros elsewhere. No gradient."""
        return self.surrogate.fires(h, self.threshold, out)

    def spikes(self, fired: Tensor) -> Tensor:
        """Spikes as the host gives them out, from zeros and ones."""
        return fired

    def reset_signal_at(self, v: Tensor) -> Tensor | None:
        """Ones where ``v`` is over the threshold, if a delayed reset acts on that. No gradient."""
        return None

    def reset(self, h: Tensor, fired: Tensor, signal: Tensor | None) -> Tensor:
        """The potential after the reset."""
        raise NotImplementedError

    def invert_reset(self, v: Tensor, fired: PackedSpikes) -> Tensor:
        """The charged potential from the one after the reset."""
        raise NotImplementedError

    def invert_charge(self, h: Tensor, x: Tensor, signal: Tensor | None) -> Tensor:
        """The potential before the charge."""
        raise NotImplementedError

    def recover_current(self, h: Tensor, v: Tensor, signal: Tensor | None) -> Tensor:
        """The current that charged ``v`` to ``h``, to rounding."""
        raise NotImplementedError

    def gradient_of_charge(
        self, grad_h: Tensor, view: StepView, needed: Needed, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        """The gradients at the current, at the potential before and at the parameters.

        Args:
            out: where the gradient at the current may be written.
        """
        raise NotImplementedError

    def gradient_of_fire(
        self, grad_spikes: Tensor, view: StepView, needed: Needed
    ) -> tuple[Tensor, Gradients]:
        """The gradients at the charged potential and at the parameters."""
        raise NotImplementedError

    def gradient_of_reset(
        self, grad_v: Tensor, view: StepView, needed: Needed
    ) -> tuple[Tensor, Tensor | None, Gradients]:
        """The gradients at the charged potential, at the spikes and at the parameters."""
        raise NotImplementedError

    def gradient(
        self,
        grad_spikes: Tensor | None,
        grad_v: Tensor | None,
        view: StepView,
        needed: Needed,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Gradients]:
        """The derivative of the whole step: reset, fire and charge, from the last to the first.

        Args:
            out: where the gradient at the current may be written; it may be the charged potential,
                which is not read again.
        """
        grad_h, totals = None, (None,) * len(needed)
        if grad_v is not None:
            grad_h, through_spikes, totals = self.gradient_of_reset(grad_v, view, needed)
            if through_spikes is not None:
                grad_spikes = (
                    through_spikes if grad_spikes is None else grad_spikes + through_spikes
                )
        if grad_spikes is not None:
            grad_z, grads = self.gradient_of_fire(grad_spikes, view, needed)
            grad_h = grad_z if grad_h is None else add(grad_z, grad_h)
            totals = add_gradients(totals, grads)
        grad_x, grad_before, grads = self.gradient_of_charge(grad_h, view, needed, out)
        return grad_x, grad_before, add_gradients(totals, grads)

    def on_meta(self) -> OneStateNeuron:
        """The same neuron over tensors without memory, which give shapes and strides alone."""
        return self.with_parameters([each.detach().to("meta") for each in self.parameters])

    # ------------------------------------------------------------------------------- transition

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

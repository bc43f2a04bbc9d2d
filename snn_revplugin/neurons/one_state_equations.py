"""The equations of a neuron with one membrane potential, which a subclass gives.

    charge      h = charge(x, v)
    fire        s = H(h - threshold)
    reset       v' = reset(h, s)

and backwards in time, given the spikes:

    h = invert_reset(v', s)        where the reset loses nothing
    v = invert_charge(h, x)

Each expression is the host's own, in the host's order of operations and with its mixture of dtypes,
because spikes have to agree bit for bit.

A subtractive (soft) reset can be inverted. A hard reset forgets ``h`` where the neuron fired:
``invertible`` is False there, and potentials are rebuilt forward from an earlier one. The inverse
divides by the decay ``a < 1``, so a rounding error grows by ``1/a`` per step; ``bptt/anchors.py``
bounds it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..packed.spikes import PackedSpikes
from .surrogate import AnySurrogate
from .transition import Gradients, Needed, StepView, Transition, add, add_gradients


@dataclass(eq=False)
class OneStateEquations(Transition):
    """Charge, fire and reset, their inverse and their derivatives."""

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

    def on_meta(self) -> OneStateEquations:
        """The same neuron over tensors without memory, which give shapes and strides alone."""
        return self.with_parameters([each.detach().to("meta") for each in self.parameters])

"""SpikingJelly's integrate-and-fire neurons: IF, LIF and the LIF that learns its time constant."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..packed.spikes import PackedSpikes
from .transition import Derivative, Dynamics, Gradients, Learned, StepView


@dataclass(eq=False)
class IntegrateAndFire(Dynamics):
    """SpikingJelly's ``IFNode``, and the fire and reset of all its neurons.

        h = v + x
        s = H(h - theta)
        v' = h - theta s                        soft reset, ``v_reset`` None
        v' = s v_reset + (1 - s) h              hard reset

    with ``H(0) = 1``. ``detach_reset`` keeps the gradient from flowing through the ``s`` of the
    reset.
    """

    threshold: float
    v_reset: float | None
    detach_reset: bool = False
    in_parts: bool = field(
        default=False, kw_only=True
    )  # True for SpikingJelly 0.0.0.0.14, whose spikes reset the potential

    decay = 1.0

    @property
    def invertible(self) -> bool:
        return self.v_reset is None

    @property
    def thresholds(self) -> tuple[float, float]:
        """The smallest and the largest threshold of any neuron, as magnitudes."""
        return abs(self.threshold), abs(self.threshold)

    @property
    def rest(self) -> float:
        """The potential that a leak decays to."""
        return 0.0 if self.v_reset is None else self.v_reset

    def charge(
        self, x: Tensor, v: Tensor, reset_signal: None = None, out: Tensor | None = None
    ) -> Tensor:
        return torch.add(v, x, out=out)

    def reset(self, h: Tensor, fired: Tensor, reset_signal: None = None) -> Tensor:
        if self.v_reset is None:
            return h - fired * self.threshold
        kept = (1.0 - fired).mul_(
            h
        )  # not where(fired, v_reset, h): like the host's, an infinite potential does not recover
        return kept.add_(fired * self.v_reset) if self.v_reset else kept

    def invert_reset(self, v: Tensor, fired: PackedSpikes) -> Tensor:
        return v + fired.binary(v.dtype) * self.threshold

    def invert_charge(self, h: Tensor, x: Tensor, reset_signal: None) -> Tensor:
        return h - x

    def fire_and_reset(self, h: Tensor, reset_signal: None = None) -> Tensor:
        if self.v_reset == 0:
            return self.surrogate.silent(h, self.threshold).mul_(h)
        return super().fire_and_reset(h)

    def gradient(
        self,
        grad_spikes: Tensor | None,
        grad_v: Tensor | None,
        view: StepView,
        learned: Learned,
        out: Tensor | None = None,
    ) -> Derivative:
        h = view.charged
        if grad_v is not None and not self.detach_reset:
            through_reset = grad_v * self._slope_of_reset(h)
            grad_spikes = through_reset if grad_spikes is None else through_reset.add_(grad_spikes)
        if grad_spikes is None:
            grad_h = grad_v if self.v_reset is None else grad_v * (1.0 - view.fired)
        else:
            grad_h = self.surrogate.gradient(grad_spikes, h - self.threshold)
            if grad_v is not None:
                grad_h = (
                    grad_h.add_(grad_v)
                    if self.v_reset is None
                    else grad_h.addcmul_(view.silent, grad_v)
                )
        return self.gradient_of_charge(grad_h, view, learned, out)

    def gradient_of_reset(
        self, grad_v: Tensor, view: StepView, learned: Learned
    ) -> tuple[Tensor, Tensor | None, Gradients]:
        through_reset = None if self.detach_reset else grad_v * self._slope_of_reset(view.charged)
        return (
            grad_v if self.v_reset is None else grad_v * view.silent,
            through_reset,
            (None,) * len(learned),
        )

    def gradient_of_fire(
        self, grad_spikes: Tensor, view: StepView, learned: Learned
    ) -> tuple[Tensor, Gradients]:
        return self.surrogate.gradient(grad_spikes, view.charged - self.threshold), (None,) * len(
            learned
        )

    def gradient_of_charge(
        self, grad_h: Tensor, view: StepView, learned: Learned, out: Tensor | None = None
    ) -> Derivative:
        return grad_h, grad_h, ()

    def _slope_of_reset(self, h: Tensor) -> Tensor | float:
        """The derivative of the reset by the spikes."""
        return -self.threshold if self.v_reset is None else self.v_reset - h


@dataclass(eq=False)
class LeakyIntegrateAndFire(IntegrateAndFire):
    """SpikingJelly's ``LIFNode``.

        h = v + (x - (v - v_rest)) / tau        ``decay_input``
        h = v - (v - v_rest) / tau + x          otherwise

    with ``v_rest = v_reset``, or 0 for a soft reset; fire and reset as in
    :class:`IntegrateAndFire`. SpikingJelly 0.0.0.0.14 has the second as ``(1 - 1 / tau) v + x``
    where ``v_rest`` is 0, which rounds in another way: ``by_factor``.
    """

    tau: float = 2.0
    decay_input: bool = True
    by_factor: bool = field(default=False, kw_only=True)

    @property
    def decay(self) -> float:
        return 1 - 1 / self.tau

    def leak(self, difference: Tensor, out: Tensor | None = None) -> Tensor:
        """A difference of potentials, times the rate at which it decays."""
        if difference.device.type == "cuda" and difference.dtype is torch.float32:
            # The host's kernel divides; torch would multiply with the rounded reciprocal of a
            # Python number.
            return torch.div(
                difference, torch.full((), self.tau, device=difference.device), out=out
            )
        return torch.div(difference, self.tau, out=out)

    def charge(
        self, x: Tensor, v: Tensor, reset_signal: None = None, out: Tensor | None = None
    ) -> Tensor:
        above = v - self.rest if self.rest else v
        if self.decay_input:
            return torch.add(v, self.leak(torch.sub(x, above, out=out), out), out=out)
        if self.multiplies:
            return torch.add(self.left_of(v), x, out=out)
        return torch.add(v - self.leak(above), x, out=out)

    @property
    def multiplies(self) -> bool:
        """Whether the potential is multiplied with what the leak leaves of it."""
        return self.by_factor and not self.decay_input and not self.rest

    def left_of(self, v: Tensor) -> Tensor:
        """What the leak leaves of a potential, where it is multiplied."""
        return v * self.decay

    def invert_charge(self, h: Tensor, x: Tensor, reset_signal: None) -> Tensor:
        rest = self.rest
        if self.decay_input:
            return (h - self.leak(x + rest)) / self.decay
        return (
            (h - x - self.leak(torch.full_like(h, rest))) / self.decay
            if rest
            else (h - x) / self.decay
        )

    def gradient_of_charge(
        self, grad_h: Tensor, view: StepView, learned: Learned, out: Tensor | None = None
    ) -> Derivative:
        leaked = self.leak(grad_h, out if self.decay_input else None)
        return leaked if self.decay_input else grad_h, grad_h - leaked, ()


@dataclass(eq=False)
class ParametricLeakyIntegrateAndFire(LeakyIntegrateAndFire):
    """SpikingJelly's ``ParametricLIFNode``: a LIF neuron that learns ``1/tau = sigmoid(w)``, one
    ``w`` a layer.

    Source: Fang et al., 'Incorporating Learnable Membrane Time Constant to Enhance Learning of
    SNNs' (ICCV 2021).
    """

    w: Tensor = None

    @property
    def gradient_reads_current(self) -> bool:
        return self.decay_input and self.w.requires_grad

    @property
    def gradient_reads_before(self) -> bool:
        return self.w.requires_grad

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.w,)

    @property
    def rate(self) -> Tensor:
        """``1/tau``"""
        return self.w.sigmoid()

    @cached_property
    def decay(self) -> float:
        return 1 - self.rate.item()

    def leak(self, difference: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mul(difference, self.rate, out=out)

    def left_of(self, v: Tensor) -> Tensor:
        return v * (1.0 - self.rate)

    def gradient_of_charge(
        self, grad_h: Tensor, view: StepView, learned: Learned, out: Tensor | None = None
    ) -> Derivative:
        grad_w = None
        if learned[0]:
            if not self.decay_input:
                grad_rate = (grad_h * (self.rest - view.before)).sum()
            elif view.current is None:  # h - v = rate (x - (v - v_rest))
                grad_rate = (grad_h * (view.charged - view.before)).sum() / self.rate
            else:  # a rate of 1/50 would magnify the rounding of a reversed v
                grad_rate = (grad_h * (view.current - (view.before - self.rest))).sum()
            grad_w = (grad_rate * self.rate * (1 - self.rate)).to(self.w.dtype)
        grad_x, grad_before, _ = super().gradient_of_charge(grad_h, view, learned, out)
        return grad_x, grad_before, (grad_w,)

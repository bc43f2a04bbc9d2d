"""snnTorch's leaky integrate-and-fire neuron."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..packed.spikes import PackedSpikes
from ..torch_internals import capture
from .transition import Derivative, Dynamics, Gradients, Learned, StepView, _both, _sum, _sum_to


@dataclass(eq=False)
class Leaky(Dynamics):
    r"""snnTorch's leaky integrate-and-fire neuron, ``snntorch.Leaky``.

        r = H(v - theta), detached              the reset that the last step left to do h = beta v +
        x - theta r                reset 'subtract' h = beta (1 - r) v + x                  reset
        'zero' h = beta v + x                          reset 'none' s = H(h - theta),  spikes =
        factor s v' = h                                  delayed v' = h - d theta  or  h - d h
        at once ('subtract', 'zero'), d = s - r, not detached

    with H strict and beta clamped to [0, 1]. ``beta``, ``threshold`` and ``factor`` are scalars or
    tensors that broadcast with the current.
    """

    beta: Tensor
    threshold: Tensor
    factor: Tensor
    reset_kind: str  # 'subtract', 'zero', 'none'
    delayed: bool = True
    graded: bool = True  # False where the factor is a constant one

    in_parts = True
    gradient_reads_before = True

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return self.beta, self.threshold, self.factor

    @property
    def spikes_carry_gradient(self) -> bool:
        return self.surrogate.differentiable or (self.graded and self.factor.requires_grad)

    @property
    def graded_factor(self) -> Tensor | None:
        return self.factor.detach() if self.graded else None

    @property
    def invertible(self) -> bool:
        return self.reset_kind == "none" or (self.delayed and self.reset_kind == "subtract")

    @property
    def has_reset_signal(self) -> bool:
        return self.reset_kind != "none"

    @property
    def charged_is_kept(self) -> bool:
        return self.delayed or self.reset_kind == "none"

    @cached_property
    def slope_of_clamp(self) -> Tensor:
        """The derivative of the clamp of beta, by autograd: torch releases differ in what it is at
        0 and 1."""
        with torch.enable_grad():
            beta = self.beta.detach().requires_grad_()
            return torch.autograd.grad(beta.clamp(0, 1).sum(), beta)[0]

    @property
    def reset_needs_signal(self) -> bool:
        return not self.charged_is_kept

    @cached_property
    def thresholds(self) -> tuple[float, float]:
        least, most = self.threshold.detach().abs().aminmax()
        return least.item(), most.item()

    @property
    def decays(self) -> Tensor:
        """beta as it acts, for use with gradients and without."""
        return self.beta.clamp(0, 1) if torch.is_grad_enabled() else self.clamped_beta

    @cached_property
    def clamped_beta(self) -> Tensor:
        beta = self.beta.detach()
        clamped = beta.clamp(0, 1)
        asks = beta.device.type == "cpu" and capture.may_synchronise(
            beta
        )  # elsewhere asking would stall
        return beta if asks and (beta == clamped).all() else clamped

    @cached_property
    def decay(self) -> float:
        """The smallest decay of any neuron."""
        return self.clamped_beta.min().item()

    def spikes(self, fired: Tensor) -> Tensor:
        return fired * self.factor if self.graded else fired

    def reset_signal(self, v: Tensor) -> Tensor | None:
        return self.fires(v) if self.has_reset_signal else None

    def charge(
        self, x: Tensor, v: Tensor, reset_signal: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        if self.reset_kind == "zero":
            v = (1 - reset_signal) * v
        h = _sum(self.decays * v, x)
        if self.reset_kind != "subtract":
            return h
        if h.dtype == reset_signal.dtype == self.threshold.dtype:
            return h.addcmul_(
                reset_signal, self.threshold, value=-1
            )  # a product with zero or one does not round
        return h - reset_signal * self.threshold

    def reset(self, h: Tensor, fired: Tensor, reset_signal: Tensor | None = None) -> Tensor:
        if self.delayed or self.reset_kind == "none":
            return h
        due = self._due(fired, reset_signal)
        return h - due * (self.threshold if self.reset_kind == "subtract" else h)

    def _due(self, fired: Tensor, reset_signal: Tensor) -> Tensor:
        """What the reset at once still has to do: the spikes less those that the last step left to
        this one."""
        return (fired * self.factor) / self.factor - reset_signal

    def invert_reset(self, v: Tensor, fired: PackedSpikes) -> Tensor:
        return v

    def invert_charge(self, h: Tensor, x: Tensor, reset_signal: Tensor | None) -> Tensor:
        v = h - x
        if self.reset_kind == "subtract":
            v = (
                v.addcmul_(reset_signal, self.threshold)
                if v.dtype == reset_signal.dtype == self.threshold.dtype
                else v + reset_signal * self.threshold
            )
        return v.div_(self.decays)

    def gradient(
        self,
        grad_spikes: Tensor | None,
        grad_v: Tensor | None,
        view: StepView,
        learned: Learned,
        out: Tensor | None = None,
    ) -> Derivative:
        grad_h, totals = None, (None,) * len(learned)
        if grad_v is not None:
            grad_h, through_spikes, totals = self.gradient_of_reset(grad_v, view, learned)
            if through_spikes is not None:
                grad_spikes = (
                    through_spikes if grad_spikes is None else grad_spikes + through_spikes
                )
        if grad_spikes is not None:
            grad_z, grads = self.gradient_of_fire(grad_spikes, view, learned)
            grad_h = grad_z if grad_h is None else _sum(grad_z, grad_h)
            totals = _both(totals, grads)
        grad_x, grad_before, grads = self.gradient_of_charge(grad_h, view, learned, out)
        return grad_x, grad_before, _both(totals, grads)

    def gradient_of_reset(
        self, grad_v: Tensor, view: StepView, learned: Learned
    ) -> tuple[Tensor, Tensor | None, Gradients]:
        if not self.reset_needs_signal:
            return grad_v, None, (None, None, None)
        # The casts here and below are the host's: its spikes and resets may be float32 next to a
        # float64 potential.
        due = self._due(view.fired, view.reset_signal)
        by = self.threshold if self.reset_kind == "subtract" else view.charged
        grad_product = -grad_v.to(torch.result_type(due, by))
        grad_h, grad_threshold, grad_factor = grad_v, None, None
        if self.reset_kind == "zero":
            grad_h = grad_v + grad_product * due
        elif learned[1]:
            grad_threshold = _sum_to(grad_product * due, self.threshold)
        grad_due = (grad_product * by).to(due.dtype)
        if learned[2]:
            grad_factor = _sum_to(
                -grad_due * (self.spikes(view.fired) / self.factor / self.factor), self.factor
            )
        return grad_h, grad_due / self.factor, (None, grad_threshold, grad_factor)

    def gradient_of_fire(
        self, grad_spikes: Tensor, view: StepView, learned: Learned
    ) -> tuple[Tensor, Gradients]:
        h = view.charged
        grad_binary = grad_spikes * self.factor if self.graded else grad_spikes
        # The host rounds to the dtype that its surrogate's spikes have.
        grad_binary = grad_binary.to(self.surrogate.dtype_of_spikes(h))
        grad_z = self.surrogate.gradient(grad_binary, h - self.threshold)
        grad_threshold = _sum_to(-grad_z, self.threshold) if learned[1] else None
        grad_factor = _sum_to(grad_spikes * view.fired, self.factor) if learned[2] else None
        return grad_z, (None, grad_threshold, grad_factor)

    def gradient_of_charge(
        self, grad_h: Tensor, view: StepView, learned: Learned, out: Tensor | None = None
    ) -> Derivative:
        grad_beta = grad_threshold = None
        if self.reset_kind == "subtract" and learned[1]:
            # The host multiplies the signal with the threshold, in their dtype, before it
            # subtracts.
            product = torch.result_type(view.reset_signal, self.threshold)
            grad_threshold = _sum_to(-grad_h.to(product) * view.reset_signal, self.threshold)
        if learned[0]:
            v = view.before
            if self.reset_kind == "zero":
                v = (1 - view.reset_signal) * v
            grad_beta = _sum_to(grad_h * v, self.beta) * self.slope_of_clamp
        grad_before = grad_h * self.decays
        if self.reset_kind == "zero":
            grad_before = grad_before * (1 - view.reset_signal)
        return grad_h, grad_before, (grad_beta, grad_threshold, None)

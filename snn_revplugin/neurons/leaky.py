"""snnTorch's leaky integrate-and-fire neuron, ``snntorch.Leaky``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..packed.spikes import PackedSpikes
from ..torch_internals import capture
from .kernel_limits import why_tensors_need_plain_code
from .kernel_spec import KernelNumbers, KernelSpec
from .one_state import OneStateNeuron
from .transition import Gradients, GraphNodes, Needed, States, StepView, add, sum_to


@dataclass(eq=False)
class Leaky(OneStateNeuron):
    r"""snnTorch's leaky integrate-and-fire neuron, ``snntorch.Leaky``.

        r = H(v - theta), detached       the reset that the step before left to this one
        h = beta v + x - theta r         reset 'subtract'
        h = beta (1 - r) v + x           reset 'zero'
        h = (1 - r)(beta v + x)          reset 'clear', of ``Synaptic`` and ``Lapicque``
        h = beta v + x                   reset 'none'
        s = H(h - theta)                 the output is factor * s
        v' = h                           delayed reset
        v' = h - d theta                 immediate reset 'subtract', d = s - r, not detached
        v' = h - d h                     immediate reset 'zero' or 'clear'

    with H strict and beta clamped to [0, 1]. ``beta``, ``threshold`` and ``factor`` are scalars or
    tensors that broadcast with the current.
    """

    beta: Tensor
    threshold: Tensor
    factor: Tensor
    reset_kind: str  # 'subtract', 'zero', 'clear', 'none'
    delayed: bool = True
    graded: bool = True  # False where the factor is a constant one

    reads_before = True
    parameter_names = ("beta", "threshold", "factor")

    @cached_property
    def nodes(self) -> GraphNodes:
        return GraphNodes.FIRE if self.reset_keeps_charged else GraphNodes.RESET

    @cached_property
    def spikes_carry_gradient(self) -> bool:
        return self.surrogate.differentiable or (self.graded and self.factor.requires_grad)

    @cached_property
    def graded_factor(self) -> Tensor | None:
        return self.factor.detach() if self.graded else None

    @cached_property
    def invertible(self) -> bool:
        return self.reset_kind == "none" or (self.delayed and self.reset_kind == "subtract")

    @cached_property
    def has_reset_signal(self) -> bool:
        return self.reset_kind != "none"

    @property
    def reset_follows_spikes(self) -> bool:
        return self.delayed

    @cached_property
    def reset_keeps_charged(self) -> bool:
        return self.delayed or self.reset_kind == "none"

    @property
    def single_steps_only(self) -> bool:
        return not self.reset_keeps_charged

    @cached_property
    def slope_of_clamp(self) -> Tensor:
        """The derivative of the clamp of beta."""
        return slope_of_clamp(self.beta)

    @cached_property
    def thresholds(self) -> tuple[float, float]:
        """The smallest and the largest threshold of any neuron, as magnitudes."""
        return self._bounds[:2]

    @property
    def decays(self) -> Tensor:
        """beta as it acts, for use with gradients and without."""
        return self.beta.clamp(0, 1) if torch.is_grad_enabled() else self.clamped_beta

    @cached_property
    def clamped_beta(self) -> Tensor:
        return clamped(self.beta)

    @cached_property
    def decay(self) -> float:
        """The smallest decay of any neuron."""
        return self._bounds[2]

    @cached_property
    def _bounds(self) -> tuple[float, float, float]:
        """The smallest and the largest threshold, and the smallest decay. They are read at once:
        another device than a CPU is waited for once."""
        least, most = self.threshold.detach().abs().aminmax()
        bounds = least, most, self.clamped_beta.min()
        if self.threshold.device != self.beta.device:
            return tuple(each.item() for each in bounds)
        dtype = torch.promote_types(self.threshold.dtype, self.beta.dtype)
        return tuple(capture.numbers(torch.stack([each.to(dtype) for each in bounds])))

    def spikes(self, fired: Tensor) -> Tensor:
        return fired * self.factor if self.graded else fired

    def reset_signal_at(self, v: Tensor) -> Tensor | None:
        return self.fires(v) if self.has_reset_signal else None

    def charge(
        self, x: Tensor, v: Tensor, signal: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        if self.reset_kind == "zero":
            v = (1 - signal) * v
        h = add(self.decays * v, x)
        if self.reset_kind == "clear":
            return self.cleared(h, signal)
        if self.reset_kind != "subtract":
            return h
        if h.dtype == signal.dtype == self.threshold.dtype:
            # A product with zero or one does not round.
            return h.addcmul_(signal, self.threshold, value=-1)
        return h - signal * self.threshold

    def cleared(self, h: Tensor, signal: Tensor) -> Tensor:
        """What the reset 'clear' leaves of a charged potential."""
        return h - signal * h

    def reset(self, h: Tensor, fired: Tensor, signal: Tensor | None) -> Tensor:
        if self.reset_keeps_charged:
            return h
        due = self._due(fired, signal)
        return h - due * (self.threshold if self.reset_kind == "subtract" else h)

    def _due(self, fired: Tensor, signal: Tensor) -> Tensor:
        """What an immediate reset has left to do: the spikes, less those that the charge of this
        step has reset already."""
        return (fired * self.factor) / self.factor - signal

    def invert_reset(self, v: Tensor, fired: PackedSpikes) -> Tensor:
        return v

    def invert_charge(self, h: Tensor, x: Tensor, signal: Tensor | None) -> Tensor:
        return self._undo_reset(h - x, signal).div_(self.decays)

    def recover_current(self, h: Tensor, v: Tensor, signal: Tensor | None) -> Tensor:
        if self.reset_kind == "zero":
            v = (1 - signal) * v
        return self._undo_reset(h - self.decays * v, signal)

    def _undo_reset(self, difference: Tensor, signal: Tensor | None) -> Tensor:
        if self.reset_kind != "subtract":
            return difference
        if difference.dtype == signal.dtype == self.threshold.dtype:
            return difference.addcmul_(signal, self.threshold)
        return difference + signal * self.threshold

    def gradient_of_reset(
        self, grad_v: Tensor, view: StepView, needed: Needed
    ) -> tuple[Tensor, Tensor | None, Gradients]:
        if self.reset_keeps_charged:
            return grad_v, None, self.gradients()
        # The casts here and below are the host's: its spikes and reset signals may be float32
        # beside a float64 potential.
        due = self._due(view.fired, view.reset_signal)
        by = self.threshold if self.reset_kind == "subtract" else view.charged
        grad_product = -grad_v.to(torch.result_type(due, by))
        grad_h, grad_threshold, grad_factor = grad_v, None, None
        if self.reset_kind != "subtract":
            grad_h = grad_v + grad_product * due
        elif needed[1]:
            grad_threshold = sum_to(grad_product * due, self.threshold)
        grad_due = (grad_product * by).to(due.dtype)
        if needed[2]:
            slope = self.spikes(view.fired) / self.factor / self.factor
            grad_factor = sum_to(-grad_due * slope, self.factor)
        grads = self.gradients(threshold=grad_threshold, factor=grad_factor)
        return grad_h, grad_due / self.factor, grads

    def gradient_of_fire(
        self, grad_spikes: Tensor, view: StepView, needed: Needed
    ) -> tuple[Tensor, Gradients]:
        h = view.charged
        grad_binary = grad_spikes * self.factor if self.graded else grad_spikes
        # The host rounds to the dtype that its surrogate's spikes have.
        dtype = self.surrogate.dtype_of_spikes(h)
        grad_binary = grad_binary if grad_binary.dtype is dtype else grad_binary.to(dtype)
        grad_z = self.surrogate.gradient(grad_binary, h - self.threshold)
        grad_threshold = sum_to(-grad_z, self.threshold) if needed[1] else None
        grad_factor = sum_to(grad_spikes * view.fired, self.factor) if needed[2] else None
        return grad_z, self.gradients(threshold=grad_threshold, factor=grad_factor)

    def gradient_of_charge(
        self, grad_h: Tensor, view: StepView, needed: Needed, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        grad_beta = grad_threshold = None
        if self.reset_kind == "clear":
            grad_h = grad_h * (1 - view.reset_signal)
        if self.reset_kind == "subtract" and needed[1]:
            # The host multiplies the signal with the threshold, in their dtype, and subtracts then.
            product = torch.result_type(view.reset_signal, self.threshold)
            grad_threshold = sum_to(-grad_h.to(product) * view.reset_signal, self.threshold)
        if needed[0]:
            v = view.before[-1]
            if self.reset_kind == "zero":
                v = (1 - view.reset_signal) * v
            grad_beta = sum_to(grad_h * v, self.beta) * self.slope_of_clamp
        grad_before = grad_h * self.decays
        if self.reset_kind == "zero":
            grad_before = grad_before * (1 - view.reset_signal)
        return grad_h, grad_before, self.gradients(beta=grad_beta, threshold=grad_threshold)

    def gradients(self, **given: Tensor | None) -> Gradients:
        """The gradients at the parameters, by their names; None for those that are not given."""
        return tuple(map(given.get, self.parameter_names))

    # ------------------------------------------------------------------------------- kernels

    def why_no_kernel(self, x: Tensor, states: States) -> str | None:
        return why_tensors_need_plain_code(self, x, states)

    def kernel_spec(self, x: torch.dtype, state: torch.dtype, on_cuda: bool) -> KernelSpec:
        """The dtypes follow from torch's promotion: the host's reset signals are float32 beside a
        float16 potential, and so is the potential from its second step on."""
        meets, promote = _meets, torch.promote_types
        surrogate = self.surrogate
        signal = state if surrogate.keeps_dtype else torch.float32
        left = promote(signal, state) if self.reset_kind == "zero" else state
        decayed = meets(left, self.beta)
        summed = promote(decayed, x)
        due = meets(signal, self.threshold)
        charged = promote(summed, due) if self.reset_kind == "subtract" else summed
        fired = charged if surrogate.keeps_dtype else torch.float32
        spikes = meets(fired, self.factor)
        still_due = promote(spikes, signal)
        subtracts = self.reset_kind == "subtract"
        product = meets(still_due, self.threshold) if subtracts else promote(still_due, charged)
        return KernelSpec(
            charge="leaky",
            reset=self.reset_kind,
            delayed=self.delayed,
            detached=self.delayed,
            surrogate=surrogate.name,
            strict=surrogate.strict,
            graded=self.graded,
            on_cuda=on_cuda,
            decay_held=_held(self.beta),
            threshold_held=_held(self.threshold),
            factor_held=_held(self.factor) if self.graded else "number",
            left=left,
            decayed=decayed,
            summed=summed,
            due=due,
            charged=charged,
            difference_before=meets(state, self.threshold),
            difference=meets(charged, self.threshold),
            spikes=spikes if self.graded else fired,
            product=product,
            after=charged if self.reset_keeps_charged else promote(charged, product),
        )

    def kernel_numbers(self, spec: KernelSpec) -> KernelNumbers:
        factor = self.factor.detach() if self.graded else 1.0
        return KernelNumbers(self.beta.detach(), self.threshold.detach(), factor)

    def gradients_from_kernel(self, sums: Sequence[Tensor | None]) -> Gradients:
        of_beta, *others = sums
        if of_beta is not None:
            of_beta = of_beta * self.slope_of_clamp
        totals = of_beta, *others
        return tuple(
            None if total is None else total.to(parameter.dtype)
            for total, parameter in zip(totals, self.parameters, strict=True)
        )

    def on_meta(self) -> Leaky:
        meta = super().on_meta()
        # Whether the clamp makes a new tensor depends on values, which a meta tensor has not.
        meta.clamped_beta = self.clamped_beta.to("meta")
        return meta


def clamped(decay: Tensor) -> Tensor:
    """A decay clamped to [0, 1], without a gradient: itself, where that is known to be so."""
    decay = decay.detach()
    result = decay.clamp(0, 1)
    # On another device the comparison would wait for it.
    return decay if capture.may_compare(decay) and (decay == result).all() else result


def slope_of_clamp(decay: Tensor) -> Tensor:
    """The derivative of the clamp of a decay to [0, 1]."""
    decay, (at_zero, at_one) = decay.detach(), _slopes_at_edges()
    inside = ((decay > 0) & (decay < 1)).to(decay.dtype)
    return (inside + (decay == 0) * at_zero + (decay == 1) * at_one).to(decay.dtype)


_SLOPES: list[float] = []


def _slopes_at_edges() -> list[float]:
    """The derivative of ``clamp(0, 1)`` at 0 and at 1, by autograd: torch releases differ in it.

    Inside an operator, where autograd records nothing, the kernels' self-test asks for it: any
    number will do.
    """
    if not _SLOPES:
        with torch.enable_grad():
            edges = torch.tensor([0.0, 1.0], device="cpu", requires_grad=True)
            clamped = edges.clamp(0, 1).sum()
            if not clamped.requires_grad:
                return [1.0, 1.0]
            _SLOPES.extend(torch.autograd.grad(clamped, edges)[0].tolist())
    return _SLOPES


def _meets(dtype: torch.dtype, parameter: Tensor) -> torch.dtype:
    return torch.promote_types(dtype, parameter.dtype) if parameter.dim() else dtype


def _held(parameter: Tensor) -> str:
    return "scalar" if parameter.numel() == 1 else "each"

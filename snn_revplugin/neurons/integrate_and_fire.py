"""SpikingJelly's integrate-and-fire neurons: IF, LIF, and the LIF that learns its time constant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..packed.spikes import PackedSpikes
from .kernel_limits import why_dtypes_differ, why_tensors_need_plain_code
from .kernel_spec import ROUNDINGS, KernelNumbers, KernelSpec
from .one_state import OneStateNeuron
from .transition import Gradients, GraphNodes, Needed, States, StepView


@dataclass(eq=False)
class IntegrateAndFire(OneStateNeuron):
    """SpikingJelly's ``IFNode``, and the fire and reset of all its neurons.

        h = v + x
        s = H(h - theta)
        v' = h - theta s                        soft reset, ``v_reset`` None
        v' = s v_reset + (1 - s) h              hard reset

    with ``H(0) = 1``. ``detach_reset`` keeps the gradient from flowing through the ``s`` of the
    reset. ``nodes`` is ``GraphNodes.RESET`` where the potential that the host gives out is computed
    from the spikes that it gives out. ``fused`` says that the host has a kernel of its own for the
    surrogate, which it takes for float32 on CUDA.
    """

    threshold: float
    v_reset: float | None
    detach_reset: bool = False
    nodes: GraphNodes = field(default=GraphNodes.ONE, kw_only=True)
    fused: bool = field(default=True, kw_only=True)

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

    def runs_fused(self, x: Tensor) -> bool:
        """Whether the host takes its own kernel for an input."""
        return self.fused and x.device.type == "cuda" and x.dtype is torch.float32

    def laid_out(self, outputs: Tensor, inputs: Tensor) -> Tensor:
        if not self.runs_fused(inputs) or inputs.is_contiguous():
            return outputs
        spikes = torch.empty_like(inputs, dtype=outputs.dtype)  # as the host's kernel does
        return outputs if spikes.stride() == outputs.stride() else spikes.copy_(outputs)

    def charge(
        self, x: Tensor, v: Tensor, signal: None = None, out: Tensor | None = None
    ) -> Tensor:
        return torch.add(v, x, out=out)

    def reset(self, h: Tensor, fired: Tensor, signal: None = None) -> Tensor:
        if self.v_reset is None:
            return h - fired * self.threshold
        # Not where(fired, v_reset, h): like the host's, an infinite potential does not recover.
        kept = torch.rsub(fired, 1.0).mul_(h)
        return kept.add_(fired * self.v_reset) if self.v_reset else kept

    def invert_reset(self, v: Tensor, fired: PackedSpikes) -> Tensor:
        return v + fired.binary(v.dtype) * self.threshold

    def invert_charge(self, h: Tensor, x: Tensor, signal: None = None) -> Tensor:
        return h - x

    def recover_current(self, h: Tensor, v: Tensor, signal: None = None) -> Tensor:
        return h - v

    def gradient(
        self,
        grad_spikes: Tensor | None,
        grad_v: Tensor | None,
        view: StepView,
        needed: Needed,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Gradients]:
        h = view.charged
        if grad_v is not None and not self.detach_reset:
            through_reset = grad_v * self._slope_of_reset(h)
            grad_spikes = through_reset if grad_spikes is None else through_reset.add_(grad_spikes)
        if grad_spikes is None:
            grad_h = grad_v if self.v_reset is None else grad_v * view.silent
        else:
            grad_h = self.surrogate.gradient(grad_spikes, h - self.threshold)
            if grad_v is not None and self.v_reset is None:
                grad_h = grad_h.add_(grad_v)
            elif grad_v is not None:
                grad_h = grad_h.addcmul_(view.silent, grad_v)
        return self.gradient_of_charge(grad_h, view, needed, out)

    def gradient_of_reset(
        self, grad_v: Tensor, view: StepView, needed: Needed
    ) -> tuple[Tensor, Tensor | None, Gradients]:
        through_reset = None if self.detach_reset else grad_v * self._slope_of_reset(view.charged)
        grad_h = grad_v if self.v_reset is None else grad_v * view.silent
        return grad_h, through_reset, (None,) * len(needed)

    def gradient_of_fire(
        self, grad_spikes: Tensor, view: StepView, needed: Needed
    ) -> tuple[Tensor, Gradients]:
        grad_h = self.surrogate.gradient(grad_spikes, view.charged - self.threshold)
        return grad_h, (None,) * len(needed)

    def gradient_of_charge(
        self, grad_h: Tensor, view: StepView, needed: Needed, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        return grad_h, grad_h, ()

    def _slope_of_reset(self, h: Tensor) -> Tensor | float:
        """The derivative of the reset by the spikes."""
        return -self.threshold if self.v_reset is None else torch.rsub(h, self.v_reset)

    # ------------------------------------------------------------------------------- kernels

    def why_no_kernel(self, x: Tensor, states: States) -> str | None:
        if self.nodes is not GraphNodes.ONE:
            return "there is no kernel for a step whose spikes reset the potential"
        return why_tensors_need_plain_code(self, x, states) or why_dtypes_differ(
            self, x, states, self.surrogate.keeps_dtype
        )

    def kernel_spec(self, x: torch.dtype, state: torch.dtype, on_cuda: bool) -> KernelSpec:
        return KernelSpec(
            reset="soft" if self.v_reset is None else "hard",
            detached=self.detach_reset,
            surrogate=self.surrogate.name,
            strict=self.surrogate.strict,
            to_zero=not self.v_reset,
            on_cuda=on_cuda,
            **dict.fromkeys(ROUNDINGS, x),
            **self.charge_spec(x, on_cuda),
        )

    def charge_spec(self, x: torch.dtype, on_cuda: bool) -> dict[str, object]:
        """The part of :meth:`kernel_spec` that the charge decides."""
        return {"charge": "integrate"}

    def kernel_numbers(self, spec: KernelSpec) -> KernelNumbers:
        return KernelNumbers(
            self._rate_of_kernel(spec),
            float(self.threshold),
            v_reset=float(self.v_reset or 0.0),
            rest=float(self.rest),
        )

    def _rate_of_kernel(self, spec: KernelSpec) -> Tensor | float:
        """The rate of the leak as the kernel takes it."""
        return 0.0


@dataclass(eq=False)
class LeakyIntegrateAndFire(IntegrateAndFire):
    """SpikingJelly's ``LIFNode``.

        h = v + (x - (v - v_rest)) / tau        ``decay_input``
        h = v - (v - v_rest) / tau + x          otherwise
        h = (1 - 1 / tau) v + x                 ``by_factor``, where v_rest is 0

    with ``v_rest = v_reset``, or 0 for a soft reset; fire and reset as in
    :class:`IntegrateAndFire`. The second and the third differ in their rounding alone.
    """

    tau: float = 2.0
    decay_input: bool = True
    by_factor: bool = field(default=False, kw_only=True)

    @property
    def decay(self) -> float:
        return 1 - 1 / self.tau

    def leak(self, difference: Tensor, out: Tensor | None = None) -> Tensor:
        """A difference of potentials, times the rate at which it decays."""
        if self.runs_fused(difference):
            # The host's kernel divides; torch multiplies with the rounded reciprocal of a Python
            # number, on CUDA.
            tau = torch.full((), self.tau, device=difference.device)
            return torch.div(difference, tau, out=out)
        return torch.div(difference, self.tau, out=out)

    def charge(
        self, x: Tensor, v: Tensor, signal: None = None, out: Tensor | None = None
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

    def invert_charge(self, h: Tensor, x: Tensor, signal: None = None) -> Tensor:
        rest = self.rest
        if self.decay_input:
            return (h - self.leak(x + rest)) / self.decay
        if rest:
            return (h - x - self.leak(torch.full_like(h, rest))) / self.decay
        return (h - x) / self.decay

    def recover_current(self, h: Tensor, v: Tensor, signal: None = None) -> Tensor:
        above = v - self.rest
        return (h - v) * self.tau + above if self.decay_input else h - v + self.leak(above)

    def gradient_of_charge(
        self, grad_h: Tensor, view: StepView, needed: Needed, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        leaked = self.leak(grad_h, out if self.decay_input else None)
        return leaked if self.decay_input else grad_h, grad_h - leaked, ()

    def why_no_kernel(self, x: Tensor, states: States) -> str | None:
        if self.multiplies:
            return "there is no kernel for a leak that multiplies"
        return super().why_no_kernel(x, states)

    def charge_spec(self, x: torch.dtype, on_cuda: bool) -> dict[str, object]:
        return {
            "charge": "decay_input" if self.decay_input else "decay",
            "rests": bool(self.rest),
            # torch divides by a number on a CPU; on CUDA it multiplies with the reciprocal, where
            # :meth:`leak` lets it. For a power of two, the product has the quotient's bits.
            "divides": (
                (not on_cuda or (self.fused and x is torch.float32))
                and math.frexp(self.tau)[0] != 0.5
            ),
        }

    def _rate_of_kernel(self, spec: KernelSpec) -> Tensor | float:
        """tau where the kernel divides by it, else its reciprocal in float32."""
        if spec.divides:
            return float(self.tau)
        return float(np.float32(1) / np.float32(self.tau))


@dataclass(eq=False)
class ParametricLeakyIntegrateAndFire(LeakyIntegrateAndFire):
    """SpikingJelly's ``ParametricLIFNode``: a LIF neuron that learns ``1/tau = sigmoid(w)``, one
    ``w`` per layer.

    Source: Fang et al., 'Incorporating Learnable Membrane Time Constant to Enhance Learning of
    SNNs' (ICCV 2021).
    """

    w: Tensor = None

    parameter_names = ("w",)

    @property
    def reads_input(self) -> bool:
        return self.decay_input

    @property
    def reads_before(self) -> bool:
        return self.w.requires_grad

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

    def recover_current(self, h: Tensor, v: Tensor, signal: None = None) -> Tensor:
        above = v - self.rest
        return (h - v) / self.rate + above if self.decay_input else h - v + self.leak(above)

    def gradient_of_charge(
        self, grad_h: Tensor, view: StepView, needed: Needed, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        grad_w = None
        if needed[0]:
            # Both without a quotient by the rate, which may be as small as float32 has numbers.
            (before,) = view.before
            driven = self.rest - before
            if self.decay_input:
                driven = view.current + driven
            rate = self.rate
            grad_w = ((grad_h * driven).sum() * rate * (1 - rate)).to(self.w.dtype)
        grad_x, grad_before, _ = super().gradient_of_charge(grad_h, view, needed, out)
        return grad_x, grad_before, (grad_w,)

    def charge_spec(self, x: torch.dtype, on_cuda: bool) -> dict[str, object]:
        return super().charge_spec(x, on_cuda) | {"divides": False, "decay_held": "scalar"}

    def _rate_of_kernel(self, spec: KernelSpec) -> Tensor | float:
        return self.rate.detach()

    def gradients_from_kernel(self, sums: Sequence[Tensor | None]) -> Gradients:
        (total, *_), rate = sums, self.rate.detach()
        return (None if total is None else (total * rate * (1 - rate)).to(self.w.dtype),)

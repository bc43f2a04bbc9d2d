"""A neuron's equations: charge, fire, reset, their inverse and their derivative. No autograd in here.

One time step takes the membrane potential ``v`` and the input current ``x`` to spikes ``s`` and the next potential:

    charge      h = charge(x, v)
    fire        s = H(h - threshold)
    reset       v' = reset(h, s)

and back again, given the spikes:

    unreset     h = unreset(v', s)                     where nothing was lost in the reset
    uncharge    v = uncharge(h, x)

:class:`Leaky` is snnTorch's neuron, whose reset waits for the next step's charge; :class:`IntegrateAndFire` and
:class:`LeakyIntegrateAndFire` are SpikingJelly's, which reset at once. Every expression is the host's own, in the host's
order of operations and with its mixture of dtypes, because spikes have to agree bit for bit. A subtractive (soft) reset can be
inverted; a hard reset forgets ``h`` where the neuron fired, so there ``invertible`` is False and potentials are rebuilt
forward from an earlier one.

The inverse divides by the decay ``a < 1``, so a rounding error grows by ``1/a`` a step; :func:`steps_between_anchors`
says how many steps that may go on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from . import capture
from .spikes import PackedSpikes
from .surrogate import AnySurrogate
from .versioned import Versioned

Learned = tuple[bool, ...]  # which of a neuron's parameters need their gradients
Gradients = tuple[Tensor | None, ...]  # those of the parameters
Derivative = tuple[Tensor, Tensor, Gradients]  # the gradients at the current, at the potential before, at the parameters


class Moment(Protocol):
    """One time step as backward sees it: whatever of it a derivative needs, had when it is asked for."""

    @property
    def charged(self) -> Tensor: ...  # h, after charge and before reset
    @property
    def before(self) -> Tensor: ...  # v, the potential that the step started from
    @property
    def fired(self) -> Tensor: ...  # s
    @property
    def silent(self) -> Tensor: ...  # 1 - s; at a potential of NaN, either
    @property
    def resets(self) -> Tensor | None: ...  # a delayed reset's signal, see Leaky
    @property
    def current(self) -> Tensor | None: ...  # x, or None where it cannot be had


@dataclass(eq=False)
class Dynamics:
    """What the neurons below have in common: the step that fires. Instances are compared by identity: a chain of time steps
    goes on as long as its neuron hands in the same instance, so a change of parameters calls for a new one."""

    surrogate: AnySurrogate

    delayed = False  # whether a step's spikes reset the potential in the next step's charge
    has_resets = False  # whether resets() gives a signal at all
    reset_needs_resets = False  # whether reset() reads the signal of resets()
    in_parts = False  # whether the host's spikes, and a reset at once, hang on graph nodes of their own, in single steps
    gradient_reads_current = False  # whether gradient_of_charge() reads the current
    gradient_reads_before = False  # whether it reads the potential that the step started from
    charged_is_kept = False  # whether the potential after a step is the charged one
    graded_factor = None  # what multiplies the spikes
    fused = False  # whether these are kernels in the dynamics' place, see snn_revplugin.kernels

    def __post_init__(self) -> None:
        self._stretches: dict[tuple[float, int], int] = {}
        self._versions = [Versioned(each.detach()) for each in self.parameters]

    @property
    def spikes_carry_gradient(self) -> bool:
        return self.surrogate.differentiable

    def check_unchanged(self) -> None:
        """See that no parameter has been written into since these dynamics were made.

        Raises:
            RuntimeError: one has, between a forward and its backward.
        """
        for each in self._versions:
            each.get("a reversible neuron's gradient (its decay, threshold or factor)")

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors, learned or not, that the gradients of :meth:`gradient` are given for."""
        return ()

    def fires(self, h: Tensor, out: Tensor | None = None) -> Tensor:
        """Ones where a charged potential is over the threshold, zeros elsewhere. For use without gradients."""
        return self.surrogate.fires(h, self.threshold, out)

    def settle(self, h: Tensor, resets: Tensor | None = None) -> Tensor:
        """The potential after fire and reset, from the charged one alone. For use without gradients."""
        return self.reset(h, self.fires(h), resets)

    def spikes(self, fired: Tensor) -> Tensor:
        """Spikes as the host hands them out."""
        return fired

    def resets(self, v: Tensor) -> Tensor | None:
        """The signal by which a delayed reset remembers that ``v`` was over the threshold."""
        return None

    def step(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One time step: zeros and ones, the spikes that are made of them, ``h`` and ``v'``."""
        resets = self.resets(v)
        h = self.charge(x, v, resets)
        fired = self.fires(h)
        return fired, self.spikes(fired), h, self.reset(h, fired, resets)

    def gradient(
        self, grad_spikes: Tensor | None, grad_v: Tensor | None, moment: Moment, learned: Learned, out: Tensor | None = None
    ) -> Derivative:
        """The step's derivative, in closed form.

        Args:
            grad_spikes, grad_v: the gradients at what the step gave; not both None.
            learned: which of the parameters need theirs.
            out: where the gradient at the current may be written; it may hold ``h`` and is read no more afterwards.

        Returns:
            The gradients at the current, at the potential before, and at the parameters.
        """
        raise NotImplementedError

    def stretch(self, lost_bits: float, most: int) -> int:
        """The steps between two anchors, see :func:`steps_between_anchors`; read off the parameters once."""
        key = lost_bits, most
        if key not in self._stretches:
            self._stretches[key] = steps_between_anchors(self.decay, lost_bits, most)
        return self._stretches[key]


@dataclass(eq=False)
class Leaky(Dynamics):
    r"""snnTorch's leaky integrate-and-fire neuron, ``snntorch.Leaky``.

        r = H(v - theta), detached              the reset that the last step left to do
        h = beta v + x - theta r                reset 'subtract'
        h = beta (1 - r) v + x                  reset 'zero'
        h = beta v + x                          reset 'none'
        s = H(h - theta),  spikes = factor s
        v' = h                                  delayed
        v' = h - d theta  or  h - d h           at once ('subtract', 'zero'), d = s - r, not detached

    with H strict and beta clamped to [0, 1]. ``beta``, ``threshold`` and ``factor`` are scalars or tensors that broadcast
    with the current.
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
    def has_resets(self) -> bool:
        return self.reset_kind != "none"

    @property
    def charged_is_kept(self) -> bool:
        return self.delayed or self.reset_kind == "none"

    @cached_property
    def slope_of_clamp(self) -> Tensor:
        """The derivative of the clamp of beta, by autograd: torch releases differ in what it is at 0 and 1."""
        with torch.enable_grad():
            beta = self.beta.detach().requires_grad_()
            return torch.autograd.grad(beta.clamp(0, 1).sum(), beta)[0]

    @property
    def reset_needs_resets(self) -> bool:
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
        asks = beta.device.type == "cpu" and capture.may_ask(beta)  # elsewhere asking would stall
        return beta if asks and (beta == clamped).all() else clamped

    @cached_property
    def decay(self) -> float:
        """The smallest decay of any neuron."""
        return self.clamped_beta.min().item()

    def spikes(self, fired: Tensor) -> Tensor:
        return fired * self.factor if self.graded else fired

    def resets(self, v: Tensor) -> Tensor | None:
        return self.fires(v) if self.has_resets else None

    def charge(self, x: Tensor, v: Tensor, resets: Tensor | None, out: Tensor | None = None) -> Tensor:
        if self.reset_kind == "zero":
            v = (1 - resets) * v
        h = _sum(self.decays * v, x)
        if self.reset_kind != "subtract":
            return h
        if h.dtype == resets.dtype == self.threshold.dtype:
            return h.addcmul_(resets, self.threshold, value=-1)  # a product with zero or one does not round
        return h - resets * self.threshold

    def reset(self, h: Tensor, fired: Tensor, resets: Tensor | None = None) -> Tensor:
        if self.delayed or self.reset_kind == "none":
            return h
        due = self._due(fired, resets)
        return h - due * (self.threshold if self.reset_kind == "subtract" else h)

    def _due(self, fired: Tensor, resets: Tensor) -> Tensor:
        """What the reset at once still has to do: the spikes less those that the last step left to this one."""
        return (fired * self.factor) / self.factor - resets

    def unreset(self, v: Tensor, fired: PackedSpikes) -> Tensor:
        return v

    def uncharge(self, h: Tensor, x: Tensor, resets: Tensor | None) -> Tensor:
        v = h - x
        if self.reset_kind == "subtract":
            v = (
                v.addcmul_(resets, self.threshold)
                if v.dtype == resets.dtype == self.threshold.dtype
                else v + resets * self.threshold
            )
        return v.div_(self.decays)

    def gradient(
        self, grad_spikes: Tensor | None, grad_v: Tensor | None, moment: Moment, learned: Learned, out: Tensor | None = None
    ) -> Derivative:
        grad_h, totals = None, (None,) * len(learned)
        if grad_v is not None:
            grad_h, through_spikes, totals = self.gradient_of_reset(grad_v, moment, learned)
            if through_spikes is not None:
                grad_spikes = through_spikes if grad_spikes is None else grad_spikes + through_spikes
        if grad_spikes is not None:
            grad_z, grads = self.gradient_of_fire(grad_spikes, moment, learned)
            grad_h = grad_z if grad_h is None else _sum(grad_z, grad_h)
            totals = _both(totals, grads)
        grad_x, grad_before, grads = self.gradient_of_charge(grad_h, moment, learned, out)
        return grad_x, grad_before, _both(totals, grads)

    def gradient_of_reset(self, grad_v: Tensor, moment: Moment, learned: Learned) -> tuple[Tensor, Tensor | None, Gradients]:
        if not self.reset_needs_resets:
            return grad_v, None, (None, None, None)
        # The casts here and below are the host's: its spikes and resets may be float32 next to a float64 potential.
        due = self._due(moment.fired, moment.resets)
        by = self.threshold if self.reset_kind == "subtract" else moment.charged
        grad_product = -grad_v.to(torch.result_type(due, by))
        grad_h, grad_threshold, grad_factor = grad_v, None, None
        if self.reset_kind == "zero":
            grad_h = grad_v + grad_product * due
        elif learned[1]:
            grad_threshold = _sum_to(grad_product * due, self.threshold)
        grad_due = (grad_product * by).to(due.dtype)
        if learned[2]:
            grad_factor = _sum_to(-grad_due * (self.spikes(moment.fired) / self.factor / self.factor), self.factor)
        return grad_h, grad_due / self.factor, (None, grad_threshold, grad_factor)

    def gradient_of_fire(self, grad_spikes: Tensor, moment: Moment, learned: Learned) -> tuple[Tensor, Gradients]:
        h = moment.charged
        grad_binary = grad_spikes * self.factor if self.graded else grad_spikes
        # The host rounds to the dtype that its surrogate's spikes have.
        grad_binary = grad_binary.to(self.surrogate.dtype_of_spikes(h))
        grad_z = self.surrogate.gradient(grad_binary, h - self.threshold)
        grad_threshold = _sum_to(-grad_z, self.threshold) if learned[1] else None
        grad_factor = _sum_to(grad_spikes * moment.fired, self.factor) if learned[2] else None
        return grad_z, (None, grad_threshold, grad_factor)

    def gradient_of_charge(self, grad_h: Tensor, moment: Moment, learned: Learned, out: Tensor | None = None) -> Derivative:
        grad_beta = grad_threshold = None
        if self.reset_kind == "subtract" and learned[1]:
            # The host multiplies the signal with the threshold, in their dtype, before it subtracts.
            product = torch.result_type(moment.resets, self.threshold)
            grad_threshold = _sum_to(-grad_h.to(product) * moment.resets, self.threshold)
        if learned[0]:
            v = moment.before
            if self.reset_kind == "zero":
                v = (1 - moment.resets) * v
            grad_beta = _sum_to(grad_h * v, self.beta) * self.slope_of_clamp
        grad_before = grad_h * self.decays
        if self.reset_kind == "zero":
            grad_before = grad_before * (1 - moment.resets)
        return grad_h, grad_before, (grad_beta, grad_threshold, None)


@dataclass(eq=False)
class IntegrateAndFire(Dynamics):
    """SpikingJelly's ``IFNode``, and the fire and reset of all its neurons.

        h = v + x
        s = H(h - theta)
        v' = h - theta s                        soft reset, ``v_reset`` None
        v' = s v_reset + (1 - s) h              hard reset

    with ``H(0) = 1``. ``detach_reset`` keeps the gradient from flowing through the ``s`` of the reset.
    """

    threshold: float
    v_reset: float | None
    detach_reset: bool = False
    in_parts: bool = field(default=False, kw_only=True)  # True for SpikingJelly 0.0.0.0.14, whose spikes reset the potential

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

    def charge(self, x: Tensor, v: Tensor, resets: None = None, out: Tensor | None = None) -> Tensor:
        return torch.add(v, x, out=out)

    def reset(self, h: Tensor, fired: Tensor, resets: None = None) -> Tensor:
        if self.v_reset is None:
            return h - fired * self.threshold
        kept = (1.0 - fired).mul_(h)  # not where(fired, v_reset, h): like the host's, an infinite potential does not recover
        return kept.add_(fired * self.v_reset) if self.v_reset else kept

    def unreset(self, v: Tensor, fired: PackedSpikes) -> Tensor:
        return v + fired.binary(v.dtype) * self.threshold

    def uncharge(self, h: Tensor, x: Tensor, resets: None) -> Tensor:
        return h - x

    def settle(self, h: Tensor, resets: None = None) -> Tensor:
        if self.v_reset == 0:
            return self.surrogate.silent(h, self.threshold).mul_(h)
        return super().settle(h)

    def gradient(
        self, grad_spikes: Tensor | None, grad_v: Tensor | None, moment: Moment, learned: Learned, out: Tensor | None = None
    ) -> Derivative:
        h = moment.charged
        if grad_v is not None and not self.detach_reset:
            through_reset = grad_v * self._slope_of_reset(h)
            grad_spikes = through_reset if grad_spikes is None else through_reset.add_(grad_spikes)
        if grad_spikes is None:
            grad_h = grad_v if self.v_reset is None else grad_v * (1.0 - moment.fired)
        else:
            grad_h = self.surrogate.gradient(grad_spikes, h - self.threshold)
            if grad_v is not None:
                grad_h = grad_h.add_(grad_v) if self.v_reset is None else grad_h.addcmul_(moment.silent, grad_v)
        return self.gradient_of_charge(grad_h, moment, learned, out)

    def gradient_of_reset(self, grad_v: Tensor, moment: Moment, learned: Learned) -> tuple[Tensor, Tensor | None, Gradients]:
        through_reset = None if self.detach_reset else grad_v * self._slope_of_reset(moment.charged)
        return grad_v if self.v_reset is None else grad_v * moment.silent, through_reset, (None,) * len(learned)

    def gradient_of_fire(self, grad_spikes: Tensor, moment: Moment, learned: Learned) -> tuple[Tensor, Gradients]:
        return self.surrogate.gradient(grad_spikes, moment.charged - self.threshold), (None,) * len(learned)

    def gradient_of_charge(self, grad_h: Tensor, moment: Moment, learned: Learned, out: Tensor | None = None) -> Derivative:
        return grad_h, grad_h, ()

    def _slope_of_reset(self, h: Tensor) -> Tensor | float:
        """The derivative of the reset by the spikes."""
        return -self.threshold if self.v_reset is None else self.v_reset - h


@dataclass(eq=False)
class LeakyIntegrateAndFire(IntegrateAndFire):
    """SpikingJelly's ``LIFNode``.

        h = v + (x - (v - v_rest)) / tau        ``decay_input``
        h = v - (v - v_rest) / tau + x          otherwise

    with ``v_rest = v_reset``, or 0 for a soft reset; fire and reset as in :class:`IntegrateAndFire`. SpikingJelly 0.0.0.0.14
    has the second as ``(1 - 1 / tau) v + x`` where ``v_rest`` is 0, which rounds in another way: ``by_factor``.
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
            # The host's kernel divides; torch would multiply with the rounded reciprocal of a Python number.
            return torch.div(difference, torch.full((), self.tau, device=difference.device), out=out)
        return torch.div(difference, self.tau, out=out)

    def charge(self, x: Tensor, v: Tensor, resets: None = None, out: Tensor | None = None) -> Tensor:
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

    def uncharge(self, h: Tensor, x: Tensor, resets: None) -> Tensor:
        rest = self.rest
        if self.decay_input:
            return (h - self.leak(x + rest)) / self.decay
        return (h - x - self.leak(torch.full_like(h, rest))) / self.decay if rest else (h - x) / self.decay

    def gradient_of_charge(self, grad_h: Tensor, moment: Moment, learned: Learned, out: Tensor | None = None) -> Derivative:
        leaked = self.leak(grad_h, out if self.decay_input else None)
        return leaked if self.decay_input else grad_h, grad_h - leaked, ()


@dataclass(eq=False)
class ParametricLeakyIntegrateAndFire(LeakyIntegrateAndFire):
    """SpikingJelly's ``ParametricLIFNode``: a LIF neuron that learns ``1/tau = sigmoid(w)``, one ``w`` a layer.

    Source: Fang et al., 'Incorporating Learnable Membrane Time Constant to Enhance Learning of SNNs' (ICCV 2021).
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

    @property
    def decay(self) -> float:
        return 1 - self.rate.item()

    def leak(self, difference: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mul(difference, self.rate, out=out)

    def left_of(self, v: Tensor) -> Tensor:
        return v * (1.0 - self.rate)

    def gradient_of_charge(self, grad_h: Tensor, moment: Moment, learned: Learned, out: Tensor | None = None) -> Derivative:
        grad_w = None
        if learned[0]:
            if not self.decay_input:
                grad_rate = (grad_h * (self.rest - moment.before)).sum()
            elif moment.current is None:  # h - v = rate (x - (v - v_rest))
                grad_rate = (grad_h * (moment.charged - moment.before)).sum() / self.rate
            else:  # a rate of 1/50 would magnify the rounding of a reversed v
                grad_rate = (grad_h * (moment.current - (moment.before - self.rest))).sum()
            grad_w = (grad_rate * self.rate * (1 - self.rate)).to(self.w.dtype)
        grad_x, grad_before, _ = super().gradient_of_charge(grad_h, moment, learned, out)
        return grad_x, grad_before, (grad_w,)


def steps_between_anchors(decay: float, lost_bits: float, most: int) -> int:
    """How many steps a potential may be reversed before an anchor has to stop its rounding error.

    A step forward rounds once, and every step back multiplies what was rounded by ``1/a``. After K steps back the roundings
    of those steps, taken as independent, add up to ``sqrt(a**-2 + a**-4 + ... + a**-2K)`` of one; K is the largest for
    which that stays below ``2**lost_bits``.

    Args:
        decay: a, the smallest of the layer, in [0, 1].
        lost_bits: how many of the potential's mantissa bits rebuilding may cost.
        most: the largest K wanted.

    Returns:
        K, or 0 if not even one step can be taken back.

    >>> [steps_between_anchors(a, lost_bits=4, most=64) for a in (0.0, 0.5, 0.9, 0.95, 1.0)]
    [0, 3, 18, 31, 64]
    """
    if not decay > 1e-6:
        return 0
    growth, error, steps = decay**-2, 0.0, 0
    while steps < most:
        error = error * growth + growth
        if not (math.isfinite(error) and error <= 4.0**lost_bits):
            break
        steps += 1
    return steps


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """``a + b``, in place of ``a`` where that has the sum's shape and dtype."""
    return a.add_(b) if a.dtype == b.dtype and a.shape == b.shape else a + b


def _sum_to(grad: Tensor, parameter: Tensor) -> Tensor:
    """A gradient summed over whatever its parameter was broadcast along."""
    return grad.sum_to_size(parameter.shape).to(parameter.dtype)


def _both(totals: Gradients, grads: Gradients) -> Gradients:
    """Two sets of parameters' gradients, added."""
    return tuple(b if a is None else a if b is None else a + b for a, b in zip(totals, grads, strict=True))

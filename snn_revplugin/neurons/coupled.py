r"""The split-coupled reversible neuron: its step, its inverse and its derivative. No autograd in
here.

Input ``x``, potential ``v`` and output ``y`` are split in two halves along the feature dimension.
One time step:

    m1 = v1  + (x1 - v1) / tau      s1 = H(m1 - theta)    y1 = s1 + beta x2
    m2 = v1' + (y1 - v1') / tau     s2 = H(m2 - theta)    y2 = s2 + beta x1
    v1' = R(m1, s1) + alpha v2      v2' = R(m2, s2) + alpha v1

with ``R(m, s) = (1 - s) m + s v_reset``, or ``m - theta s`` for a soft reset. Outputs are
real-valued. Given the spike bits, which are kept and never decided again, the step runs backwards:

    x1 = (y2 - s2) / beta    v1 = (v2' - R(m2, s2)) / alpha    with m2 from y1 and v1' as above
    x2 = (y1 - s1) / beta    v2 = (v1' - R(m1, s1)) / alpha    with m1 from x1 and v1

Derivative, with ``g_`` for the gradient at a value and ``sg`` for the surrogate's derivative at ``m
- theta``:

    g_m2 = g_v2' dR/dm2 + (g_y2 + g_v2' dR/ds2) sg             (dR/ds is left out with detach_reset)
    G_v1 = g_v1' + (1 - 1/tau) g_m2                            all that reaches v1'
    G_y1 = g_y1  + g_m2 / tau                                  ... and y1
    g_m1 = G_v1 dR/dm1 + (G_y1 + G_v1 dR/ds1) sg
    g_x1 = g_m1 / tau + beta g_y2    g_v1 = (1 - 1/tau) g_m1 + alpha g_v2'
    g_x2 = beta G_y1                 g_v2 = alpha G_v1

**What training rebuilds, and why it does not run the inverse step after step.** Where nothing
fires, ``(v1', v2')`` is a linear map of ``(v1, v2)`` with determinant ``-alpha**2`` and a larger
eigenvalue ``rho`` (:attr:`Coupled.growth_forward`). So an error in the potentials grows by ``rho``
a step forwards and by ``rho / alpha**2`` backwards, which for alpha up to 1 is never less: at tau 2
and alpha 1/2 it does not grow forwards, and fourfold a step backwards. The inputs need no potential
at all: they follow from outputs and bits, each step by itself. So training inverts for inputs, and
scans forward for potentials.

**That scan is exact**, bit for bit, whatever alpha and however many steps. The only input that a
potential reads is ``x1``, and the step reads it as ``p = (1 + beta x1) - 1``, that is ``beta x1``
rounded as it stands beside a spike. Floating point takes that difference exactly, and ``1 + p``
again, so ``p`` comes back from ``y2 = s2 + p`` in every bit, with a spike or without.

Source: our reading of 'Towards Zero Memory Footprint Spiking Neural Network Training' (arXiv
2308.08649), whose abstract gives no equations; see docs/coupled.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..packed.spikes import PackedSpikes, to_binary
from .kernel_limits import why_dtypes_differ, why_tensors_need_plain_code
from .kernel_spec import ROUNDINGS, KernelSpec
from .surrogate import AnySurrogate, Surrogate
from .transition import (
    Derivative,
    Gradients,
    KeptSequence,
    Needed,
    Scan,
    SequenceGradients,
    States,
    StepView,
    Transition,
)

SMALLEST_ALPHA = (
    2.0**-6
)  # one step of the inverse loses about 2 log2(1 / alpha) bits: half of float32's 24 here
SMALLEST_BETA = (
    2.0**-12
)  # an input comes back from its output to 2**-24 / beta of a spike: half of float32's bits here
LARGEST_BETA = 2.0**12  # beyond it a spike next to the input that it is added to may be lost
FULL = (torch.float32, torch.float64)
ATAN = Surrogate("atan", (2.0,))
Pair = tuple[Tensor | None, Tensor | None]  # the two halves of a tensor
NEW: Pair = (None, None)  # no memory to write into


class CoupledParts:
    """A time step, see :class:`.transition.StepParts`; its one graph node takes it whole."""

    __slots__ = ("_step",)

    charged = reset_signal = None

    def __init__(self, step: tuple[Tensor, Tensor, Tensor | PackedSpikes]) -> None:
        self._step = step

    def fire(self) -> tuple[Tensor | PackedSpikes, Tensor]:
        outputs, _, fired = self._step
        return fired, outputs

    def states(self) -> States:
        return (self._step[1],)


@dataclass(frozen=True, eq=False)
class Coupled(Transition):
    """The neuron's equations.

    Args:
        tau: the membrane's time constant in steps, at least 1.
        alpha: how much of each half's potential the other half's goes on with. The potential of
            neurons that do not fire stays bounded up to ``1 / tau``; beyond it grows, see
            :attr:`growth_forward`.
        beta: how much of each half's input passes on into the other half's output.
        v_threshold: theta.
        v_reset: where a spike resets the potential to; None for a soft reset, which subtracts the
            threshold.
        detach_reset: whether the reset keeps the gradient from flowing through its spike.
        surrogate: the Heaviside step and its derivative; None where the equations
            are only run as differentiable code (:mod:`.differentiable`).
        split_dim: the dimension of one time step's tensor that is split; channels by default.

    Raises:
        ValueError: a number out of the range in which input and state can be rebuilt, or that makes
        no sense.
    """

    tau: float = 2.0
    alpha: float = 0.25
    beta: float = 1.0
    v_threshold: float = 1.0
    v_reset: float | None = 0.0
    detach_reset: bool = False
    surrogate: AnySurrogate | None = ATAN
    split_dim: int = 1

    from_outputs = True
    _versions = _values = ()  # its numbers are no tensors

    def __post_init__(self) -> None:
        if not 1 <= self.tau < math.inf:
            raise ValueError(f"tau must be finite and at least 1 time step, got {self.tau}")
        if not SMALLEST_ALPHA <= self.alpha <= 1:
            raise ValueError(
                f"alpha must lie between {SMALLEST_ALPHA} and 1, got {self.alpha}: a step can be"
                " inverted only if it keeps enough of the other half's potential, and above 1"
                " potentials grow whatever the neuron does"
            )
        if not SMALLEST_BETA <= self.beta <= LARGEST_BETA:
            raise ValueError(
                f"beta must lie between {SMALLEST_BETA} and {LARGEST_BETA:g}, got {self.beta}: the"
                " input has to come back from an output in which beta times it stands beside a"
                " spike"
            )
        for name in ("v_threshold", "v_reset"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")

    @property
    def leak(self) -> float:
        """What a charge leaves of the potential, ``1 - 1/tau``."""
        return 1 - 1 / self.tau

    @property
    def growth_forward(self) -> float:
        """By how much a step multiplies the potentials, and an error in them, of neurons that never
        fire."""
        trace = self.leak * (1 + self.alpha)
        return (trace + math.sqrt(trace**2 + 4 * self.alpha**2)) / 2

    @property
    def growth_backward(self) -> float:
        """By how much a step of :meth:`inverse` multiplies an error in the potentials of neurons
        that never fired."""
        return self.growth_forward / self.alpha**2

    def halves(self, tensor: Tensor, time: bool = False) -> Pair:
        """The two halves of a tensor, as views.

        Args:
            time: whether the tensor has a time dimension in front.

        Raises:
            ValueError: it has no dimension ``split_dim``, or one of odd size.
        """
        dims = tensor.dim() - time
        if not -dims <= self.split_dim < dims:
            raise ValueError(
                f"split_dim: a tensor of shape {tuple(tensor.shape[time:])} for one time step has"
                f" no dimension {self.split_dim} to split in halves"
            )
        dim = self.split_dim % dims + time
        if tensor.shape[dim] % 2:
            raise ValueError(
                f"split_dim: dimension {self.split_dim} of one time step's tensor, of shape"
                f" {tuple(tensor.shape[time:])}, has the odd size {tensor.shape[dim]}; expected an"
                " even one, to be split in halves"
            )
        half = tensor.shape[dim] // 2
        return tensor.narrow(dim, 0, half), tensor.narrow(dim, half, half)

    def step(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One time step.

        Args:
            x: the input, floating point, of any shape that can be split.
            v: the potential, of the same shape and dtype.

        Returns:
            The output ``y``, the potential ``v'`` and the spike bits of both halves, a bool tensor;
            all of x's shape.

        Raises:
            ValueError: see :meth:`halves`.
        """
        y = torch.empty_like(x)
        after, fired = torch.empty_like(y), torch.empty_like(y, dtype=torch.bool)
        self.step_into(*(self.halves(each) for each in (x, v, y, fired, after)))
        return y, after, fired

    def step_into(self, x: Pair, v: Pair, y: Pair, fired: Pair, after: Pair = NEW) -> Pair:
        """:meth:`step` on halves: writes ``y`` and ``fired``, and ``v'`` into ``after``, which it
        returns."""
        passed = self.passed(x[0])
        m1 = self.charge(v[0], passed, 1 / (self.tau * self.beta))
        s1 = self._fire(m1, fired[0])
        x2, alpha = weighed(x[1], self.beta)
        torch.add(s1, x2, alpha=alpha, out=y[0])
        after1 = self._reset(m1, s1, v[1], out=after[0])
        m2 = self.charge(after1, y[0], 1 / self.tau)
        s2 = self._fire(m2, fired[1])
        torch.add(s2, passed, out=y[1])
        return after1, self._reset(m2, s2, v[0], out=after[1])

    def inverse(self, y: Tensor, v_after: Tensor, fired: Tensor) -> tuple[Tensor, Tensor]:
        """The input and the potential that :meth:`step` started from, to rounding.

        Args:
            y, v_after, fired: what the step gave.

        Returns:
            ``x`` and ``v``.
        """
        spikes, v = to_binary(fired, y.dtype), torch.empty_like(v_after)
        (y1, y2), (s1, s2), (after1, after2), (v1, v2) = (
            self.halves(each) for each in (y, spikes, v_after, v)
        )
        m2 = self.charge(after1, y1, 1 / self.tau)
        torch.sub(after2, self._reset(m2, s2), out=v1).div_(self.alpha)
        m1 = self.charge(v1, y2 - s2, 1 / (self.tau * self.beta))
        torch.sub(after1, self._reset(m1, s1), out=v2).div_(self.alpha)
        return self.inputs(y, spikes), v

    def inputs(self, y: Tensor, spikes: Tensor, time: bool = False) -> Tensor:
        """The inputs of one time step, or with ``time`` of several, from outputs and spikes (zeros
        and ones): a new tensor."""
        x = torch.empty_like(y)
        (x1, x2), (y1, y2), (s1, s2) = (self.halves(each, time) for each in (x, y, spikes))
        torch.sub(y2, s2, out=x1)
        torch.sub(y1, s1, out=x2)
        return x if self.beta == 1 else x.div_(self.beta)

    @property
    def thresholds(self) -> tuple[float, float]:
        """The smallest and the largest threshold of any neuron, as magnitudes."""
        return abs(self.v_threshold), abs(self.v_threshold)

    # ------------------------------------------------------------------------------- transition

    @property
    def spikes_carry_gradient(self) -> bool:
        return True  # outputs carry that of the input beside that of the spikes

    def begin(self, x: Tensor, states: States) -> CoupledParts:
        return CoupledParts(self.step(x, states[0]))

    def again(self, view: StepView, states: States) -> tuple[None, States]:
        after = torch.empty_like(states[0])
        parts = (view.outputs, view.fired, states[0], after)
        self.step_again(*map(self.halves, parts))
        return None, (after,)

    def vjp(
        self, view: StepView, grad_outputs: Tensor | None, grad_states: Gradients, needed: Needed
    ) -> Derivative:
        y, (before,), (after,) = view.outputs, view.before, view.after
        ys, spikes = self.halves(y), self.halves(view.fired)
        charged = (
            self.charge_first(ys, spikes, self.halves(before)),
            self.charge_second(ys, self.halves(after)[0]),
        )
        given = (None if g is None else self.halves(g) for g in (grad_outputs, *grad_states))
        grad_x, grad_v = torch.empty_like(y), torch.empty_like(y)
        self.gradient(charged, spikes, *given, self.halves(grad_x), self.halves(grad_v))
        return grad_x, (grad_v,), ()

    def scan(
        self, inputs: Tensor, states: States, keep_charged: bool = False, with_path: bool = False
    ) -> Scan:
        outputs = torch.empty_like(inputs)
        fired = torch.empty_like(outputs, dtype=torch.bool)
        v = self.halves(states[0])
        steps = (self._steps(each) for each in (inputs, outputs, fired))
        for x, y, s in zip(*steps, strict=True):
            v = self.step_into(x, v, y, s)
        last = torch.cat(v, self.split_dim)
        return Scan(PackedSpikes(fired, outputs.dtype), outputs, (last,))

    def vjp_of_scan(
        self, kept: KeptSequence, gradients: SequenceGradients, needed: Needed
    ) -> Derivative:
        charged = torch.empty_like(kept.outputs)
        fired, ms = self._steps(kept.packed.fired()), self._steps(charged)
        dtype, v = kept.outputs.dtype, self.halves(kept.start[0])
        for y, s, m in zip(self._steps(kept.outputs), fired, ms, strict=True):
            v = self.step_again(y, _ones(s, dtype), v, charged=m)
        del v
        given = gradients.outputs
        grad_ys = [None] * len(ms) if given is None else self._steps(given)
        grad_v = None if gradients.states[0] is None else self.halves(gradients.states[0])
        for m, s, grad_y in zip(reversed(ms), reversed(fired), reversed(grad_ys), strict=True):
            _, grad_v = self.gradient(m, _ones(s, dtype), grad_y, grad_v, out=m)
        return charged, (torch.cat(grad_v, self.split_dim),), ()

    def recover_inputs(self, packed: PackedSpikes, time: bool, outputs: Tensor) -> Tensor:
        return self.inputs(outputs, packed.binary(), time)

    def _steps(self, sequence: Tensor) -> list[Pair]:
        """The halves of each time step of a sequence."""
        halves = self.halves(sequence, time=True)
        return list(zip(*(half.unbind(0) for half in halves), strict=True))

    # ----------------------------------------------------------------------------------- kernels

    def why_no_kernel(self, x: Tensor, states: States) -> str | None:
        return why_tensors_need_plain_code(self, x, states) or why_dtypes_differ(
            self, x, states, keeps_dtype=True
        )

    def kernel_spec(self, x: torch.dtype, state: torch.dtype, on_cuda: bool) -> KernelSpec:
        return KernelSpec(
            charge="coupled",
            reset="soft" if self.v_reset is None else "hard",
            detached=self.detach_reset,
            surrogate=self.surrogate.name,
            strict=self.surrogate.strict,
            to_zero=not self.v_reset,
            on_cuda=on_cuda,
            **dict.fromkeys(ROUNDINGS, x),
        )

    def kernel_numbers(self, spec: KernelSpec) -> tuple[float, ...]:
        """The leak, the weights of either half's input, alpha, beta, the threshold and v_reset."""
        weights = 1 / (self.tau * self.beta), 1 / self.tau
        numbers = self.leak, *weights, self.alpha, self.beta, self.v_threshold, self.v_reset or 0.0
        return tuple(map(float, numbers))

    def sample_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        dims = max(2, self.split_dim + 1, -self.split_dim)
        shape = [1] * dims
        shape[self.split_dim], shape[(self.split_dim + 1) % dims] = columns, rows
        return tuple(shape)

    # --------------------------------------------------------------------------------- equations

    def step_again(
        self, y: Pair, spikes: Pair, v: Pair, after: Pair = NEW, charged: Pair = NEW
    ) -> Pair:
        """The step once more, on halves, from what it gave.

        Args:
            y, spikes: the step's output and spikes, these as zeros and ones of y's dtype.
            v: the potential before it.
            after, charged: where to write the potential ``v'`` and the charged potentials ``m1``
                and ``m2``, if they are wanted.

        Returns:
            The potential ``v'``, with the bits of the first time.
        """
        first = self.charge_first(y, spikes, v, charged[0])
        after1 = self._reset(first, spikes[0], v[1], after[0])
        second = self.charge_second(y, after1, charged[1])
        return after1, self._reset(second, spikes[1], v[0], after[1])

    def charge_first(self, y: Pair, spikes: Pair, v: Pair, out: Tensor | None = None) -> Tensor:
        """``m1`` from the step's output and spikes and the potential before it."""
        return self.charge(v[0], y[1] - spikes[1], 1 / (self.tau * self.beta), out)

    def charge_second(self, y: Pair, after1: Tensor, out: Tensor | None = None) -> Tensor:
        """``m2`` from the step's output and the first half of the potential after it."""
        return self.charge(after1, y[0], 1 / self.tau, out)

    def gradient(
        self,
        charged: Pair,
        spikes: Pair,
        grad_y: Pair | None,
        grad_v: Pair | None,
        out: Pair = NEW,
        before: Pair = NEW,
    ) -> tuple[Pair, Pair]:
        """The step's derivative, on halves, with every sum in autograd's order.

        Args:
            charged: ``m1`` and ``m2``; their memory is used up.
            spikes: zeros and ones of the same dtype.
            grad_y, grad_v: the gradients at ``y`` and ``v'``; None for those that are zero.
            out, before: where to write the gradients at ``x`` and at ``v``; ``out`` may be the
                memory of ``charged``.

        Returns:
            The gradients at ``x`` and ``v``.
        """
        (m1, m2), nothing = charged, charged[0].new_zeros(()).expand(charged[0].shape)
        g_y1, g_y2 = (nothing, nothing) if grad_y is None else grad_y
        g_after1, g_after2 = (nothing, nothing) if grad_v is None else grad_v
        g_m2 = self._gradient_of_fire_and_reset(m2, spikes[1], g_y2, g_after2)
        all_after1 = torch.add(g_after1, g_m2, alpha=self.leak)
        all_y1 = torch.add(g_y1, g_m2, alpha=1 / self.tau)
        g_m1 = self._gradient_of_fire_and_reset(m1, spikes[0], all_y1, all_after1)
        g_v1 = torch.mul(g_after2, self.alpha, out=before[0]).add_(g_m1, alpha=self.leak)
        g_v2 = torch.mul(all_after1, self.alpha, out=before[1])
        g_x1 = torch.add(g_y2, g_m1, alpha=1 / (self.tau * self.beta), out=out[0]).mul_(self.beta)
        g_x2 = torch.mul(all_y1, self.beta, out=out[1])
        return (g_x1, g_x2), (g_v1, g_v2)

    def passed(self, x: Tensor) -> Tensor:
        """``beta x``, rounded so that it comes back from a sum with a spike."""
        x, alpha = weighed(x, self.beta)
        return torch.add(x.new_ones(()), x, alpha=alpha).sub_(1)

    def charge(self, v: Tensor, x: Tensor, weight: float, out: Tensor | None = None) -> Tensor:
        """``leak v + weight x``."""
        return add_weighted_(torch.mul(v, self.leak, out=out), x, weight)

    def _fire(self, m: Tensor, fired: Tensor) -> Tensor:
        spikes = self.surrogate.fires(m, self.v_threshold).to(m.dtype)
        fired.copy_(spikes)
        return spikes

    def _reset(
        self, m: Tensor, s: Tensor, other: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """``R(m, s)``, plus alpha times the other half's potential if that is given."""
        if self.v_reset is None:
            kept = add_weighted_(
                torch.clone(m) if out is None else out.copy_(m), s, -self.v_threshold, binary=True
            )
        else:
            kept = torch.addcmul(m, m, s, value=-1, out=out)  # exactly zero or m
            if self.v_reset:
                kept.add_(s * self.v_reset)
        return kept if other is None else add_weighted_(kept, other, self.alpha)

    def _gradient_of_fire_and_reset(
        self, m: Tensor, s: Tensor, grad_s: Tensor, grad_after: Tensor
    ) -> Tensor:
        if not self.detach_reset and self.v_reset is None:
            grad_s = torch.sub(grad_s, grad_after, alpha=self.v_threshold)
        elif not self.detach_reset:
            to_reset = torch.add(grad_s, grad_after, alpha=self.v_reset) if self.v_reset else grad_s
            of_kept = grad_after * m
            grad_s = torch.sub(to_reset, of_kept, out=of_kept)
        grad_s = grad_s.to(
            self.surrogate.dtype_of_spikes(m)
        )  # spikes may be float32 whatever the potential, as in snnTorch
        grad_m = self.surrogate.gradient(grad_s, m.sub_(self.v_threshold))
        # A user's surrogate may hand its gradient on as it is, and that one is not ours to write
        # into; m is.
        if self.v_reset is None:
            return torch.add(grad_m, grad_after, out=m)
        return torch.addcmul(grad_m, grad_after, 1 - s, out=m)


def weighed(b: Tensor, weight: float, binary: bool = False) -> tuple[Tensor, float]:
    """``weight b`` as the second operand of a sum and its ``alpha``, so that ``weight b`` rounds
    before the sum does.

    Torch's own kernels round once or twice, as the processor has it; a spike must not depend on
    that. Where the product is exact there is nothing to round: of a power of two, and of zeros and
    ones (``binary``). Not for short mantissas, where they round the weight as well, in some
    layouts.
    """
    if b.dtype in FULL and (binary or math.frexp(abs(weight))[0] == 0.5):
        return b, weight
    return b * weight, 1


def add_weighted_(a: Tensor, b: Tensor, weight: float, binary: bool = False) -> Tensor:
    """``a += weight b``, in the same bits on every device; see :func:`weighed`."""
    b, alpha = weighed(b, weight, binary)
    return a.add_(b, alpha=alpha)


def _ones(fired: Pair, dtype: torch.dtype) -> Pair:
    return to_binary(fired[0], dtype), to_binary(fired[1], dtype)

"""Kernels are compared with the plain torch code on a small sample, on the device where they are to
be used, before they are used.

Spikes and potentials must have the same bits, gradients must agree to rounding. This is done once
in a process for each :class:`..neurons.kernel_spec.KernelSpec` and device, at the first call of
such a neuron. Where kernels fail, the plain code computes, and a warning says so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..neurons.kernel_spec import KernelSpec
from ..neurons.transition import (
    Gradients,
    GraphNodes,
    KeptSequence,
    Needed,
    Scan,
    SequenceGradients,
    States,
    Transition,
)
from ..packed.spikes import PackedSpikes
from .launch import AT_ONCE

STEPS = 5
LONG = AT_ONCE + 3  # more steps than a program takes at once
COLUMNS = 38  # even, but no multiple of the bits of a byte
ROWS = 29  # times COLUMNS: more neurons than one program takes
ROUNDING = {torch.float32: 1e-4}  # largest error of a gradient, relative to its largest element
# The plain code rounds to a short dtype after every operation, a kernel once.
ROUNDING_OF_SHORT = 0.1
CAPTURING = (
    "a CUDA graph is being captured, and its kernel has not been tested yet: take a training step"
    " before"
)
PLAIN_CODE = (
    "snn_revplugin computes a neuron in plain torch code, which launches many small kernels at"
    " every time step, because its fused kernel did not pass its self-test: {}"
)

_verdicts: dict[tuple[KernelSpec | str, torch.device], str | None] = {}


def failure(transition: Transition, x: Tensor, states: States) -> str | None:
    """What is wrong with the kernels of a neuron on this device, or None if they pass.

    Args:
        transition: the plain neuron, for which ``why_no_kernel`` gives no reason.
        x, states: of a call, of which dtypes and device are read.
    """
    dtypes = x.dtype, states[0].dtype
    spec = transition.kernel_spec(*dtypes, x.is_cuda)
    return _verdict((spec, x.device), lambda: _compare(transition, *dtypes, x.device))


def packing_failure(device: torch.device) -> str | None:
    """What is wrong with the kernels that pack and unpack spikes on this device, or None."""
    return _verdict(("packing", device), lambda: _compare_packing(device))


def _verdict(
    key: tuple[KernelSpec | str, torch.device], compare: Callable[[], str | None]
) -> str | None:
    if key not in _verdicts:
        device = key[1]
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return CAPTURING
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                _verdicts[key] = compare()
        # A driver, a compiler or a device that Triton does not support.
        except Exception as error:
            message = str(error).partition("\n")[0]
            _verdicts[key] = f"the kernel failed on {device}: {type(error).__name__}: {message}"
        if _verdicts[key] is not None:
            warnings.warn(PLAIN_CODE.format(_verdicts[key]), RuntimeWarning, stacklevel=2)
    return _verdicts[key]


# ------------------------------------------------------------------------------------- the sample


class Sample:
    """Random numbers on a device, the same in every process."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._generator = device, torch.Generator().manual_seed(0)

    def draw(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Numbers around a threshold of 1."""
        numbers = torch.randn(shape, generator=self._generator) * 1.5 + 0.4
        return numbers.to(self.device, dtype)

    def draw_like(self, tensor: Tensor) -> Tensor:
        """A gradient at ``tensor``."""
        return self.draw(tensor.shape, tensor.dtype)


class SampleInputs:
    """The inputs of a sequence, see :class:`..neurons.transition.Inputs`."""

    exact = True

    def __init__(self, inputs: Tensor) -> None:
        self._inputs = inputs

    def value(self) -> Tensor:
        return self._inputs

    def consume(self) -> tuple[Tensor, bool]:
        return self._inputs.clone(), True


@dataclass
class SampleStep:
    """A time step that was taken, as a derivative sees it: :class:`..neurons.transition.StepView`.

    Attributes:
        left: the states before it, where the derivative has reversed them.
    """

    current: Tensor
    before: States
    outputs: Tensor
    after: States
    packed: PackedSpikes
    charged: Tensor | None
    packed_signal: PackedSpikes | None
    reverses: bool = False
    left: States = ()

    @property
    def has_charged(self) -> bool:
        return not self.reverses

    @property
    def invertible(self) -> bool:
        return self.reverses

    @property
    def fired(self) -> Tensor:
        return self.packed.binary()

    @property
    def silent(self) -> Tensor:
        return 1.0 - self.fired

    @property
    def reset_signal(self) -> Tensor | None:
        return None if self.packed_signal is None else self.packed_signal.binary()

    def hand_down(self) -> None:
        """The states before are known."""

    def leave_before(self, states: States) -> None:
        self.left = states

    def results(self) -> list[Tensor]:
        """What forward gave."""
        charged = () if self.charged is None else (self.charged,)
        return [self.outputs, *self.after, *charged, self.packed.bits]


def take_step(transition: Transition, x: Tensor, states: States) -> SampleStep:
    """One time step forward."""
    parts, signal = transition.begin(x, states), None
    if transition.has_reset_signal:
        signal = parts.reset_signal
        signal = PackedSpikes(signal, signal.dtype)
    if transition.nodes is GraphNodes.FIRE:
        after = parts.states()
        fired, outputs = parts.fire()
    else:
        fired, outputs = parts.fire()
        after = parts.states()
    return SampleStep(x, states, outputs, after, _packed(fired), parts.charged, signal)


def _packed(fired: Tensor | PackedSpikes) -> PackedSpikes:
    if isinstance(fired, PackedSpikes):
        return fired
    dtype = torch.float32 if fired.dtype is torch.bool else fired.dtype
    return PackedSpikes(fired, dtype)


# ------------------------------------------------------------------------------------- comparison


def _compare(
    transition: Transition, x: torch.dtype, state: torch.dtype, device: torch.device
) -> str | None:
    from .fuse import fuse

    plain = transition.with_parameters(
        [each.detach().clone().requires_grad_(each.requires_grad) for each in transition.parameters]
    )
    kernels = fuse(plain, interpreted=device.type != "cuda")
    sample, shape = Sample(device), plain.sample_shape(ROWS, COLUMNS)
    inputs, start = sample.draw((LONG, *shape), x), (sample.draw(shape, state),)
    rounding = ROUNDING.get(x, ROUNDING_OF_SHORT) if x == state else ROUNDING_OF_SHORT
    what = _difference_of_steps(plain, kernels, inputs[:STEPS], start, sample, rounding)
    where = "single steps"
    for steps in () if plain.single_steps_only else (STEPS, LONG):
        if what is None:
            given = inputs[:steps], start, sample, rounding
            what, where = _difference_of_sequences(plain, kernels, *given), "a sequence"
    return None if what is None else f"{what} differ from the plain code's on {device} ({where})"


SPIKES = "the kernel's spikes or potentials"
GRADIENTS = "the kernel's gradients"


def _difference_of_steps(
    plain: Transition,
    kernels: Transition,
    inputs: Tensor,
    states: States,
    sample: Sample,
    rounding: float,
) -> str | None:
    needed = tuple(each.requires_grad for each in plain.parameters)
    for x in inputs:
        step = take_step(plain, x, states)
        if not _same_bits(step.results(), take_step(kernels, x, states).results()):
            return SPIKES
        upstream = [sample.draw_like(each) for each in (step.outputs, *step.after)]
        ways = (False, True) if plain.invertible and x.dtype == states[0].dtype else (False,)
        for step.reverses in ways:
            expected, ours = (
                _derivative_of_step(each, step, upstream, needed) for each in (plain, kernels)
            )
            if not _close(expected, ours, rounding):
                return GRADIENTS
            if step.reverses and not _close(plain.invert(step), step.left, rounding):
                return GRADIENTS
        states = step.after
    return None


def _derivative_of_step(
    transition: Transition, step: SampleStep, upstream: Sequence[Tensor], needed: Needed
) -> list[Tensor | None]:
    """The derivative of a step, node by node and fire with the charge, each from the same
    gradients."""
    grad_outputs, *grad_states = (each.clone() for each in upstream)
    if transition.nodes is GraphNodes.ONE:
        grad_x, grad_before, grads = transition.vjp(step, grad_outputs, grad_states, needed)
        return [grad_x, *grad_before, *grads]
    at_charged, of_fire = transition.vjp_of_fire(step, grad_outputs, needed)
    grad_x, grad_before, grads = transition.vjp_of_charge(step, (grad_states[0].clone(),), needed)
    found = [at_charged, *of_fire, grad_x, *grad_before, *grads]
    if transition.nodes is GraphNodes.FIRE:
        grad_x, grad_before, grads = transition.vjp(step, grad_outputs, grad_states, needed)
        found += [grad_x, *grad_before, *grads]
    if transition.nodes is GraphNodes.RESET:
        at_charged, at_outputs, grads = transition.vjp_of_reset(step, grad_states, needed)
        found += [at_charged, at_outputs, *grads]
    return found


def _difference_of_sequences(
    plain: Transition,
    kernels: Transition,
    inputs: Tensor,
    start: States,
    sample: Sample,
    rounding: float,
) -> str | None:
    needed = tuple(each.requires_grad for each in plain.parameters)
    scan, ours = (
        each.scan(inputs, start, keep_charged=True, with_path=True) for each in (plain, kernels)
    )
    if not _same_bits(_results_of_scan(scan), _results_of_scan(ours)):
        return SPIKES
    gradients = SequenceGradients(
        sample.draw_like(scan.outputs),
        tuple(sample.draw_like(each) for each in scan.states),
        None if scan.path is None else sample.draw_like(scan.path),
    )
    for held in _held(plain, inputs, scan):
        found: list[Gradients] = []
        for each in (plain, kernels):
            kept = KeptSequence(start, inputs.dtype, packed=scan.fired, **held)
            grad_x, grad_start, grads = each.vjp_of_scan(kept, gradients, needed)
            found.append((grad_x, *grad_start, *grads))
        if not _close(*found, rounding):
            return GRADIENTS
    return None


def _held(plain: Transition, inputs: Tensor, scan: Scan) -> list[dict[str, object]]:
    """What else backward may have of a sequence, case by case."""
    if plain.from_outputs:
        return [{"outputs": scan.outputs}]
    held: list[dict[str, object]] = [{"inputs": SampleInputs(inputs)}]
    return held if plain.reads_input else [*held, {"charged": scan.charged}]


def _results_of_scan(scan: Scan) -> list[Tensor]:
    others = (each for each in (scan.charged, scan.path) if each is not None)
    return [scan.outputs, *scan.states, *others, scan.fired.bits]


def _same_bits(expected: Sequence[Tensor], ours: Sequence[Tensor]) -> bool:
    return all(
        a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(*map(_without_nan, (a, b)))
        for a, b in zip(expected, ours, strict=True)
    )


def _without_nan(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num() if tensor.is_floating_point() else tensor


def _close(
    expected: Sequence[Tensor | None], ours: Sequence[Tensor | None], rounding: float
) -> bool:
    """Whether gradients are equal to rounding, and None in the same places."""
    for a, b in zip(expected, ours, strict=True):
        if a is None or b is None:
            if a is not b:
                return False
            continue
        largest = a.abs().max().item()
        if math.isfinite(largest) and not torch.allclose(
            a.float(), b.float(), rtol=0, atol=rounding * largest, equal_nan=True
        ):
            return False
    return True


def _compare_packing(device: torch.device) -> str | None:
    from .launch import BITS, kernels, pack, unpack

    code = kernels(device.type != "cuda")
    fired = torch.rand(ROWS * COLUMNS * 9, generator=torch.Generator().manual_seed(0)).lt(0.3)
    bits = torch.empty(-(-fired.numel() // BITS), dtype=torch.uint8, device=device)
    pack(code, fired.to(device), bits)
    ones = unpack(code, bits, fired.numel(), torch.float32)
    same = torch.equal(bits.cpu(), PackedSpikes(fired).bits)
    if same and torch.equal(ones.cpu(), fired.float()):
        return None
    return f"the kernel's packed spikes differ from the plain code's on {device}"

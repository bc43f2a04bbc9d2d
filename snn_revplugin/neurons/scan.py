"""T time steps of a neuron with one state, in plain torch code: forward, and their derivative.

Backward scans forward once more, which is exact whatever the reset, and walks back in closed form.
Each step's gradient is written over the charged potential that it was computed from. Both read the
spikes from their bits and decide none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..packed.spikes import PackedSpikes
from .one_state_equations import OneStateEquations
from .transition import Derivative, KeptSequence, Needed, Scan, SequenceGradients, add_gradients


def scan(
    neuron: OneStateEquations, currents: Tensor, v: Tensor, keep_charged: bool, with_path: bool
) -> Scan:
    """T time steps forward, see :meth:`.transition.Transition.scan`."""
    fired_of, charged_of, path, fired, slots = [], [], [], None, [None] * len(currents)
    if currents.is_contiguous() and currents.dtype == v.dtype:
        fired = torch.empty_like(currents, dtype=neuron.surrogate.dtype_of_spikes(currents))
        slots = fired.unbind(0)
    for x, slot in zip(currents.unbind(0), slots, strict=True):
        signal = neuron.reset_signal_at(v)
        charged = neuron.charge(x, v, signal)
        fired_of.append(neuron.fires(charged, out=slot))
        v = neuron.reset(charged, fired_of[-1], signal)
        if keep_charged:
            charged_of.append(charged)
        if with_path:
            path.append(v)
    if fired is None:
        fired = torch.stack(fired_of)
    packed = PackedSpikes(fired, fired.dtype, neuron.graded_factor)
    kept = torch.stack(charged_of) if charged_of else None
    spikes = neuron.spikes(fired)
    if not with_path:
        return Scan(packed, spikes, (v,), kept)
    return Scan(packed, spikes, (v.clone(),), kept, torch.stack(path))


def vjp_of_scan(
    neuron: OneStateEquations, kept: KeptSequence, gradients: SequenceGradients, needed: Needed
) -> Derivative:
    """The derivative of T time steps, see :meth:`.transition.Transition.vjp_of_scan`."""
    steps = _Steps(neuron, kept, any(needed))
    (grad_v,), grad_currents = gradients.states, steps.memory_for_gradients(kept.dtype)
    totals = (None,) * len(needed)
    for t in range(len(grad_currents) - 1, -1, -1):
        if gradients.path is not None:
            grad_v = gradients.path[t] if grad_v is None else grad_v + gradients.path[t]
        grad_s = None if gradients.outputs is None else gradients.outputs[t]
        slot = grad_currents[t]
        if grad_s is None and grad_v is None:
            slot.zero_()
            continue
        view = SequenceView(steps, t)
        out = slot if slot.dtype == view.charged.dtype else None
        grad_x, grad_v, grads = neuron.gradient(grad_s, grad_v, view, needed, out)
        if grad_x is not slot:
            slot.copy_(grad_x)
        totals = add_gradients(totals, grads)
    return grad_currents, (grad_v,), totals


class _Steps:
    """The charged potentials of T time steps, and what else their derivatives read.

    A neuron whose derivative reads no current has them all at once, over the currents themselves
    where those may be written over. The others have them by stretches of about sqrt(T) steps, from
    the last to the first, and the currents beside them.
    """

    def __init__(self, neuron: OneStateEquations, kept: KeptSequence, learns: bool) -> None:
        self.neuron, self.start = neuron, kept.start[0]
        self._spikes = None if kept.packed is None else kept.packed.steps()
        self.currents: Tensor | None = None
        self._stretch, self._first, self._starts = 0, 0, [self.start]
        if kept.inputs is None:
            self._charged, self._owned = kept.charged, False
            return
        self.currents, self._owned = kept.inputs.consume()
        if neuron.reads_input and learns:
            self._scan_to_stretches()
            return
        currents, self.currents = self.currents, None
        in_place = self._owned and 0 not in currents.stride()
        self._charged = self._scan_again(currents, 0, in_place)
        self._owned = True

    def memory_for_gradients(self, dtype: torch.dtype) -> Tensor:
        """Where the gradients at the currents are written, ``[T, ...]``: over what they were
        computed from, where that may be written over."""
        read = self._charged if self.currents is None else self.currents
        usable = self._owned and read.dtype == dtype and 0 not in read.stride()
        return read if usable else torch.empty_like(read, dtype=dtype)

    def _scan_to_stretches(self) -> None:
        """Scan forward once, and keep the potential from which each stretch starts."""
        v, neuron = self.start, self.neuron
        self._stretch = max(math.isqrt(len(self.currents)), 1)
        for t, x in enumerate(self.currents.unbind(0)):
            if t and t % self._stretch == 0:
                self._starts.append(v)
            h = neuron.charge(x, v, None)
            v = neuron.reset(h, self.fired(t, h), None)
        self._charged, self._first = None, len(self.currents)

    def _scan_again(self, currents: Tensor, first: int, in_place: bool) -> Tensor:
        """The charged potentials of the steps from ``first`` on."""
        neuron, v = self.neuron, self._starts[first // self._stretch if self._stretch else 0]
        dtype = torch.result_type(currents, v)
        in_place = in_place and dtype == v.dtype == currents.dtype
        charged = currents if in_place else torch.empty_like(currents, dtype=dtype)
        self._charged, self._first = charged, first
        for i, (x, h) in enumerate(zip(currents.unbind(0), charged.unbind(0), strict=True)):
            signal = self.reset_signal(first + i)
            after_charge = neuron.charge(x, v, signal, out=h)
            if after_charge is not h:
                h.copy_(after_charge)
            v = neuron.reset(h, self.fired(first + i, h), signal)
        return charged

    def charged(self, t: int) -> Tensor:
        """The charged potential of step ``t``, or of one below those that were read before."""
        if t < self._first:
            first = t // self._stretch * self._stretch
            self._scan_again(self.currents[first : t + 1], first, in_place=False)
        return self._charged[t - self._first]

    def fired(self, t: int, h: Tensor) -> Tensor:
        """The spikes of step ``t``; decided only where no bits are kept, from the potentials of
        forward themselves."""
        return self.neuron.fires(h) if self._spikes is None else self._spikes.binary(t)

    def silent(self, t: int, h: Tensor) -> Tensor:
        """Ones where step ``t`` has no spikes."""
        return torch.rsub(self.fired(t, h), 1.0) if self._spikes is None else self._spikes.silent(t)

    def reset_signal(self, t: int) -> Tensor | None:
        if not self.neuron.has_reset_signal:
            return None
        if t and self.neuron.reset_follows_spikes and self._spikes is not None:
            return self._spikes.binary(t - 1)
        return self.neuron.reset_signal_at(self.before(t))

    def before(self, t: int) -> Tensor:
        """The potential before step ``t``."""
        if self._stretch and t % self._stretch == 0:
            return self._starts[t // self._stretch]
        if t == 0:
            return self.start
        h = self.charged(t - 1)
        return self.neuron.reset(h, self.fired(t - 1, h), None)


class SequenceView:
    """One time step of a sequence, as :class:`.transition.StepView`."""

    def __init__(self, steps: _Steps, t: int) -> None:
        self.steps, self.t = steps, t
        self.charged = steps.charged(t)
        self._fired: Tensor | None = None

    @property
    def current(self) -> Tensor | None:
        return None if self.steps.currents is None else self.steps.currents[self.t]

    @property
    def fired(self) -> Tensor:
        if self._fired is None:
            self._fired = self.steps.fired(self.t, self.charged)
        return self._fired

    @property
    def silent(self) -> Tensor:
        if self._fired is None:
            return self.steps.silent(self.t, self.charged)
        return torch.rsub(self._fired, 1.0)

    @property
    def before(self) -> tuple[Tensor]:
        return (self.steps.before(self.t),)

    @property
    def reset_signal(self) -> Tensor | None:
        return self.steps.reset_signal(self.t)

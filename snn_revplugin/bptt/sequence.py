"""T time steps of a reversible neuron in one autograd Function: for SpikingJelly's step mode 'm'.

Nothing of the membrane potential's path is kept but its first value. Backward has the current of
all steps from its recipe, scans forward once more (exact, whatever the reset), and walks back in
closed form, writing each step's gradient over the potential that it has just used.

Where somebody else's hooks decide how tensors are saved (a checkpoint, ``save_on_cpu``), recipes
cannot be left. There the charged potentials are saved, through those hooks, and nothing else: 4
bytes a neuron-step in float32, where SpikingJelly's neurons on a CPU save 4 (soft reset), 8
(detached) or 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import select_backend
from ..neurons.transition import Dynamics
from ..packed.spikes import PackedSpikes
from ..replay import FIRED, Recomputable, Spikes, attach_recipes
from ..torch_internals import graph, saved_tensors
from ..torch_internals.function import once_differentiable, release_saved
from ..torch_internals.versioned import Versioned
from .chain import INITIAL, initial, once
from .record import NeuronRecord
from .step import SECOND_PASS


class Call(NamedTuple):
    """What a sequence is given besides tensors."""

    dynamics: Dynamics
    currents: Recomputable | None
    with_path: bool
    record: NeuronRecord
    hooked: bool  # whether somebody else's hooks decide how tensors are saved


def sequence(
    dynamics: Dynamics,
    currents: Tensor,
    potential: Tensor,
    record: NeuronRecord,
    with_path: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """T time steps.

    Args:
        dynamics: the neuron's equations.
        currents: the input currents, ``[T, ...]`` with T at least 1, floating point.
        potential: the membrane potential before the first step, of the shape of one current.
        reversal: the neuron's own.
        with_path: whether the potentials after every step are wanted too.

    Returns:
        The spikes ``[T, ...]``, the membrane potential after the last step, and either None or the
        potentials ``[T, ...]``.
    """
    if dynamics.reset_needs_signal:
        raise ValueError(
            f"dynamics: {type(dynamics).__name__} with a reset at once that looks back is for"
            " single steps only"
        )
    hooked, value = saved_tensors.saved_tensor_hooks_active(), None
    if not hooked:
        value = attach_recipes(currents, record, whole_sequence=not dynamics.has_reset_signal)
        dynamics = select_backend(dynamics, currents, potential, record.statistics)
        if dynamics.fused:
            value = dynamics.had_again(value, currents, potential)
    call = Call(dynamics, value, with_path, record, hooked)
    outputs = _Sequence.apply(currents, potential, call, *dynamics.parameters)
    return outputs if with_path else (*outputs, None)


@graph.with_slots("call", "potential", "types", "charged", FIRED)
class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, currents: Tensor, potential: Tensor, call: Call, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        dynamics = call.dynamics
        packed, spikes, last, charged, path = forward(
            dynamics, currents, potential, call.currents is None, call.with_path
        )
        if call.currents is not None:
            call.currents.add_reader()
        ctx.set_materialize_grads(False)
        if not dynamics.spikes_carry_gradient:
            ctx.mark_non_differentiable(spikes)
        ctx.call, ctx.types = call, (currents.dtype, potential.dtype)
        if call.hooked:
            ctx.save_for_backward(charged, potential if dynamics.gradient_reads_before else None)
            call.record.statistics.took_sequence_through_hooks(charged)
        else:
            ctx.potential = Versioned(initial(potential))
            ctx.charged = charged  # kept in the place of currents that cannot be had again
            setattr(ctx, FIRED, Spikes(packed, spikes))
            call.record.statistics.took_sequence(packed, ctx.charged)
        return (spikes, last, path) if call.with_path else (spikes, last)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_spikes: Tensor | None,
        grad_last: Tensor | None,
        grad_path: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        if call is None:
            raise RuntimeError(SECOND_PASS)
        if grad_spikes is None and grad_last is None and grad_path is None:
            return (None,) * len(ctx.needs_input_grad)
        call.dynamics.check_unchanged()
        charged, start = (
            ctx.saved_tensors if call.hooked else (ctx.charged, ctx.potential.get(INITIAL))
        )
        gradients, learned = (grad_spikes, grad_last, grad_path), ctx.needs_input_grad[3:]
        packed = None if call.hooked else getattr(ctx, FIRED).packed
        grad_currents, grad_v, totals = backward(
            call.dynamics, call.currents, charged, start, ctx.types[0], gradients, learned, packed
        )
        release_saved(ctx, "call", "charged", "potential", FIRED)
        return grad_currents, grad_v.to(ctx.types[1]), None, *totals


def forward(
    dynamics: Dynamics, currents: Tensor, v: Tensor, keeps_charged: bool, with_path: bool
) -> tuple[PackedSpikes, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The packed spikes, the spikes, the last potential, and if they are wanted the charged
    potentials and the path."""
    if dynamics.fused:
        if dynamics.takes_sequence(v, currents.dtype):
            return dynamics.sequence(currents, v, keeps_charged, with_path)
        dynamics = dynamics.plain
    fired_of, charged_of, path, fired, slots = [], [], [], None, [None] * len(currents)
    if currents.is_contiguous() and currents.dtype == v.dtype:
        fired = torch.empty_like(currents, dtype=dynamics.surrogate.dtype_of_spikes(currents))
        slots = fired.unbind(0)
    for x, slot in zip(currents.unbind(0), slots, strict=True):
        reset_signal = dynamics.reset_signal(v)
        charged = dynamics.charge(x, v, reset_signal)
        fired_of.append(dynamics.fires(charged, out=slot))
        v = dynamics.reset(charged, fired_of[-1], reset_signal)
        if keeps_charged:
            charged_of.append(charged)
        if with_path:
            path.append(v)
    if fired is None:
        fired = torch.stack(fired_of)
    spikes = dynamics.spikes(fired)
    packed = PackedSpikes(fired.bool(), fired.dtype, dynamics.graded_factor)
    kept = torch.stack(charged_of) if charged_of else None
    return (
        (packed, spikes, v.clone(), kept, torch.stack(path))
        if with_path
        else (packed, spikes, v, kept, None)
    )


def backward(
    dynamics: Dynamics,
    currents: Recomputable | None,
    charged: Tensor | None,
    start: Tensor | None,
    dtype: torch.dtype,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    learned: tuple[bool, ...],
    packed: PackedSpikes | None,
) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
    """The gradients at the currents (in ``dtype``), at the first potential and at the parameters.

    Args:
        start: may be None where the charged potentials are given and no derivative reads the one
            before the first step.
        packed: the spikes, for currents that come back up to rounding and so must not decide them
            again.
    """
    exact = currents is None or currents.exact
    if dynamics.fused:
        if (exact or dynamics.takes_inexact(currents)) and dynamics.takes_sequence(start, dtype):
            return dynamics.gradient_of_sequence(
                currents, charged, start, dtype, *gradients, learned, packed
            )
        dynamics = dynamics.plain
    grad_spikes, grad_v, grad_path = gradients
    ours = currents is not None
    fired = None if exact else packed.fired()
    if ours:
        charged = _scan(dynamics, *currents.consume(), start, fired)
    # A step's gradient takes the place of the potential that it was computed from.
    overwrite = ours and charged.dtype == dtype
    grad_currents = charged if overwrite else torch.empty_like(charged, dtype=dtype)
    fits = grad_currents.dtype == charged.dtype
    totals: list[Tensor | None] = [None] * len(learned)
    for t in range(len(charged) - 1, -1, -1):
        if grad_path is not None:
            grad_v = grad_path[t] if grad_v is None else grad_v + grad_path[t]
        grad_s = None if grad_spikes is None else grad_spikes[t]
        if grad_s is None and grad_v is None:
            grad_currents[t] = 0
            continue
        view = StepView(dynamics, charged, start, t, fired)
        slot = grad_currents[t]
        grad_x, grad_v, grads = dynamics.gradient(
            grad_s, grad_v, view, learned, out=slot if fits else None
        )
        if grad_x is not slot:
            slot.copy_(grad_x)
        totals = [
            b if a is None else a if b is None else a + b
            for a, b in zip(totals, grads, strict=True)
        ]
    return grad_currents, grad_v, totals


def _scan(
    dynamics: Dynamics, currents: Tensor, owned: bool, v: Tensor, fired: Tensor | None
) -> Tensor:
    """The charged potentials ``[T, ...]`` of a sequence, over the currents themselves where those
    may be written into.

    Args:
        fired: where the neurons fired, bool; None where the potentials decide it as they did in
            forward.
    """
    in_place = owned and v.dtype == currents.dtype and 0 not in currents.stride()
    charged = (
        currents if in_place else torch.empty_like(currents, dtype=torch.result_type(currents, v))
    )
    for t, (x, h) in enumerate(zip(currents.unbind(0), charged.unbind(0), strict=True)):
        reset_signal = dynamics.reset_signal(v)
        after_charge = dynamics.charge(x, v, reset_signal, out=h)
        if after_charge is not h:
            h.copy_(after_charge)
        v = (
            dynamics.fire_and_reset(h, reset_signal)
            if fired is None
            else dynamics.reset(h, fired[t].to(h.dtype), reset_signal)
        )
    return charged


class StepView:
    """One time step of a sequence whose charged potentials are all at hand; satisfies
    :class:`.dynamics.Moment`."""

    current = None  # the charged potentials may have been written over the currents

    def __init__(
        self,
        dynamics: Dynamics,
        charged: Tensor,
        start: Tensor | None,
        t: int,
        bits: Tensor | None = None,
    ) -> None:
        self.dynamics, self.path, self.start, self.t, self.bits = dynamics, charged, start, t, bits

    @once
    def charged(self) -> Tensor:
        return self.path[self.t]

    @once
    def fired(self) -> Tensor:
        return self.dynamics.fires(self.charged) if self.bits is None else self._fired_at(self.t)

    @once
    def silent(self) -> Tensor:
        if self.bits is None:
            return self.dynamics.surrogate.silent(self.charged, self.dynamics.threshold)
        return 1.0 - self.fired

    @once
    def before(self) -> Tensor:
        if self.t == 0:
            return self.start
        h = self.path[self.t - 1]
        return (
            self.dynamics.fire_and_reset(h)
            if self.bits is None
            else self.dynamics.reset(h, self._fired_at(self.t - 1))
        )

    def _fired_at(self, t: int) -> Tensor:
        return self.bits[t].to(self.path.dtype)

    @once
    def reset_signal(self) -> Tensor | None:
        return self.dynamics.reset_signal(self.before)

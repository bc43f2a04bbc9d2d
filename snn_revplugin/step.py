"""One time step of a reversible neuron as an autograd Function: for snnTorch, and for SpikingJelly's step mode 's'.

Forward keeps the spikes as bits, the input current as a recipe and a link in the chain of states. Backward has the step's
potential from the chain, applies the derivative in closed form, and hands the potential of the step before down. No
graph of the node is built again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autograd_internals as internals
from .dynamics import Dynamics
from .neuron import Reversal
from .replay import FIRED, Spikes, Value, recipe_of
from .settings import get_settings
from .spikes import PackedSpikes
from .trajectory import Moment, State, initial

STATE = "snn_revplugin_state"  # where the graph node of a step offers the state it led to
SECOND_PASS = (
    "Trying to backward through a reversible neuron's time step a second time (or its spikes were freed by a backward "
    "without retain_graph). Specify retain_graph=True if you need to backward through the graph a second time, or detach the "
    "membrane potential between two sequences."
)


class Call(NamedTuple):
    """What a step is given besides tensors."""

    dynamics: Dynamics
    before: State
    current: Value | None
    stretch: int
    invertible: bool
    reversal: Reversal


def step(dynamics: Dynamics, current: Tensor, potential: Tensor, reversal: Reversal) -> tuple[Tensor, Tensor]:
    """One time step.

    Args:
        dynamics: the neuron's equations.
        current: the input current x, floating point, of any shape.
        potential: the membrane potential v, of the same shape. If it is what an earlier step of the same ``dynamics``
            returned, unmodified, the two steps form a chain; anything else starts a new one.
        reversal: the neuron's own.

    Returns:
        The spikes and the membrane potential after the step, as the host's neuron would have them, bit for bit.
    """
    value = recipe_of(current, reversal)
    before = _start_from(potential, dynamics)
    call = Call(dynamics, before, value, *stretch_of(dynamics, potential.dtype), reversal)
    return _Step.apply(current, potential, call, *dynamics.parameters)


def stretch_of(dynamics: Dynamics, dtype: torch.dtype) -> tuple[int, bool]:
    """The time steps between two anchors under the settings that hold, and whether those between are reversed."""
    settings = get_settings()
    if dynamics.invertible and dtype in (torch.float32, torch.float64):  # shorter mantissas have no bits to lose
        stretch = dynamics.stretch(settings.lost_bits, settings.longest_stretch)
        if stretch:
            return stretch, True
    return settings.rebuild_stretch, False


def state_of(potential: Tensor) -> State | None:
    """The state that a step left with the potential it returned, unless somebody has written into that since."""
    state = getattr(potential.grad_fn, STATE, None)
    if state is None or potential.output_nr != 1 or potential._version != state.version:
        return None
    return state


def _start_from(potential: Tensor, dynamics: Dynamics) -> State:
    """The state that ``potential`` is, or the first of a new chain."""
    state = state_of(potential)
    if state is not None and state.dynamics is dynamics:
        return state
    with torch.no_grad():
        return State(initial(potential))


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, current: Tensor, potential: Tensor, call: Call, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        dynamics, before = call.dynamics, call.before
        fired, spikes, charged, after = dynamics.step(current, potential)
        packed = PackedSpikes(fired.bool(), fired.dtype, dynamics.graded_factor)
        # A step whose current is lost cannot be charged again: where the reset cannot be undone either, h is kept.
        keeps = charged if call.current is None and not call.invertible and charged is not after else None
        state = State(after.detach(), before, dynamics, call.current, packed, keeps, call.stretch, call.invertible)
        if call.current is None and keeps is None:
            state.hold_a_copy()  # nothing could be rebuilt if somebody wrote into the one that is given out
        before.continued(can_be_undone=call.current is not None)
        if call.current is not None:
            call.current.expect()
        ctx.set_materialize_grads(False)
        if not dynamics.spikes_carry_gradient:
            ctx.mark_non_differentiable(spikes)
        ctx.types = current.dtype, potential.dtype
        setattr(ctx, STATE, state)
        setattr(ctx, FIRED, Spikes(packed, spikes))
        call.reversal.ledger.took_step(state, call.stretch)
        return spikes, after

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_spikes: Tensor | None, grad_potential: Tensor | None) -> tuple[Tensor | None, ...]:
        state = getattr(ctx, STATE)
        if state is None:
            raise RuntimeError(SECOND_PASS)
        if grad_spikes is None and grad_potential is None:
            return (None,) * len(ctx.needs_input_grad)
        state.dynamics.check_unchanged()
        moment = Moment(state)
        moment.hand_down()  # first, so that what reversing takes is gone before the gradients come
        grad_x, grad_v, grads = state.dynamics.gradient(grad_spikes, grad_potential, moment, ctx.needs_input_grad[3:])
        moment.close()
        if not internals.pass_keeps_graph():
            # Whoever holds the last potential holds this node: it must not hold the sequence's bits in turn.
            setattr(ctx, STATE, None)
            setattr(ctx, FIRED, None)
        return grad_x.to(ctx.types[0]), grad_v.to(ctx.types[1]), None, *grads

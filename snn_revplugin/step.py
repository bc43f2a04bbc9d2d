"""One time step of a reversible neuron in autograd Functions: for snnTorch, and for SpikingJelly's step mode 's'.

A gradient can be taken, or changed by a hook, wherever the host's graph has an edge. SpikingJelly 2's step is one node with
two outputs; snnTorch's spikes are computed from the potential that it gives out, and SpikingJelly 0.0.0.0.14's potential from
the spikes, so there charge, fire and reset are nodes of their own.

Forward keeps the spikes as bits, the input current as a recipe and a link in the chain of states. Backward has the step's
potential from the chain, applies the derivative in closed form, and hands the potential of the step before down. No
graph of the node is built again.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from . import autograd_internals as internals
from . import capture, heap
from .dynamics import Dynamics
from .function import differentiated_once, let_go
from .kernels import arithmetic
from .neuron import Reversal
from .repeated import differentiate_once
from .replay import FIRED, Spikes, Value, recipe_of
from .scratch import scratch
from .settings import get_settings
from .spikes import PackedSpikes
from .trajectory import Moment, State, initial

STATE = "snn_revplugin_state"  # where the graph node that gave a potential out offers its state
REPEATED = "time steps whose layer is differentiated with that of later ones"
SECOND_PASS = (
    "Trying to backward through a reversible neuron's time step a second time (or its spikes were freed by a backward "
    "without retain_graph). Specify retain_graph=True if you need to backward through the graph a second time, or detach the "
    "membrane potential between two sequences."
)


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
    dynamics = arithmetic(dynamics, current, potential, reversal.ledger)
    before = _start_from(potential, dynamics)
    state = State(before, dynamics, value, *stretch_of(dynamics, potential))
    parameters = dynamics.parameters
    if not dynamics.in_parts:
        spikes, after = _Step.apply(current, potential, state, *parameters)
    else:
        charged = after = _Charge.apply(current, potential, state, *parameters)
        spikes = _Fire.apply(charged, state, *parameters)
        if not dynamics.charged_is_kept:
            after = _Reset.apply(charged, spikes, state, potential.detach(), *parameters)
    heap.chain_has_come_to(state.index, potential)
    state.repeats = _repeats(value, before)
    before.continued(can_be_undone=value is not None)
    if value is not None:
        value.expect()
    reversal.ledger.took_step(state)
    return spikes, after


def stretch_of(dynamics: Dynamics, potential: Tensor) -> tuple[int, bool]:
    """The time steps between two anchors under the settings that hold, and whether those between are reversed."""
    settings = get_settings()
    # Shorter mantissas have no bits to lose, and a decay or a largest potential is a value to be asked for.
    if dynamics.invertible and potential.dtype in (torch.float32, torch.float64) and capture.may_ask(potential):
        stretch = dynamics.stretch(settings.lost_bits, settings.longest_stretch)
        if stretch:
            return stretch, True
    return settings.rebuild_stretch, False


def state_of(potential: Tensor) -> State | None:
    """The state that a step left with the potential it returned, unless somebody has written into that since."""
    state = getattr(potential.grad_fn, STATE, None)
    if type(state) is weakref.ref:
        state = state()
    if state is None or potential.output_nr != state.output or potential._version != state.version:
        return None
    return state


def _start_from(potential: Tensor, dynamics: Dynamics) -> State:
    """The state that ``potential`` is, or the first of a new chain."""
    state = state_of(potential)
    if state is not None and state.dynamics is dynamics:
        return state
    with torch.no_grad():
        return State.first(initial(potential))


@internals.with_slots(STATE, FIRED)
class _Step(torch.autograd.Function):
    """Charge, fire and reset as one node with two outputs."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, potential: Tensor, state: State, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        dynamics = state.dynamics
        taken = dynamics.take(state, current, potential) if dynamics.fused else dynamics.step(current, potential)
        fired, spikes, charged, after = taken
        _fire(ctx, state, fired, spikes)
        state.reach(after, charged, output=1)
        setattr(ctx, STATE, state)
        return spikes, after

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad_spikes: Tensor | None, grad_potential: Tensor | None) -> tuple[Tensor | None, ...]:
        state = _alive(getattr(ctx, STATE))
        if grad_spikes is None and grad_potential is None:
            return (None,) * len(ctx.needs_input_grad)
        _differentiate_layer_once(ctx, state)
        grad_spikes = _laid_out(grad_spikes, state)
        moment = Moment.of(state)
        if not state.dynamics.fused:
            moment.hand_down()  # first, so that what reversing takes is gone before the gradients come
        grad_x, grad_v, grads = state.dynamics.gradient(grad_spikes, grad_potential, moment, ctx.needs_input_grad[3:])
        moment.close()
        heap.chain_has_come_to(state.index, grad_v)
        let_go(ctx, STATE, FIRED)
        return grad_x, grad_v, None, *grads


@internals.with_slots(STATE)
class _Charge(torch.autograd.Function):
    """The current and the potential, to the charged potential: the first of the nodes that stand for one time step of a host
    whose spikes are computed from the potential that it gives out, or the other way round."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, potential: Tensor, state: State, *parameters: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        dynamics = state.dynamics
        if dynamics.fused:
            charged = dynamics.begin(state, current, potential)
        else:
            resets = dynamics.resets(potential)
            charged = dynamics.charge(current, potential, resets)
            fits = resets is not None and resets.shape == charged.shape and resets.stride() == charged.stride()
            if fits and resets.dtype == dynamics.surrogate.dtype_of_spikes(charged):
                state.spare = resets
        if dynamics.charged_is_kept:
            state.reach(charged, charged, output=0)
        setattr(ctx, STATE, state)
        return charged

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad_charged: Tensor | None) -> tuple[Tensor | None, ...]:
        state = _alive(getattr(ctx, STATE))
        if grad_charged is None:
            return (None,) * len(ctx.needs_input_grad)
        _differentiate_layer_once(ctx, state)
        moment = Moment.of(state)
        if not state.dynamics.fused:
            moment.hand_down()
        grad_x, grad_v, grads = state.dynamics.gradient_of_charge(grad_charged, moment, ctx.needs_input_grad[3:])
        moment.close()
        heap.chain_has_come_to(state.index, grad_v)
        let_go(ctx, STATE)
        return grad_x, grad_v, None, *grads


@internals.with_slots(FIRED)
class _Fire(torch.autograd.Function):
    """The charged potential to spikes."""

    @staticmethod
    def forward(ctx: Any, charged: Tensor, state: State, *parameters: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        dynamics = state.dynamics
        if dynamics.fused:
            fired, spikes = dynamics.fire(state)
        else:
            spare, state.spare = state.spare, None
            fired = dynamics.fires(charged, out=spare)
            spikes = dynamics.spikes(fired)
        _fire(ctx, state, fired, spikes)
        return spikes

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad_spikes: Tensor | None) -> tuple[Tensor | None, ...]:
        fired = getattr(ctx, FIRED)
        state = _alive(fired and fired.state)
        if grad_spikes is None:
            return (None,) * len(ctx.needs_input_grad)
        grad_spikes = _laid_out(grad_spikes, state)
        grad_h, grads = state.dynamics.gradient_of_fire(grad_spikes, Moment.of(state), ctx.needs_input_grad[2:])
        let_go(ctx, FIRED)
        return grad_h, None, *grads


@internals.with_slots(STATE)
class _Reset(torch.autograd.Function):
    """The charged potential and the spikes, to the potential after a reset at once."""

    @staticmethod
    def forward(ctx: Any, charged: Tensor, spikes: Tensor, state: State, potential: Tensor, *parameters: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        dynamics = state.dynamics
        if dynamics.fused:
            after = dynamics.finish(state)
        else:
            after = dynamics.reset(charged, state.fired.binary(), dynamics.resets(potential))
        state.reach(after, charged, output=0)
        setattr(ctx, STATE, weakref.ref(state))  # the nodes below hold it; no loss may ever come by here and let go of it
        return after

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad_potential: Tensor | None) -> tuple[Tensor | None, ...]:
        state = getattr(ctx, STATE)
        state = _alive(state and state())
        if grad_potential is None:
            return (None,) * len(ctx.needs_input_grad)
        learned = ctx.needs_input_grad[4:]
        grad_h, grad_spikes, grads = state.dynamics.gradient_of_reset(grad_potential, Moment.of(state), learned)
        let_go(ctx, STATE)
        return grad_h, grad_spikes, None, None, *grads


def _fire(ctx: Any, state: State, fired: Tensor | PackedSpikes, spikes: Tensor) -> None:
    """Keep the spikes as bits, for the layers above to find at the node that fired them."""
    if not isinstance(fired, PackedSpikes):  # a kernel packs them itself
        fired = PackedSpikes(fired.bool(), fired.dtype, state.dynamics.graded_factor, state.before.fired)
    state.fired = fired
    if not state.dynamics.spikes_carry_gradient:
        ctx.mark_non_differentiable(spikes)
    setattr(ctx, FIRED, Spikes(state.fired, spikes, state))


def _repeats(value: Value | None, before: State) -> bool:
    """Whether a step is sure to see what the step before saw, so that both can be differentiated as one."""
    if value is None or before.current is None or value.identity is None or get_settings().host_order:
        return False
    return value.identity == before.current.identity


def _differentiate_layer_once(node: Any, state: State) -> None:
    """Where the steps up to this one have all seen the same, in the backward of the last of them: its node, its state."""
    if not state.repeats or torch.is_grad_enabled():
        return
    below, met = state, scratch().setdefault(REPEATED, set())
    if state in met:
        return
    currents = [node.next_functions[0]]
    while below.repeats:
        met.add(below)
        node, below = node.next_functions[1][0], below.before
        if internals.is_node_of(node, _Reset):
            node = node.next_functions[0][0]
        currents.append(node.next_functions[0])
    differentiate_once(currents, largest=state.fired.shape.numel())


def _laid_out(grad_spikes: Tensor | None, state: State) -> Tensor | None:
    """The gradient at contiguous spikes, contiguous too: element by element, two memory formats at a time are slow. (The layer
    above may have read the spikes in another one.)"""
    if grad_spikes is None or grad_spikes.dim() != 4 or state.fired.strides is not None:
        return grad_spikes
    return grad_spikes.contiguous() if grad_spikes.is_contiguous(memory_format=torch.channels_last) else grad_spikes


def _alive(state: State | None) -> State:
    """The state of a node's time step.

    Raises:
        RuntimeError: a backward has let go of it, or a parameter has been written into since.
    """
    if state is None:
        raise RuntimeError(SECOND_PASS)
    state.dynamics.check_unchanged()
    return state

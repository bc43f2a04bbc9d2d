"""One time step of a reversible neuron in autograd Functions: for snnTorch, and for SpikingJelly's
step mode 's'.

A gradient can be taken, or changed by a hook, wherever the host's graph has an edge. SpikingJelly
2's step is one node with two outputs; snnTorch's spikes are computed from the potential that it
gives out, and SpikingJelly 0.0.0.0.14's potential from the spikes, so there charge, fire and reset
are nodes of their own.

Forward keeps the spikes as bits, the input current as a recipe and a link in the chain of states.
Backward has the step's potential from the chain, applies the derivative in closed form, and hands
the potential of the step before down. No graph of the node is built again.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from ..kernels import select_backend
from ..neurons.transition import Dynamics
from ..packed.spikes import PackedSpikes
from ..replay import FIRED, Recomputable, Spikes, attach_recipes
from ..settings import get_settings
from ..torch_internals import capture, graph, heap
from ..torch_internals.function import once_differentiable, release_saved
from ..torch_internals.pass_cache import pass_cache
from .anchors import steps_between_anchors
from .chain import ChainLink, StepView, initial
from .record import NeuronRecord
from .repeated_input import differentiate_once

# where the graph node that gave a potential out offers its link of the chain
LINK = "snn_revplugin_link"
STEP = "snn_revplugin_step"  # where the node that fired has the link of its time step
REPEATED = "time steps whose layer is differentiated with that of later ones"
SECOND_PASS = (
    "Trying to backward through a reversible neuron's time step a second time (or its spikes were"
    " freed by a backward without retain_graph). Specify retain_graph=True if you need to backward"
    " through the graph a second time, or detach the membrane potential between two sequences."
)


def step(
    dynamics: Dynamics, current: Tensor, potential: Tensor, record: NeuronRecord
) -> tuple[Tensor, Tensor]:
    """One time step.

    Args:
        dynamics: the neuron's equations.
        current: the input current x, floating point, of any shape.
        potential: the membrane potential v, of the same shape. If it is what an earlier step of the
            same ``dynamics`` returned, unmodified, the two steps form a chain; anything else starts
            a new one.
        reversal: the neuron's own.

    Returns:
        The spikes and the membrane potential after the step, as the host's neuron would have them,
        bit for bit.
    """
    value = attach_recipes(current, record)
    dynamics = select_backend(dynamics, current, potential, record.statistics)
    before = _start_from(potential, dynamics)
    link = ChainLink(before, dynamics, value, *anchor_interval_of(dynamics, potential))
    parameters = dynamics.parameters
    if not dynamics.in_parts:
        spikes, after = _Step.apply(current, potential, link, *parameters)
    else:
        charged = after = _Charge.apply(current, potential, link, *parameters)
        spikes = _Fire.apply(charged, link, *parameters)
        if not dynamics.charged_is_kept:
            after = _Reset.apply(charged, spikes, link, potential.detach(), *parameters)
    heap.chain_has_come_to(link.index, potential)
    link.repeats = _repeats(value, before)
    before.continued(can_be_undone=value is not None)
    if value is not None:
        value.add_reader()
    record.statistics.took_step(
        link.fired, link.anchor_interval if value is not None else 1, link.kept_bytes
    )
    return spikes, after


def anchor_interval_of(dynamics: Dynamics, potential: Tensor) -> tuple[int, bool]:
    """The time steps between two anchors under the settings that hold, and whether those between
    are reversed."""
    settings = get_settings()
    # Shorter mantissas have no bits to lose, and a decay or a largest potential is a value to be
    # asked for.
    if (
        dynamics.invertible
        and potential.dtype in (torch.float32, torch.float64)
        and capture.may_synchronise(potential)
    ):
        anchor_interval = steps_between_anchors(
            dynamics.decay, settings.lost_bits, settings.max_anchor_interval
        )
        if anchor_interval:
            return anchor_interval, True
    return settings.rebuild_interval, False


def link_of(potential: Tensor) -> ChainLink | None:
    """The state that a step left with the potential it returned, unless somebody has written into
    that since."""
    link = getattr(potential.grad_fn, LINK, None)
    if type(link) is weakref.ref:
        link = link()
    if link is None or potential.output_nr != link.output or potential._version != link.version:
        return None
    return link


def _start_from(potential: Tensor, dynamics: Dynamics) -> ChainLink:
    """The state that ``potential`` is, or the first of a new chain."""
    link = link_of(potential)
    if link is not None and link.dynamics is dynamics:
        return link
    with torch.no_grad():
        return ChainLink.first(initial(potential))


@graph.with_slots(LINK, FIRED)
class _Step(torch.autograd.Function):
    """Charge, fire and reset as one node with two outputs."""

    @staticmethod
    def forward(
        ctx: Any, current: Tensor, potential: Tensor, link: ChainLink, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        dynamics = link.dynamics
        taken = (
            dynamics.take(link, current, potential)
            if dynamics.fused
            else dynamics.step(current, potential)
        )
        fired, spikes, charged, after = taken
        _fire(ctx, link, fired, spikes)
        link.reach(after, charged, output=1)
        setattr(ctx, LINK, link)
        return spikes, after

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_spikes: Tensor | None, grad_potential: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        link = _alive(getattr(ctx, LINK))
        if grad_spikes is None and grad_potential is None:
            return (None,) * len(ctx.needs_input_grad)
        _differentiate_layer_once(ctx, link)
        grad_spikes = _laid_out(grad_spikes, link)
        view = StepView.of(link)
        if not link.dynamics.fused:
            # first, so that what reversing takes is gone before the gradients come
            view.hand_down()
        grad_x, grad_v, grads = link.dynamics.gradient(
            grad_spikes, grad_potential, view, ctx.needs_input_grad[3:]
        )
        view.close()
        heap.chain_has_come_to(link.index, grad_v)
        release_saved(ctx, LINK, FIRED)
        return grad_x, grad_v, None, *grads


@graph.with_slots(LINK)
class _Charge(torch.autograd.Function):
    """The current and the potential, to the charged potential: the first of the nodes that stand
    for one time step of a host whose spikes are computed from the potential that it gives out, or
    the other way round."""

    @staticmethod
    def forward(
        ctx: Any, current: Tensor, potential: Tensor, link: ChainLink, *parameters: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        dynamics = link.dynamics
        if dynamics.fused:
            charged = dynamics.begin(link, current, potential)
        else:
            reset_signal = dynamics.reset_signal(potential)
            charged = dynamics.charge(current, potential, reset_signal)
            fits = (
                reset_signal is not None
                and reset_signal.shape == charged.shape
                and reset_signal.stride() == charged.stride()
            )
            if fits and reset_signal.dtype == dynamics.surrogate.dtype_of_spikes(charged):
                link.spare = reset_signal
        if dynamics.charged_is_kept:
            link.reach(charged, charged, output=0)
        setattr(ctx, LINK, link)
        return charged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_charged: Tensor | None) -> tuple[Tensor | None, ...]:
        link = _alive(getattr(ctx, LINK))
        if grad_charged is None:
            return (None,) * len(ctx.needs_input_grad)
        _differentiate_layer_once(ctx, link)
        view = StepView.of(link)
        if not link.dynamics.fused:
            view.hand_down()
        grad_x, grad_v, grads = link.dynamics.gradient_of_charge(
            grad_charged, view, ctx.needs_input_grad[3:]
        )
        view.close()
        heap.chain_has_come_to(link.index, grad_v)
        release_saved(ctx, LINK)
        return grad_x, grad_v, None, *grads


@graph.with_slots(STEP, FIRED)
class _Fire(torch.autograd.Function):
    """The charged potential to spikes."""

    @staticmethod
    def forward(ctx: Any, charged: Tensor, link: ChainLink, *parameters: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        dynamics = link.dynamics
        if dynamics.fused:
            fired, spikes = dynamics.fire(link)
        else:
            spare, link.spare = link.spare, None
            fired = dynamics.fires(charged, out=spare)
            spikes = dynamics.spikes(fired)
        _fire(ctx, link, fired, spikes)
        setattr(ctx, STEP, link)
        return spikes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_spikes: Tensor | None) -> tuple[Tensor | None, ...]:
        link = _alive(getattr(ctx, STEP))
        if grad_spikes is None:
            return (None,) * len(ctx.needs_input_grad)
        grad_spikes = _laid_out(grad_spikes, link)
        grad_h, grads = link.dynamics.gradient_of_fire(
            grad_spikes, StepView.of(link), ctx.needs_input_grad[2:]
        )
        release_saved(ctx, STEP, FIRED)
        return grad_h, None, *grads


@graph.with_slots(LINK)
class _Reset(torch.autograd.Function):
    """The charged potential and the spikes, to the potential after a reset at once."""

    @staticmethod
    def forward(
        ctx: Any,
        charged: Tensor,
        spikes: Tensor,
        link: ChainLink,
        potential: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        dynamics = link.dynamics
        if dynamics.fused:
            after = dynamics.finish(link)
        else:
            after = dynamics.reset(charged, link.fired.binary(), dynamics.reset_signal(potential))
        link.reach(after, charged, output=0)
        setattr(
            ctx, LINK, weakref.ref(link)
        )  # the nodes below hold it; no loss may ever come by here and let go of it
        return after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_potential: Tensor | None) -> tuple[Tensor | None, ...]:
        link = getattr(ctx, LINK)
        link = _alive(link and link())
        if grad_potential is None:
            return (None,) * len(ctx.needs_input_grad)
        learned = ctx.needs_input_grad[4:]
        grad_h, grad_spikes, grads = link.dynamics.gradient_of_reset(
            grad_potential, StepView.of(link), learned
        )
        release_saved(ctx, LINK)
        return grad_h, grad_spikes, None, None, *grads


def _fire(ctx: Any, link: ChainLink, fired: Tensor | PackedSpikes, spikes: Tensor) -> None:
    """Keep the spikes as bits, for the layers above to find at the node that fired them."""
    if not isinstance(fired, PackedSpikes):  # a kernel packs them itself
        fired = PackedSpikes(
            fired.bool(), fired.dtype, link.dynamics.graded_factor, link.before.fired
        )
    link.fired = fired
    if not link.dynamics.spikes_carry_gradient:
        ctx.mark_non_differentiable(spikes)
    setattr(ctx, FIRED, Spikes(link.fired, spikes))


def _repeats(value: Recomputable | None, before: ChainLink) -> bool:
    """Whether a step is sure to see what the step before saw, so that both can be differentiated as
    one."""
    if (
        value is None
        or before.current is None
        or value.identity is None
        or get_settings().match_host_order
    ):
        return False
    return value.identity == before.current.identity


def _differentiate_layer_once(node: Any, link: ChainLink) -> None:
    """Where the steps up to this one have all seen the same, in the backward of the last of them:
    its node, its state."""
    if not link.repeats or torch.is_grad_enabled():
        return
    below, met = link, pass_cache().setdefault(REPEATED, set())
    if link in met:
        return
    currents = [node.next_functions[0]]
    while below.repeats:
        met.add(below)
        node, below = node.next_functions[1][0], below.before
        if graph.is_node_of(node, _Reset):
            node = node.next_functions[0][0]
        currents.append(node.next_functions[0])
    differentiate_once(currents, largest=link.fired.shape.numel())


def _laid_out(grad_spikes: Tensor | None, link: ChainLink) -> Tensor | None:
    """The gradient at contiguous spikes, contiguous too: element by element, two memory formats at
    a time are slow. (The layer above may have read the spikes in another one.)"""
    if grad_spikes is None or grad_spikes.dim() != 4 or link.fired.strides is not None:
        return grad_spikes
    return (
        grad_spikes.contiguous()
        if grad_spikes.is_contiguous(memory_format=torch.channels_last)
        else grad_spikes
    )


def _alive(link: ChainLink | None) -> ChainLink:
    """The state of a node's time step.

    Raises:
        RuntimeError: a backward has let go of it, or a parameter has been written into since.
    """
    if link is None:
        raise RuntimeError(SECOND_PASS)
    link.dynamics.check_unchanged()
    return link

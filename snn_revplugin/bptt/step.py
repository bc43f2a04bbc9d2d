"""One time step of a reversible neuron in autograd Functions: for snnTorch, and for SpikingJelly's
step mode 's'.

A gradient can be taken, or changed by a hook, wherever the host's graph has an edge. So a step is
one, two or three nodes, as it is in the host (:class:`..neurons.transition.GraphNodes`), and one
more where the input charges a synaptic current first.

Forward keeps the spikes as bits, the input as a recipe (or the outputs, of a neuron that is
recomputed from them) and a link in the chain of states. Backward has the step's states from the
chain, applies the derivative in closed form, and hands the states before the step down. No graph
of the neuron is built, unless the gradient is to be differentiated again.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from ..neurons.differentiable import differentiable_outputs, differentiable_step
from ..neurons.transition import Gradients, GraphNodes, States, StepParts, Transition
from ..packed.spikes import PackedSpikes
from ..replay import (
    FIRED,
    CallInStep,
    HeldTensor,
    Recomputable,
    attach_inverse_recipe,
    attach_recipes,
    observe,
)
from ..settings import get_settings
from ..torch_internals import capture, graph, heap
from ..torch_internals.function import release_saved
from ..torch_internals.pass_cache import pass_cache
from ..torch_internals.saved_tensors import apply_and_release, save_edges, saved_with_edges
from ..torch_internals.unseen import is_unseen, notes_hooks
from .anchors import Anchoring, anchoring_of, is_gentle
from .chain import LINK, SYNAPSE, ChainLink, StepView, start_from
from .double_backward import (
    ChargedOfStep,
    InputsOfPotential,
    InputsOfStep,
    differentiate_with_graph,
)
from .outputs import offer, recovered_input
from .record import NeuronRecord
from .repeated_input import differentiate_once

STEP = "snn_revplugin_step"  # where the node that fired has the link of its time step
NORM_WITHIN = 6  # graph nodes below a neuron in which a batch norm is looked for
REPEATED = "time steps whose layer is differentiated with that of later ones"
SECOND_PASS = (
    "Trying to backward through a reversible neuron's time step a second time (or its spikes were"
    " freed by a backward without retain_graph). Specify retain_graph=True if you need to backward"
    " through the graph a second time, or detach the membrane potential between two sequences."
)


def step(
    transition: Transition, current: Tensor, states: States, record: NeuronRecord
) -> tuple[Tensor, States]:
    """One time step.

    Args:
        transition: the neuron's equations.
        current: the input x, floating point, of any shape.
        states: the states before, of the same shape. If they are what an earlier step of the same
            ``transition`` returned, unmodified, the two steps form a chain; other states start one.
        record: the neuron's own.

    Returns:
        The outputs and the states after the step, bit for bit those of the host's neuron. The
        outputs of a neuron that is recomputed from them must not be written into before backward.

    Raises:
        ValueError: the shape does not suit the neuron.
    """
    in_step = observe(record.cache, current)
    value = None if transition.from_outputs else _input_of(transition, current, record, in_step)
    transition = record.backend.select(transition, current, states)
    before = start_from(states, transition)
    link = ChainLink(before, transition, value, _anchoring(transition, current, states, before))
    outputs, after = _take(transition, current, states, link)
    link.parts = None
    if in_step is not None:
        link.in_step = in_step.step
        in_step.holds(link.fired.nbytes + link.kept_bytes)
    heap.chain_has_come_to(link.index, states[0])
    link.repeats = _repeats(value, before)
    before.continue_with(link)
    if transition.from_outputs:
        inverse = recovered_input(transition, link.outputs, link.fired)
        attach_inverse_recipe(current, inverse, record)
    elif value is not None:
        value.add_reader()
    interval = link.anchoring.interval if link.can_be_repeated else 1
    record.statistics.took_step(link.fired, interval, link.kept_bytes, transition.from_outputs)
    return outputs, after


def _input_of(
    transition: Transition, current: Tensor, record: NeuronRecord, in_step: CallInStep | None
) -> Recomputable | None:
    """How backward recomputes a step's input; None if it is not known from spikes or data."""
    value = attach_recipes(current, record, call=in_step)
    # Without it both states would have to be kept of a neuron with a synaptic current.
    if value is None and (transition.reads_input or transition.has_synapse):
        return HeldTensor(current.detach().clone())  # from which all else follows
    return value


def _anchoring(
    transition: Transition, current: Tensor, states: States, before: ChainLink
) -> Anchoring:
    """Where the anchors of the chain stand: where they stood at the step before, if nothing that
    decides it can have changed. (The second step of a chain may be the first of its dtype.)"""
    earlier, on_cpu = before.anchoring, current.is_cpu
    gentle = not transition.invertible or is_gentle(transition)
    if before.index > 1 and on_cpu and gentle and earlier.settings is get_settings():
        return earlier
    return anchoring_of(transition, states, _magnifies_errors(transition, current))


def _magnifies_errors(transition: Transition, current: Tensor) -> bool:
    """Whether a batch norm made the input, at most a few operations (views, pooling, a sum) before;
    asked of steep surrogates, which alone have to know."""
    asks = transition.invertible and capture.may_synchronise(current)
    if not asks or is_gentle(transition):
        return False
    node = current.grad_fn
    for _ in range(NORM_WITHIN):
        if node is None or hasattr(node, FIRED):
            return False
        if "BatchNorm" in graph.name_of(node):
            return True
        node = node.next_functions[0][0] if node.next_functions else None
    return False


def _take(
    transition: Transition, current: Tensor, states: States, link: ChainLink
) -> tuple[Tensor, States]:
    """The step as one to four graph nodes."""
    parameters, given = transition.parameters, ()
    if transition.nodes is GraphNodes.ONE:
        given = apply_and_release(_Step, current, link, len(states), *states, *parameters)
        return given[0], tuple(given if transition.fed_back else given[1:])
    if transition.has_synapse:
        synapse = apply_and_release(_Synapse, current, link, states, states[0], *parameters)
        given, current, states = synapse[:1], synapse[-1], states[1:]
    charged = apply_and_release(_Charge, current, link, len(states), *states, *parameters)
    if transition.fires_with_charge:
        link.given_out = weakref.ref(charged[-1])
    outputs = apply_and_release(_Fire, charged[-1], link, *parameters)
    if transition.nodes is GraphNodes.FIRE:
        return outputs, (*given, *charged)
    after = apply_and_release(_Reset, charged[0], outputs, link, *parameters)
    return outputs, (*given, after)


@graph.with_slots(LINK, FIRED)
class _Step(torch.autograd.Function):
    """Charge, fire and reset as one node."""

    @staticmethod
    def forward(
        ctx: Any, current: Tensor, link: ChainLink, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        states, transition = tensors[:count], link.transition
        parts = transition.begin(current, states)
        fired, outputs = parts.fire()
        after = parts.states()
        _keep_reset_signal(link, parts)
        _keep_spikes(ctx, link, fired, outputs)
        link.reach(after, parts)
        setattr(ctx, LINK, link)
        save_edges(ctx, (current, *states), InputsOfStep(link))
        return outputs, *after[transition.fed_back :]

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor | None, *grad_states: Tensor | None) -> Gradients:
        link = _alive(getattr(ctx, LINK))
        transition = link.transition
        count = len(grad_states) + transition.fed_back
        if grad_outputs is None and not any(each is not None for each in grad_states):
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            given, inputs = (grad_outputs, *grad_states), saved_with_edges(ctx, InputsOfStep(link))
            own = transition.at(link)
            at_inputs, grads = differentiate_with_graph(_whole_step, own, inputs, given)
            return at_inputs[0], None, None, *at_inputs[1:], *grads
        _differentiate_layer_once(ctx, link)
        grad_outputs = _laid_out(grad_outputs, link)
        view = StepView.of(link)
        needed = ctx.needs_input_grad[3 + count :]
        grad_x, grad_before, grads = transition.vjp(view, grad_outputs, grad_states, needed)
        view.close()
        heap.chain_has_come_to(link.index, grad_x)
        release_saved(ctx, LINK, FIRED)
        return grad_x, None, None, *grad_before, *grads


def _whole_step(transition: Transition, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    outputs, after = differentiable_step(transition, x, states)
    return outputs, *after[transition.fed_back :]


@graph.with_slots(SYNAPSE)
class _Synapse(torch.autograd.Function):
    """The input and the synaptic current before, to the one after: as it is given out, and as the
    potential is charged by it, if these are not one. The first node of a step that has it."""

    @staticmethod
    def forward(
        ctx: Any, current: Tensor, link: ChainLink, states: States, *tensors: Tensor
    ) -> States:
        ctx.set_materialize_grads(False)
        transition = link.transition
        link.parts = transition.begin(current, states)
        synapse = link.parts.synapse
        setattr(ctx, SYNAPSE, link)
        save_edges(ctx, (current, tensors[0]), InputsOfStep(link))
        return (synapse, synapse.detach()) if transition.synapse_read_within else (synapse,)

    @staticmethod
    def backward(ctx: Any, *grad_synapse: Tensor | None) -> Gradients:
        link = _alive(getattr(ctx, SYNAPSE))
        given = [each for each in grad_synapse if each is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        grad = given[0] if len(given) == 1 else given[0] + given[1]
        if torch.is_grad_enabled():
            inputs = saved_with_edges(ctx, InputsOfStep(link))
            at_inputs, grads = differentiate_with_graph(
                _integrate, link.transition, inputs, (grad,)
            )
            return at_inputs[0], None, None, at_inputs[1], *grads
        _differentiate_layer_once(ctx, link)
        view, needed = StepView.of(link), ctx.needs_input_grad[4:]
        grad_x, grad_before, grads = link.transition.vjp_of_synapse(view, grad, needed)
        view.close()
        heap.chain_has_come_to(link.index, grad_x)
        release_saved(ctx, SYNAPSE)
        return grad_x, None, None, *grad_before, *grads


def _integrate(transition: Transition, x: Tensor, synapse: Tensor) -> States:
    return (transition.integrate(x, synapse),)


@graph.with_slots(LINK)
@notes_hooks
class _Charge(torch.autograd.Function):
    """The input (the synaptic current, where that charges the potential) and the states before, to
    the states after, the membrane potential last; or to the charged potential, where a node of its
    own resets."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, link: ChainLink, count: int, *tensors: Tensor) -> States:
        ctx.set_materialize_grads(False)
        states, transition = tensors[:count], link.transition
        # Where there is a synaptic current, its node has begun the step.
        parts = link.parts = link.parts or transition.begin(current, states)
        _keep_reset_signal(link, parts)
        setattr(ctx, LINK, link)
        after = (parts.charged,)
        if transition.nodes is GraphNodes.FIRE:
            after = parts.states()
            link.reach(after, parts)
            after = after[transition.has_synapse :]
        save_edges(ctx, (current, *states), _inputs_of_charge(link))
        return after

    @staticmethod
    def backward(ctx: Any, *grad_charged: Tensor | None) -> Gradients:
        link = _alive(getattr(ctx, LINK))
        view = StepView.of(link)
        grad_outputs, view.grad_outputs = view.grad_outputs, None
        if grad_outputs is None and all(each is None for each in grad_charged):
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            inputs = saved_with_edges(ctx, _inputs_of_charge(link))
            at_inputs, grads = differentiate_with_graph(
                _charge, link.transition.at(link), inputs, grad_charged
            )
            return at_inputs[0], None, None, *at_inputs[1:], *grads
        is_last = not link.transition.has_synapse
        if is_last:
            _differentiate_layer_once(ctx, link)
        needed = ctx.needs_input_grad
        needed = needed[len(needed) - len(link.transition.parameters) :]
        if grad_outputs is None:
            grad_x, grad_before, grads = link.transition.vjp_of_charge(view, grad_charged, needed)
        else:
            grad_x, grad_before, grads = link.transition.vjp(
                view, grad_outputs, grad_charged, needed
            )
        if is_last:
            view.close()
            heap.chain_has_come_to(link.index, grad_x)
        release_saved(ctx, LINK)
        return grad_x, None, None, *grad_before, *grads


def _inputs_of_charge(link: ChainLink) -> InputsOfStep | InputsOfPotential:
    return (InputsOfPotential if link.transition.has_synapse else InputsOfStep)(link)


def _charge(transition: Transition, x: Tensor, *states: Tensor) -> States:
    return transition.charge_again(x, states)


@graph.with_slots(STEP, FIRED)
class _Fire(torch.autograd.Function):
    """The charged potential to spikes."""

    @staticmethod
    def forward(ctx: Any, charged: Tensor, link: ChainLink, *parameters: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        fired, outputs = link.parts.fire()
        _keep_spikes(ctx, link, fired, outputs)
        setattr(ctx, STEP, link)
        save_edges(ctx, (charged,), ChargedOfStep(link))
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor | None) -> Gradients:
        link = _alive(getattr(ctx, STEP))
        if grad_outputs is None:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            inputs = saved_with_edges(ctx, ChargedOfStep(link))
            (grad_charged,), grads = differentiate_with_graph(
                _fire, link.transition, inputs, (grad_outputs,)
            )
            return grad_charged, None, *grads
        view, needed = StepView.of(link), ctx.needs_input_grad[2:]
        grad_outputs = _laid_out(grad_outputs, link)
        if link.given_out is not None and is_unseen(ctx, link.given_out):
            view.grad_outputs = grad_outputs  # the node that charges differentiates both
            grad_charged, grads = None, (None,) * len(needed)
        else:
            grad_charged, grads = link.transition.vjp_of_fire(view, grad_outputs, needed)
        release_saved(ctx, STEP, FIRED)
        return grad_charged, None, *grads


def _fire(transition: Transition, charged: Tensor) -> tuple[Tensor]:
    return (differentiable_outputs(transition, charged),)


@graph.with_slots(LINK)
class _Reset(torch.autograd.Function):
    """The charged potential and the spikes, to the potential after an immediate reset."""

    @staticmethod
    def forward(
        ctx: Any, charged: Tensor, outputs: Tensor, link: ChainLink, *parameters: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        states = link.parts.states()
        link.reach(states, link.parts)
        # The nodes below hold it; no loss may ever reach this node, which would release it.
        setattr(ctx, LINK, weakref.ref(link))
        save_edges(ctx, (charged, outputs), ChargedOfStep(link))
        return states[-1]

    @staticmethod
    def backward(ctx: Any, grad_after: Tensor | None) -> Gradients:
        reference = getattr(ctx, LINK)
        link = _alive(reference and reference())
        if grad_after is None:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            signal = StepView.of(link).reset_signal
            at_inputs, grads = differentiate_with_graph(
                lambda transition, h, s: _reset(transition, h, s, signal),
                link.transition,
                saved_with_edges(ctx, ChargedOfStep(link)),
                (grad_after,),
            )
            return *at_inputs, None, *grads
        view, needed = StepView.of(link), ctx.needs_input_grad[3:]
        grad_charged, grad_outputs, grads = link.transition.vjp_of_reset(
            view, (grad_after,), needed
        )
        release_saved(ctx, LINK)
        return grad_charged, grad_outputs, None, *grads


def _reset(
    transition: Transition, charged: Tensor, outputs: Tensor, signal: Tensor | None
) -> tuple[Tensor]:
    factor = transition.graded_factor
    fired = outputs if factor is None else outputs / transition.factor
    return (transition.reset(charged, fired, signal),)


def _keep_reset_signal(link: ChainLink, parts: StepParts) -> None:
    """Keep what a delayed reset acted on: no reset is decided again."""
    transition, before = link.transition, link.before
    if not transition.has_reset_signal:
        return
    if transition.reset_follows_spikes and before.fired is not None:
        link.reset_signal = before.fired
    else:
        signal = parts.reset_signal
        link.reset_signal = PackedSpikes(signal, signal.dtype)


def _keep_spikes(
    ctx: Any, link: ChainLink, fired: Tensor | PackedSpikes | Recomputable, outputs: Tensor
) -> None:
    """Keep the spikes as bits, and offer the outputs to the layers above at the node that fired."""
    if isinstance(fired, Tensor):  # a kernel packs them itself
        dtype = outputs.dtype if fired.dtype is torch.bool else fired.dtype
        factor, below = link.transition.graded_factor, link.before.fired
        before = below if isinstance(below, PackedSpikes) else None
        fired = PackedSpikes(fired, dtype, factor, before)
    link.fired = fired
    if not link.transition.spikes_carry_gradient:
        ctx.mark_non_differentiable(outputs)
    offered = offer(link.transition, fired, outputs)
    if link.transition.from_outputs:
        link.outputs = offered
    setattr(ctx, FIRED, offered)


def _repeats(value: Recomputable | None, before: ChainLink) -> bool:
    """Whether a step is sure to see what the step before saw, so that both can be differentiated as
    one."""
    if value is None or before.current is None or value.identity is None:
        return False
    return not get_settings().match_host_order and value.identity == before.current.identity


def _differentiate_layer_once(node: Any, link: ChainLink) -> None:
    """Where the steps up to this one have all seen the same, in the backward of the last of them:
    its node, its link."""
    if not link.repeats:
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


def _laid_out(grad_outputs: Tensor | None, link: ChainLink) -> Tensor | None:
    """The gradient at contiguous spikes, contiguous too: element by element, two memory formats at
    a time are slow. (The layer above may have read the spikes in another one.)"""
    if grad_outputs is None or grad_outputs.dim() != 4 or link.fired.strides is not None:
        return grad_outputs
    if grad_outputs.is_contiguous(memory_format=torch.channels_last):
        return grad_outputs.contiguous()
    return grad_outputs


def _alive(link: ChainLink | None) -> ChainLink:
    """The link of a node's time step.

    Raises:
        RuntimeError: a backward has released it, or a parameter was written into since.
    """
    if link is None:
        raise RuntimeError(SECOND_PASS)
    if link.in_step is not None:
        link.in_step.end()
    link.transition.check_unchanged()
    if link.index == 1:  # once per chain
        link.transition.check_values()
    return link

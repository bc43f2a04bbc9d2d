"""A call of a module on a whole sequence as one autograd Function: for neurons that have no single
time step (parallel spiking neurons, convolutions over time), or whose sequences are not their
steps.

The outputs are kept as a time step's are (bits, where they are spikes), the input as a recipe, and
nothing from inside the call. Backward runs the call of that one layer once more, with a graph, and
differentiates it; some rows at a time, where the call mixes no rows (:mod:`.rows`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..neurons.differentiable import differentiable_step
from ..neurons.transition import Derivative, Gradients, Needed, States
from ..packed.spikes import PackedSpikes
from ..replay import FIRED, HeldTensor, Recomputable, attach_recipes
from ..torch_internals import graph
from ..torch_internals.function import release_saved
from ..torch_internals.saved_tensors import apply_and_release, save_edges, saved_with_edges
from ..torch_internals.versioned import Versioned
from .any_neuron import AnyNeuron
from .chain import INITIAL, initial
from .double_backward import differentiate_with_graph
from .left import let_go
from .outputs import PackedOutputs, offer
from .record import NeuronRecord
from .rows import rows_of
from .step import SECOND_PASS
from .surroundings import Surroundings


class Call:
    """A call, and what is kept of it: what the derivative of a step reads.

    Args:
        transition: runs the module.
        inputs: the input, as backward recomputes it.
        states: before the call.
    """

    def __init__(self, transition: AnyNeuron, inputs: Recomputable, states: States) -> None:
        self.transition, self.inputs = transition, inputs
        self._states = tuple(Versioned(initial(each)) for each in states)
        self.surroundings: Surroundings | None = None
        self.fired: PackedSpikes | PackedOutputs | None = None
        self.local_graph = None

    @property
    def link(self) -> Call:
        """Itself: it stands for the step whose view it is, and for that step's link."""
        return self

    @property
    def before(self) -> States:
        """The states before the call."""
        return tuple(each.get(INITIAL) for each in self._states)

    @torch.no_grad()
    def __call__(self, position: int) -> Tensor:
        """The input, or a state, for a gradient that is differentiated again."""
        return self.inputs.compute() if position == 0 else self.before[position - 1]


def whole_call(
    module: nn.Module, transition: AnyNeuron, x: Tensor, states: States, record: NeuronRecord
) -> tuple[Tensor, States]:
    """A call of a module.

    Args:
        module: it.
        transition: of the module.
        x: the input, floating point, of any shape.
        states: before the call; they need not have the input's shape.
        record: the neuron's own.

    Returns:
        The outputs; and the states after the call, with whatever else the call gives out.
    """
    value = attach_recipes(x, record)
    call = Call(transition, value or HeldTensor(x.detach().clone()), states)
    transition = record.backend.select(transition, x, states)
    parameters = transition.parameters
    outputs, *after = apply_and_release(_Call, x, call, len(states), *states, *parameters)
    call.inputs.add_reader()
    let_go(module, outputs)
    record.statistics.took_step(call.fired, None, 0, keeps_outputs=False)
    return outputs, tuple(after)


@graph.with_slots("call", FIRED)
class _Call(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, call: Call, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        states, transition = tensors[:count], call.transition
        parts = transition.begin(x, states)
        call.surroundings = parts.surroundings
        fired, outputs = parts.fire()
        call.fired = PackedSpikes(fired, outputs.dtype) if isinstance(fired, Tensor) else fired
        setattr(ctx, FIRED, offer(transition, call.fired, outputs))
        ctx.call, ctx.count = call, count
        given = outputs, *parts.states()
        ctx.mark_non_differentiable(*(given[i] for i in transition.traits.detached))
        save_edges(ctx, (x, *states), call)
        return given

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor | None, *others: Tensor | None) -> Gradients:
        call: Call = ctx.call
        if call is None:
            raise RuntimeError(SECOND_PASS)
        if grad_outputs is None and not any(each is not None for each in others):
            return (None,) * len(ctx.needs_input_grad)
        transition = call.transition
        transition.check_unchanged()
        if torch.is_grad_enabled():
            inputs, given = saved_with_edges(ctx, call), (grad_outputs, *others)
            at_inputs, grads = differentiate_with_graph(_run, transition.at(call), inputs, given)
            return at_inputs[0], None, None, *at_inputs[1:], *grads
        needed = ctx.needs_input_grad[3 + ctx.count :]
        grad_x, grad_before, grads = _vjp(call, (grad_outputs, *others), needed)
        release_saved(ctx, "call", FIRED)
        return grad_x, None, None, *grad_before, *grads


class _Part:
    """Some rows of a call, as the derivative of a step reads them."""

    def __init__(self, call: Call, current: Tensor, *before: Tensor) -> None:
        self.link, self.current, self.before = call, current, before


def _vjp(call: Call, gradients: Gradients, needed: Needed) -> Derivative:
    """The derivative of a call, part by part."""
    (x, owned), before, rows = call.inputs.consume(), call.before, call.transition.traits.rows
    parts = [] if rows is None else list(rows.parts(x))
    if len(parts) <= 1:
        return call.transition.vjp(_Part(call, x, *before), gradients[0], gradients[1:], needed)
    # A part's input is not read any more once its gradient is there.
    grad_x = x if owned else torch.empty_like(x)
    at_states, at_parameters = [[] for _ in before], [None] * len(needed)
    for first, count in parts:
        part = _Part(call, *rows_of((x, *before), rows.inputs, first, count))
        given = rows_of(gradients, rows.given, first, count)
        found, at_before, grads = call.transition.vjp(part, given[0], given[1:], needed)
        grad_x.narrow(rows.inputs[0], first, count).copy_(found)
        for each, gradient in zip(at_states, at_before, strict=True):
            each.append(gradient)
        for i, gradient in enumerate(grads):
            at_parameters[i] = _sum(at_parameters[i], gradient)
    grad_before = tuple(
        None if each[0] is None else torch.cat(each, dim)
        for each, dim in zip(at_states, rows.inputs[1:], strict=True)
    )
    return grad_x, grad_before, tuple(at_parameters)


def _sum(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    return gradient if total is None or gradient is None else total + gradient


def _run(transition: AnyNeuron, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    outputs, after = differentiable_step(transition, x, states)
    return outputs, *after

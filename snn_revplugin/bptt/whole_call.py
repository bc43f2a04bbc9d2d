"""A call of a module on a whole sequence as one autograd Function: for neurons that have no single
time step (parallel spiking neurons, convolutions over time), or whose sequences are not their
steps.

The outputs are kept as a time step's are (bits, where they are spikes), the input as a recipe, and
nothing from inside the call. Backward runs the call of that one layer once more, with a graph, and
differentiates it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..neurons.differentiable import differentiable_step
from ..neurons.transition import Gradients, States
from ..packed.spikes import PackedSpikes
from ..replay import FIRED, HeldTensor, Recomputable, attach_recipes
from ..torch_internals import graph
from ..torch_internals.function import release_saved
from ..torch_internals.saved_tensors import apply_and_release, save_edges, saved_with_edges
from ..torch_internals.versioned import Versioned
from .any_neuron import AnyNeuron
from .chain import INITIAL, initial
from .double_backward import differentiate_with_graph
from .outputs import PackedOutputs, offer
from .record import NeuronRecord
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
    def current(self) -> Tensor:
        """The input."""
        return self.inputs.value()

    @property
    def before(self) -> States:
        """The states before the call."""
        return tuple(each.get(INITIAL) for each in self._states)

    @torch.no_grad()
    def __call__(self, position: int) -> Tensor:
        """The input, or a state, for a gradient that is differentiated again."""
        return self.inputs.compute() if position == 0 else self.before[position - 1]


def whole_call(
    transition: AnyNeuron, x: Tensor, states: States, record: NeuronRecord
) -> tuple[Tensor, States]:
    """A call of a module.

    Args:
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
        grad_x, grad_before, grads = transition.vjp(call, grad_outputs, others, needed)
        release_saved(ctx, "call", FIRED)
        return grad_x, None, None, *grad_before, *grads


def _run(transition: AnyNeuron, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    outputs, after = differentiable_step(transition, x, states)
    return outputs, *after

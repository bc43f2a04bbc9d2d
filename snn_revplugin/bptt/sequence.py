"""T time steps of a reversible neuron in one autograd Function: for SpikingJelly's step mode 'm'.

Of the path of the states only the first is kept. Backward recomputes the inputs of all steps (or
reads the outputs, of a neuron that is recomputed from them), scans forward once more, exactly
whatever the reset, and walks back in closed form (:meth:`..neurons.transition.Transition.scan`).

Inside saved-tensor hooks of another tool (a checkpoint, ``save_on_cpu``) no recipe can be attached.
There the charged potentials are saved, through those hooks, and nothing else: 4 bytes per neuron
and step in float32, where SpikingJelly's neurons on a CPU save 4 (soft reset), 8 (detached) or 12.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..neurons.differentiable import differentiable_sequence
from ..neurons.transition import (
    Gradients,
    KeptSequence,
    SequenceGradients,
    States,
    Transition,
)
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
from ..torch_internals import graph, saved_tensors
from ..torch_internals.function import release_saved
from ..torch_internals.versioned import Versioned
from .chain import INITIAL, initial
from .double_backward import differentiate_with_graph
from .outputs import HeldOutputs, offer, recovered_input
from .record import NeuronRecord
from .step import SECOND_PASS


@dataclass(eq=False)
class SequenceCall:
    """A call of T time steps, and what is kept of it.

    Attributes:
        transition: the neuron's equations.
        inputs: the inputs, as backward recomputes them; None where the charged potentials are kept.
        with_path: whether the first state after every step is given out too.
        hooked: whether hooks of another tool decide how tensors are saved.
        record: the neuron's own.
        in_step: the call as part of a training step under a memory budget.
    """

    transition: Transition
    inputs: Recomputable | None
    with_path: bool
    hooked: bool
    record: NeuronRecord
    in_step: CallInStep | None = None
    start: tuple[Versioned, ...] = ()
    packed: PackedSpikes | None = None
    outputs: HeldOutputs | None = None
    charged: Tensor | None = None

    def kept(self, dtype: torch.dtype) -> KeptSequence:
        """What backward has."""
        start = tuple(each.get(INITIAL) for each in self.start)
        outputs = None if self.outputs is None else self.outputs.value()
        return KeptSequence(start, dtype, self.inputs, self.charged, self.packed, outputs)


def sequence(
    transition: Transition,
    currents: Tensor,
    states: States,
    record: NeuronRecord,
    with_path: bool = False,
) -> tuple[Tensor, States, Tensor | None]:
    """T time steps.

    Args:
        transition: the neuron's equations.
        currents: the inputs, ``[T, ...]`` with T at least 1, floating point.
        states: the states before the first step, of the shape of one input.
        record: the neuron's own.
        with_path: whether the first state after every step is wanted too.

    Returns:
        The outputs ``[T, ...]``, the states after the last step, and the first states ``[T, ...]``
        or None. The outputs of a neuron that is recomputed from them must not be written into
        before backward.

    Raises:
        ValueError: the neuron takes single steps only, or the shape does not suit it.
    """
    if transition.single_steps_only:
        raise ValueError(
            f"transition: {type(transition).__name__} with an immediate reset that reads the state"
            " before takes single steps only"
        )
    hooked, value = saved_tensors.saved_tensor_hooks_active(), None
    in_step = None if hooked else observe(record.cache, currents)
    if not hooked:
        if not transition.from_outputs:
            value = _inputs_of(transition, currents, record, in_step)
        transition = record.backend.select(transition, currents, states)
        value = transition.inputs_for_scan(value, currents, states)
    call = SequenceCall(transition, value, with_path, hooked, record, in_step)
    parameters = transition.parameters
    apply = _Sequence.apply if hooked else partial(saved_tensors.apply_and_release, _Sequence)
    outputs, *after = apply(currents, call, len(states), *states, *parameters)
    path = after.pop() if with_path else None
    if transition.from_outputs and not hooked:
        inverse = recovered_input(transition, call.outputs, call.packed, time=True)
        attach_inverse_recipe(currents, inverse, record)
    return outputs, tuple(after), path


def _inputs_of(
    transition: Transition, currents: Tensor, record: NeuronRecord, in_step: CallInStep | None
) -> Recomputable | None:
    """How backward recomputes the inputs of a sequence; None if they are not known from spikes."""
    value = attach_recipes(currents, record, not transition.has_reset_signal, in_step)
    if value is None and transition.reads_input:
        return HeldTensor(currents.detach().clone())  # from which all else follows
    return value


class _InputsOfSequence:
    """Recomputes the inputs of a sequence and gives the states before it, for a gradient that is
    differentiated again."""

    __slots__ = ("call",)

    def __init__(self, call: SequenceCall) -> None:
        self.call = call

    @torch.no_grad()
    def __call__(self, position: int) -> Tensor:
        return self._inputs() if position == 0 else self.call.start[position - 1].get(INITIAL)

    def _inputs(self) -> Tensor:
        call, plain = self.call, self.call.transition.plain
        if call.inputs is not None:
            return call.inputs.compute()
        if plain.from_outputs:
            return plain.recover_inputs(call.packed, True, call.outputs.value())
        v, currents, steps = call.start[0].get(INITIAL), [], call.packed.steps()
        for t, h in enumerate(call.charged):
            signal = plain.reset_signal_at(v)
            currents.append(plain.recover_current(h, v, signal))
            v = plain.reset(h, steps.binary(t), signal)
        return torch.stack(currents)


@graph.with_slots("call", "types", FIRED)
class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, currents: Tensor, call: SequenceCall, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        transition, states = call.transition, tensors[:count]
        keeps_inputs = transition.from_outputs or transition.reads_input
        keep_charged = call.inputs is None and not keeps_inputs
        scan = transition.scan(currents, states, keep_charged, call.with_path)
        scan = scan._replace(outputs=transition.plain.laid_out(scan.outputs, currents))
        if call.inputs is not None:
            call.inputs.add_reader()
        if not transition.spikes_carry_gradient:
            ctx.mark_non_differentiable(scan.outputs)
        ctx.call, ctx.types = call, (currents.dtype, tuple(each.dtype for each in states))
        _keep(ctx, call, scan, currents, states)
        return (scan.outputs, *scan.states, *((scan.path,) if call.with_path else ()))

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor | None, *others: Tensor | None) -> Gradients:
        call: SequenceCall = ctx.call
        if call is None:
            raise RuntimeError(SECOND_PASS)
        if call.in_step is not None:
            call.in_step.step.end()
        if grad_outputs is None and not any(each is not None for each in others):
            return (None,) * len(ctx.needs_input_grad)
        call.transition.check_unchanged()
        call.transition.check_values()
        grad_states, grad_path = (others[:-1], others[-1]) if call.with_path else (others, None)
        if torch.is_grad_enabled():
            return _differentiate_again(ctx, call, (grad_outputs, *others))
        count = len(grad_states)
        gradients = SequenceGradients(grad_outputs, grad_states, grad_path)
        needed = ctx.needs_input_grad[3 + count :]
        grad_x, grad_before, grads = call.transition.vjp_of_scan(
            _kept_by(ctx, call), gradients, needed
        )
        release_saved(ctx, "call", FIRED)
        grad_before = (g.to(dtype) for g, dtype in zip(grad_before, ctx.types[1], strict=True))
        return grad_x, None, None, *grad_before, *grads


def _keep(ctx: Any, call: SequenceCall, scan: Any, currents: Tensor, states: States) -> None:
    """Keep what backward needs: in the call, or through the hooks of another tool."""
    transition, statistics = call.transition, call.record.statistics
    if call.hooked:
        kept = currents if transition.reads_input else scan.charged
        first = states if transition.reads_before or transition.reads_input else ()
        ctx.save_for_backward(kept, *first)
        statistics.took_sequence_through_hooks(kept)
        return
    call.start = tuple(Versioned(initial(each)) for each in states)
    call.packed, call.charged = scan.fired, scan.charged
    offered = offer(transition, scan.fired, scan.outputs)
    if transition.from_outputs:
        call.outputs = offered
    setattr(ctx, FIRED, offered)
    statistics.took_sequence(scan.fired, scan.charged, transition.from_outputs)
    if call.in_step is not None:
        charged = 0 if scan.charged is None else scan.charged.nbytes
        call.in_step.holds(scan.fired.nbytes + charged)
    saved_tensors.save_edges(ctx, (currents, *states), _InputsOfSequence(call))


def _kept_by(ctx: Any, call: SequenceCall) -> KeptSequence:
    """What backward has, from the call or from the hooks of another tool."""
    if not call.hooked:
        return call.kept(ctx.types[0])
    kept, *start = ctx.saved_tensors
    if call.transition.reads_input:
        return KeptSequence(tuple(start), ctx.types[0], inputs=HeldTensor(kept))
    return KeptSequence(tuple(start) or (None,), ctx.types[0], charged=kept)


def _differentiate_again(ctx: Any, call: SequenceCall, grads: Gradients) -> Gradients:
    """The derivative with a graph of its own, for a gradient that is differentiated again."""
    if call.hooked:
        raise RuntimeError(
            "create_graph=True is not supported for a reversible neuron inside saved-tensor hooks"
            " (a checkpoint, save_on_cpu): set reversible=False for it, or take it out of them"
        )

    def run(transition: Transition, currents: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        outputs, after, path = differentiable_sequence(transition, currents, states)
        return (outputs, *after, *((path,) if call.with_path else ()))

    inputs = saved_tensors.saved_with_edges(ctx, _InputsOfSequence(call))
    at_inputs, at_parameters = differentiate_with_graph(run, call.transition, inputs, grads)
    return at_inputs[0], None, None, *at_inputs[1:], *at_parameters

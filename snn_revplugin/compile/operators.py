"""The neurons as operators, for ``torch.compile``: opaque where bits matter, open where the
compiler may recompute.

A compiled graph is not walked, as :mod:`..replay` walks that of autograd: the compiler decides what
is kept for backward and what is recomputed. So each neuron is an operator of two layers:

* what the compiler sees through: spikes unpacked from bits, or compared with the threshold; reset;
  in single steps the derivative. These are plain torch operations, so a spike that the next layer's
  backward reads is recomputed from its bit.
* what it does not: the charge of a time step, and T time steps forward and backward. They are
  computed by the code that runs without a compiler, with the same bits, however a compiler would
  have rounded (a fused multiply-add moves a spike).

What backward reads, and so at most what is kept:

    T steps         spikes as bits, the first state, and the inputs (of a neuron that is recomputed
                    from its outputs, these); the states are scanned once more
    a time step     the charged potential, from which spikes and reset follow; with learned
                    parameters the potential before

A time step of a neuron that is recomputed from its outputs is a sequence of one step. In the graph
a neuron's equations are :class:`.equations.Equations`; tensors, learned or not, are ``parameters``.
Compilers keep graphs on disk by the names of operators, not by what is traced through them: a
change of what these do needs new names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

from ..neurons.transition import KeptSequence, SequenceGradients, States, Transition
from ..packed.codec import BITS, unpack_bits
from ..packed.spikes import PackedSpikes, contiguous
from ..replay import HeldTensor
from ..torch_internals import transforms
from ..torch_internals.function import once_differentiable
from ..torch_internals.tensors import PLAIN_TENSORS
from .equations import KINDS, Equations, Kind, backend_of, transition_of

NAMESPACE = "snn_revplugin"
STEP_KEEPS = "the charged potential of each time step, unless the compiler recomputes it"
SEQUENCE_KEEPS = (
    "spikes as bits, the first potential and the inputs, unless the compiler recomputes those"
)
OUTPUTS_KEEP = "its outputs, spikes as bits and the first potential"

# How torch's schemas call the types of arguments. (torch does not read these annotations itself:
# they are strings here.)
SCHEMA = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "list[Tensor]": "Tensor[]",
    "list[Tensor | None]": "Tensor?[]",
    "list[float]": "float[]",
    "list[str]": "str[]",
    "bool": "bool",
}


def opaque(function: Callable[..., tuple[Tensor, ...]]) -> CustomOpDef:
    """An operator of a function's name, arguments and results, which a compiler does not look
    into."""
    kinds = dict(function.__annotations__)
    results = ", ".join(["Tensor"] * kinds.pop("return").count("Tensor"))
    arguments = ", ".join(f"{SCHEMA[kind]} {name}" for name, kind in kinds.items())
    name, schema = f"{NAMESPACE}::{function.__name__}", f"({arguments}) -> ({results})"
    return custom_op(name, mutates_args=(), schema=schema)(function)


# -------------------------------------------------------------------------------------- a time step


@opaque
def charge(
    x: Tensor,
    v: Tensor,
    parameters: list[Tensor],
    names: list[str],
    numbers: list[float],
) -> tuple[Tensor, Tensor]:
    """The charged potential of one time step, in the strides of ``x``; and, of an immediate reset
    that reads the state before, the potential after it, whose rounding depends on more than zeros
    and ones. Elsewhere that is empty."""
    plain, backend = backend_of(Equations(names, numbers), parameters)
    parts = backend.select(plain, x, (v,)).begin(x, (v,))
    if not KINDS[names[0]].reset_reads_signal:
        return _in_strides_of(x, parts.charged), x.new_empty(0)
    parts.fire()
    (after,) = parts.states()
    return _in_strides_of(x, parts.charged), _in_strides_of(x, after)


@charge.register_fake
def _(x, v, parameters, names, numbers):
    has_after = KINDS[names[0]].reset_reads_signal
    return torch.empty_like(x), torch.empty_like(x) if has_after else x.new_empty(0)


def _in_strides_of(x: Tensor, tensor: Tensor) -> Tensor:
    like = torch.empty_like(x)
    return tensor if tensor.stride() == like.stride() else like.copy_(tensor)


class _TracedView:
    """A time step as a derivative sees it (:class:`..neurons.transition.StepView`) while the
    compiler traces it."""

    def __init__(self, transition: Transition, charged: Tensor, x: Tensor, before: States) -> None:
        self.transition, self.charged, self.current, self.before = transition, charged, x, before

    @property
    def fired(self) -> Tensor:
        return self.transition.fires(self.charged)

    @property
    def silent(self) -> Tensor:
        return 1.0 - self.fired

    @property
    def reset_signal(self) -> Tensor | None:
        return self.transition.reset_signal_at(self.before[0])


class _Step(torch.autograd.Function):
    """One time step; all but the charge is traced."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Tensor, equations: Equations, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        h, after = torch.ops.snn_revplugin.charge(x, v, parameters, *equations)
        transition = transition_of(equations, parameters, traced=True)
        with transforms.recomputed_when_compiled():
            fired = transition.fires(h)
            spikes = transition.spikes(fired)
        if not equations.kind.reset_reads_signal:
            after = transition.reset(h, fired, None)
        if not transition.spikes_carry_gradient:
            ctx.mark_non_differentiable(spikes)
        learns = any(ctx.needs_input_grad[3:])
        ctx.reads_before = learns or _reads_signal(equations.kind)
        ctx.reads_input = learns and transition.reads_input
        ctx.equations = equations
        read = (v,) * ctx.reads_before + (x,) * ctx.reads_input
        ctx.save_for_backward(h, *parameters, *read)
        return spikes, after

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_spikes: Tensor | None, grad_v: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_spikes is None and grad_v is None:
            return (None,) * len(ctx.needs_input_grad)
        h, *parameters = ctx.saved_tensors
        x = parameters.pop() if ctx.reads_input else None
        before = parameters.pop() if ctx.reads_before else None
        transition = transition_of(ctx.equations, parameters, traced=True)
        view = _TracedView(transition, h, x, (before,))
        grad_x, grad_before, grads = transition.gradient(
            grad_spikes, grad_v, view, ctx.needs_input_grad[3:]
        )
        return grad_x, grad_before, None, *grads


def _reads_signal(kind: Kind) -> bool:
    """Whether the derivative of a step reads the reset signal, and so the potential before."""
    return kind.reset in ("zero", "clear") or (
        kind.reset == "subtract" and kind.option == "immediate"
    )


# ------------------------------------------------------------------------------------- T time steps


@opaque
def scan(
    x_seq: Tensor,
    v: Tensor,
    parameters: list[Tensor],
    names: list[str],
    numbers: list[float],
    with_path: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """T time steps from inputs ``[T, ...]``: the spikes' bits; the outputs, of a neuron that is
    recomputed from them (empty elsewhere); the last potential; with ``with_path`` the potentials
    ``[T, ...]`` (empty without). All contiguous."""
    plain, backend = backend_of(Equations(names, numbers), parameters)
    x_seq = x_seq.contiguous() if plain.from_outputs else x_seq
    taken = backend.select(plain, x_seq, (v,)).scan(x_seq, (v,), with_path=with_path)
    outputs = taken.outputs.contiguous() if plain.from_outputs else x_seq.new_empty(0)
    path = taken.path.contiguous() if with_path else x_seq.new_empty(0)
    return taken.fired.bits, outputs, taken.states[0].contiguous(), path


@scan.register_fake
def _(x_seq, v, parameters, names, numbers, with_path):
    bits = x_seq.new_empty((x_seq.numel() + BITS - 1) // BITS, dtype=torch.uint8)
    outputs = x_seq.new_empty(x_seq.shape if KINDS[names[0]].from_outputs else 0)
    return bits, outputs, v.new_empty(v.shape), v.new_empty(x_seq.shape if with_path else 0)


@opaque
def scan_backward(
    gradients: list[Tensor | None],
    kept: list[Tensor],
    parameters: list[Tensor],
    names: list[str],
    numbers: list[float],
    learned: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients at inputs, first potential and parameter (empty where that is not ``learned``)
    of :func:`scan`.

    Args:
        gradients: at outputs, last potential and path.
        kept: the inputs, or the outputs, and the spikes' bits and the first potential.
    """
    (grad_outputs, grad_last, grad_path), (values, bits, v) = gradients, kept
    plain, backend = backend_of(Equations(names, numbers), parameters)
    transition = backend.select(plain, values, (v,))
    packed = PackedSpikes.of_bits(bits, values.shape, contiguous(values.shape), values.dtype)
    held = KeptSequence((v,), values.dtype, packed=packed)
    if plain.from_outputs:
        held.outputs = values
    else:
        held.inputs = transition.inputs_for_scan(HeldTensor(values), values, (v,))
    grad_x, (grad_v,), totals = transition.vjp_of_scan(
        held,
        SequenceGradients(grad_outputs, (grad_last,), grad_path),
        (learned,) * len(plain.parameters),
    )
    grad_w = totals[0] if learned else values.new_empty(0)
    return grad_x.contiguous(), grad_v.clone(memory_format=torch.contiguous_format), grad_w


@scan_backward.register_fake
def _(gradients, kept, parameters, names, numbers, learned):
    values, _, v = kept
    grad_w = torch.empty_like(parameters[0]) if learned else values.new_empty(0)
    return values.new_empty(values.shape), v.new_empty(v.shape), grad_w


class _Sequence(torch.autograd.Function):
    """T time steps; the unpacking of spikes is traced."""

    @staticmethod
    def forward(
        ctx: Any, x_seq: Tensor, v: Tensor, equations: Equations, with_path: bool, *parameters: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        bits, outputs, last, path = torch.ops.snn_revplugin.scan(
            x_seq, v, parameters, *equations, with_path
        )
        kind, carries_gradient = equations.kind, True
        if kind.from_outputs:
            kept = outputs
        else:
            with transforms.recomputed_when_compiled():
                outputs = unpack_bits(bits, x_seq.numel(), x_seq.dtype).view(x_seq.shape)
                # What an opaque operator reads in backward the compiler would keep. A copy may be
                # recomputed, and so may what fuses with it, a batch norm for example; and no pass
                # knows that negating twice is a copy.
                kept = x_seq if type(x_seq) in PLAIN_TENSORS else x_seq.neg().neg()
            transition = transition_of(equations, parameters, traced=True)
            carries_gradient = transition.spikes_carry_gradient
        if not carries_gradient:
            ctx.mark_non_differentiable(outputs)
        if not with_path:
            ctx.mark_non_differentiable(path)
        ctx.equations = equations
        ctx.save_for_backward(kept, bits, v, *parameters)
        return outputs, last, path

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_outputs: Tensor | None, grad_last: Tensor | None, grad_path: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_outputs is None and grad_last is None and grad_path is None:
            return (None,) * len(ctx.needs_input_grad)
        kept, bits, v, *parameters = ctx.saved_tensors
        learned = any(ctx.needs_input_grad[4:])
        grad_x, grad_v, grad_w = torch.ops.snn_revplugin.scan_backward(
            [grad_outputs, grad_last, grad_path],
            [kept, bits, v],
            parameters,
            *ctx.equations,
            learned,
        )
        return grad_x, grad_v, None, None, *((grad_w if learned else None,) * len(parameters))


# ------------------------------------------------------------------ the operators that neurons call

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_EQUATIONS = "Tensor[] parameters, str[] names, float[] numbers"
_library.define(f"step(Tensor x, Tensor v, {_EQUATIONS}) -> (Tensor, Tensor)")
_library.define(
    f"sequence(Tensor x_seq, Tensor v, {_EQUATIONS}, bool with_path) -> (Tensor, Tensor, Tensor)"
)


def _step(x: Tensor, v: Tensor, parameters: list[Tensor], *equations: Any) -> tuple[Tensor, Tensor]:
    called = Equations(*equations)
    if called.kind.from_outputs:
        outputs, last, _ = _Sequence.apply(x.unsqueeze(0), v, called, False, *parameters)
        return outputs[0], last
    return _Step.apply(x, v, called, *parameters)


def _sequence(
    x_seq: Tensor, v: Tensor, parameters: list[Tensor], *equations_and_path: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *equations, with_path = equations_and_path
    return _Sequence.apply(x_seq, v, Equations(*equations), with_path, *parameters)


# Composite: the compiler goes through them, autograd Functions and all, down to the opaque ones
# above.
_library.impl("step", _step, "CompositeImplicitAutograd")
_library.impl("sequence", _sequence, "CompositeImplicitAutograd")

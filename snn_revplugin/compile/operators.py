"""The exact neurons as operators, for ``torch.compile``: opaque where bits matter, open where the
compiler may compute again.

A compiled graph is not walked, as :mod:`.replay` walks that of autograd: the compiler decides what
is kept for backward and what is computed again. So each neuron is an operator of two layers:

* what the compiler sees through: spikes unpacked from bits, or compared with the threshold; reset;
  in single steps the derivative. These are plain torch operations, so a spike that the next layer's
  backward reads is made again from its bit.
* what it does not: the charge of a time step, and T time steps forward and backward. They are
  computed by the code that runs without a compiler, with the same bits, however a compiler would
  have rounded (a fused multiply-add moves a spike).

What backward reads, and so at most what is kept:

    T steps         the currents and the first potential; potentials are scanned again. The next
    layer: the spikes' bits a time step     the charged potential, from which spikes and reset
    follow; with learned parameters the potential before

In the graph a neuron's equations are words and numbers, see :class:`Equations`; tensors, learned or
not, are ``parameters``. Compilers remember graphs on disk by the names of operators, not by what is
traced through them: whoever changes what these do gives them new names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

from ..bptt.sequence import StepView, backward, forward
from ..bptt.statistics import CallStatistics
from ..kernels import select_backend
from ..neurons.integrate_and_fire import (
    IntegrateAndFire,
    LeakyIntegrateAndFire,
    ParametricLeakyIntegrateAndFire,
)
from ..neurons.leaky import Leaky
from ..neurons.surrogate import Surrogate
from ..neurons.transition import Dynamics
from ..packed.codec import BITS, unpack_bits
from ..replay import HeldTensor
from ..torch_internals import transforms
from ..torch_internals.function import once_differentiable
from ..torch_internals.tensors import PLAIN_TENSORS

NAMESPACE = "snn_revplugin"
IMMEDIATE_RESET = "immediate_reset"
STEP_KEEPS = "the charged potential of each time step, unless the compiler computes it again"
SCAN_KEEPS = (
    "spikes as bits, the first potential and the currents, unless the compiler computes those again"
)

# How torch's schemas call the types of arguments. (torch 2.6 does not read these annotations
# itself.)
SCHEMA = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "list[Tensor]": "Tensor[]",
    "list[float]": "float[]",
    "float | None": "float?",
    "str": "str",
    "bool": "bool",
    "int": "int",
}


def opaque(function: Callable[..., tuple[Tensor, ...]]) -> CustomOpDef:
    """An operator of a function's name, arguments and results, which a compiler does not look
    into."""
    kinds = dict(function.__annotations__)
    results = ", ".join(["Tensor"] * kinds.pop("return").count("Tensor"))
    schema = (
        f"({', '.join(f'{SCHEMA[kind]} {name}' for name, kind in kinds.items())}) -> ({results})"
    )
    return custom_op(f"{NAMESPACE}::{function.__name__}", mutates_args=(), schema=schema)(function)


class Equations(NamedTuple):
    """A neuron's equations as an operator takes them: numbers and words, no objects.

    Attributes:
        kind: ``"leaky"`` (snnTorch; parameters beta in [0, 1], threshold, factor) followed by its
            reset and, if that does not wait for the next step, by ``at_once``; or ``"if"``,
            ``"lif"``, ``"plif"`` (parameter w), followed by ``soft`` or ``hard`` and, where they
            hold, by ``detached`` and ``decay_input``.
        constants: threshold, v_reset and tau of SpikingJelly's; those that a kind does not have are
            0.
        surrogate, slopes: of :class:`~snn_revplugin.surrogate.Surrogate`.
    """

    kind: str
    constants: list[float]
    surrogate: str
    slopes: list[float]


def equations_of_leaky(
    reset: str, immediate_reset: bool, surrogate: str, slopes: list[float]
) -> Equations:
    """Those of :class:`~snn_revplugin.dynamics.Leaky`."""
    return Equations(
        f"leaky {reset} {IMMEDIATE_RESET}" if immediate_reset else f"leaky {reset}",
        [],
        surrogate,
        slopes,
    )


def equations_of_node(
    kind: str,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    tau: float,
    decay_input: bool,
    surrogate: str,
    slopes: list[float],
) -> Equations:
    """Those of :class:`~snn_revplugin.dynamics.IntegrateAndFire` and what follows from it; ``kind``
    is if, lif or plif."""
    words = f"{kind} {'soft' if v_reset is None else 'hard'}"
    if detach_reset:
        words += " detached"
    if decay_input:
        words += " decay_input"
    constants = [float(v_threshold), 0.0 if v_reset is None else float(v_reset), float(tau)]
    return Equations(words, constants, surrogate, slopes)


@dataclass(eq=False)
class _ClampedLeaky(Leaky):
    """Of a beta that is clamped already, so that nobody need look at its value."""

    slope_of_clamp = 1.0

    @property
    def decays(self) -> Tensor:
        return self.beta


def dynamics_of(equations: Equations, parameters: list[Tensor], traced: bool = False) -> Dynamics:
    """The equations as dynamics.

    Args:
        traced: whether a compiler traces what is done with them, so that tensors have no values.
    """
    words = equations.kind.split()
    if words[0] == "leaky":
        surrogate = Surrogate(
            equations.surrogate, tuple(equations.slopes), strict=True, keeps_dtype=False
        )
        kind = _ClampedLeaky if traced else Leaky
        return kind(
            surrogate, *parameters, words[1], delayed=IMMEDIATE_RESET not in words, graded=True
        )
    constants, slopes = tuple(equations.constants), tuple(equations.slopes)
    if parameters:
        return _node(equations.kind, constants, equations.surrogate, slopes, parameters[0])
    return _node_of_constants(equations.kind, constants, equations.surrogate, slopes)


def _node(
    kind: str,
    constants: tuple[float, ...],
    name: str,
    slopes: tuple[float, ...],
    w: Tensor | None = None,
) -> Dynamics:
    words, (threshold, v_reset, tau) = kind.split(), constants
    surrogate = Surrogate(name, slopes, strict=False)
    common = surrogate, threshold, None if "soft" in words else v_reset, "detached" in words
    if words[0] == "if":
        return IntegrateAndFire(*common)
    if words[0] == "lif":
        return LeakyIntegrateAndFire(*common, tau=tau, decay_input="decay_input" in words)
    return ParametricLeakyIntegrateAndFire(*common, decay_input="decay_input" in words, w=w)


_node_of_constants = lru_cache(maxsize=256)(_node)
_unread = CallStatistics()  # the operators do not know whose they are


# ------------------------------------------------------------ a time step


@opaque
def charge(
    x: Tensor,
    v: Tensor,
    parameters: list[Tensor],
    kind: str,
    constants: list[float],
    surrogate: str,
    slopes: list[float],
) -> tuple[Tensor, Tensor]:
    """The charged potential of one time step, in the strides of ``x``; and for ``leaky ...
    at_once`` the potential after the reset, whose rounding depends on more than zeros and ones.
    Elsewhere that is empty."""
    plain = dynamics_of(Equations(kind, constants, surrogate, slopes), parameters)
    dynamics = select_backend(plain, x, v, _unread)
    if dynamics.fused:
        _, _, h, after = dynamics.step(x, v)
    else:
        reset_signal = plain.reset_signal(v)
        h = plain.charge(x, v, reset_signal)
        after = plain.reset(h, plain.fires(h), reset_signal) if plain.reset_needs_signal else None
    return _in_strides_of(x, h), (
        _in_strides_of(x, after) if plain.reset_needs_signal else x.new_empty(0)
    )


@charge.register_fake
def _(x, v, parameters, kind, constants, surrogate, slopes):
    return torch.empty_like(x), torch.empty_like(x) if IMMEDIATE_RESET in kind else x.new_empty(0)


def _in_strides_of(x: Tensor, tensor: Tensor) -> Tensor:
    like = torch.empty_like(x)
    return tensor if tensor.stride() == like.stride() else like.copy_(tensor)


class _Step(torch.autograd.Function):
    """One time step; all but the charge is traced."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Tensor, equations: Equations, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        h, after = torch.ops.snn_revplugin.charge(x, v, parameters, *equations)
        dynamics = dynamics_of(equations, list(parameters), traced=True)
        with transforms.recomputed_when_compiled():
            fired = dynamics.fires(h)
            spikes = dynamics.spikes(fired)
        if not dynamics.reset_needs_signal:
            after = dynamics.reset(h, fired)
        if not dynamics.spikes_carry_gradient:
            ctx.mark_non_differentiable(spikes)
        reads_before = any(ctx.needs_input_grad[3:]) or (
            dynamics.has_reset_signal and equations.kind != "leaky subtract"
        )
        ctx.equations, ctx.reads_before = equations, reads_before
        ctx.save_for_backward(h, *parameters, *((v,) if reads_before else ()))
        return spikes, after

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_spikes: Tensor | None, grad_v: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_spikes is None and grad_v is None:
            return (None,) * len(ctx.needs_input_grad)
        h, *parameters = ctx.saved_tensors
        before = parameters.pop() if ctx.reads_before else None
        dynamics = dynamics_of(ctx.equations, parameters, traced=True)
        view = StepView(dynamics, (h,), before, 0)
        grad_x, grad_before, grads = dynamics.gradient(
            grad_spikes, grad_v, view, ctx.needs_input_grad[3:]
        )
        return grad_x, grad_before, None, *grads


# ------------------------------------------------------------ T time steps


@opaque
def scan(
    x_seq: Tensor,
    v: Tensor,
    parameters: list[Tensor],
    kind: str,
    constants: list[float],
    surrogate: str,
    slopes: list[float],
    with_path: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """T time steps from currents ``[T, ...]``: the spikes' bits, the last potential, and with
    ``with_path`` the potentials ``[T, ...]`` (empty without). All contiguous."""
    plain = dynamics_of(Equations(kind, constants, surrogate, slopes), parameters)
    dynamics = select_backend(plain, x_seq, v, _unread)
    packed, _, last, _, path = forward(dynamics, x_seq, v, keeps_charged=False, with_path=with_path)
    return packed.bits, last.contiguous(), path.contiguous() if with_path else x_seq.new_empty(0)


@scan.register_fake
def _(x_seq, v, parameters, kind, constants, surrogate, slopes, with_path):
    bits = x_seq.new_empty((x_seq.numel() + BITS - 1) // BITS, dtype=torch.uint8)
    return bits, v.new_empty(v.shape), v.new_empty(x_seq.shape if with_path else 0)


@opaque
def scan_backward(
    grad_spikes: Tensor | None,
    grad_last: Tensor | None,
    grad_path: Tensor | None,
    x_seq: Tensor,
    v: Tensor,
    parameters: list[Tensor],
    kind: str,
    constants: list[float],
    surrogate: str,
    slopes: list[float],
    learned: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients at currents, first potential and parameter (empty where that is not
    ``learned``) of :func:`scan`."""
    plain = dynamics_of(Equations(kind, constants, surrogate, slopes), parameters)
    dynamics = select_backend(plain, x_seq, v, _unread)
    wanted = (learned,) * len(parameters)
    gradients = grad_spikes, grad_last, grad_path
    grad_x, grad_v, totals = backward(
        dynamics, HeldTensor(x_seq), None, v, x_seq.dtype, gradients, wanted, None
    )
    grad_w = totals[0] if learned else x_seq.new_empty(0)
    return grad_x.contiguous(), grad_v.clone(memory_format=torch.contiguous_format), grad_w


@scan_backward.register_fake
def _(
    grad_spikes,
    grad_last,
    grad_path,
    x_seq,
    v,
    parameters,
    kind,
    constants,
    surrogate,
    slopes,
    learned,
):
    grad_w = torch.empty_like(parameters[0]) if learned else x_seq.new_empty(0)
    return x_seq.new_empty(x_seq.shape), v.new_empty(v.shape), grad_w


class _Sequence(torch.autograd.Function):
    """T time steps; the unpacking of spikes is traced."""

    @staticmethod
    def forward(
        ctx: Any,
        x_seq: Tensor,
        v: Tensor,
        equations: Equations,
        with_path: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        bits, last, path = torch.ops.snn_revplugin.scan(x_seq, v, parameters, *equations, with_path)
        with transforms.recomputed_when_compiled():
            spikes = unpack_bits(bits, x_seq.numel(), x_seq.dtype).view(x_seq.shape)
            # What an opaque operator reads in backward the compiler would keep. A copy may be made
            # again, and so may whatever fuses with it, a batch norm say; and no pass knows that
            # negating twice is one.
            kept = x_seq if type(x_seq) in PLAIN_TENSORS else x_seq.neg().neg()
        dynamics = dynamics_of(equations, list(parameters), traced=True)
        if not dynamics.spikes_carry_gradient:
            ctx.mark_non_differentiable(spikes)
        if not with_path:
            ctx.mark_non_differentiable(path)
        ctx.equations = equations
        ctx.save_for_backward(kept, v, *parameters)
        return spikes, last, path

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_spikes: Tensor | None, grad_last: Tensor | None, grad_path: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_spikes is None and grad_last is None and grad_path is None:
            return (None,) * len(ctx.needs_input_grad)
        x_seq, v, *parameters = ctx.saved_tensors
        learned = any(ctx.needs_input_grad[4:])
        grad_x, grad_v, grad_w = torch.ops.snn_revplugin.scan_backward(
            grad_spikes, grad_last, grad_path, x_seq, v, parameters, *ctx.equations, learned
        )
        return grad_x, grad_v, None, None, *((grad_w if learned else None,) * len(parameters))


# ------------------------------------------------------------------ the operators that neurons call

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_EQUATIONS = "Tensor[] parameters, str kind, float[] constants, str surrogate, float[] slopes"
_library.define(f"step(Tensor x, Tensor v, {_EQUATIONS}) -> (Tensor, Tensor)")
_library.define(
    f"sequence(Tensor x_seq, Tensor v, {_EQUATIONS}, bool with_path) -> (Tensor, Tensor, Tensor)"
)


def _step(x: Tensor, v: Tensor, parameters: list[Tensor], *equations: Any) -> tuple[Tensor, Tensor]:
    return _Step.apply(x, v, Equations(*equations), *parameters)


def _sequence(
    x_seq: Tensor,
    v: Tensor,
    parameters: list[Tensor],
    kind: str,
    constants: list[float],
    surrogate: str,
    slopes: list[float],
    with_path: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _Sequence.apply(
        x_seq, v, Equations(kind, constants, surrogate, slopes), with_path, *parameters
    )


# Composite: the compiler goes through them, autograd Functions and all, down to the opaque ones
# above.
_library.impl("step", _step, "CompositeImplicitAutograd")
_library.impl("sequence", _sequence, "CompositeImplicitAutograd")

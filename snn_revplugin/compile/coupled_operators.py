"""The coupled neuron as operators, for ``torch.compile``: backward reads its outputs, the spikes'
bits and potentials.

One operator takes one time step, another T. Tau, alpha, beta and threshold come as ``numbers`` or,
where a host holds them in buffers, in ``held``, as tensors whose values are asked for when the
operator runs. ``strict`` is for the Heaviside step of snnTorch. See :mod:`.operators` for the exact
neurons, and for ``surrogate`` and ``slopes``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..bptt.coupled_sequence import Call
from ..bptt.coupled_step import Outputs
from ..neurons.coupled import Coupled
from ..neurons.surrogate import Surrogate
from ..packed.codec import BITS
from ..packed.spikes import PackedSpikes
from ..torch_internals.versioned import Versioned
from .operators import opaque

STEP_KEEPS = "its outputs, spikes as bits and the potential before each time step"
SEQUENCE_KEEPS = "its outputs, spikes as bits and the first potential"


@lru_cache(maxsize=256)
def _coupled(
    numbers: tuple[float, ...],
    v_reset: float | None,
    detach_reset: bool,
    strict: bool,
    name: str,
    slopes: tuple[float, ...],
    split_dim: int,
) -> Coupled:
    surrogate = Surrogate(name, slopes, strict=strict, keeps_dtype=not strict)  # strict is snnTorch
    return Coupled(*numbers, v_reset, detach_reset, surrogate, split_dim)


def _equations(
    numbers: list[float],
    held: list[Tensor],
    v_reset: float | None,
    detach_reset: bool,
    strict: bool,
    surrogate: str,
    slopes: list[float],
    split_dim: int,
) -> Coupled:
    values = tuple(each.item() for each in held) if held else tuple(numbers)
    return _coupled(values, v_reset, detach_reset, strict, surrogate, tuple(slopes), split_dim)


# ------------------------------------------------------------ a time step


@opaque
def coupled_step(
    x: Tensor,
    v: Tensor,
    numbers: list[float],
    held: list[Tensor],
    v_reset: float | None,
    detach_reset: bool,
    strict: bool,
    surrogate: str,
    slopes: list[float],
    split_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and potential after one time step, contiguous, and the spikes' bits."""
    coupled = _equations(numbers, held, v_reset, detach_reset, strict, surrogate, slopes, split_dim)
    y, after, fired = coupled.step(x.contiguous(), v)
    return y, after, PackedSpikes(fired).bits


@coupled_step.register_fake
def _(x, v, *equations):
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(_bytes(x), dtype=torch.uint8)


@opaque
def coupled_step_backward(
    grad_y: Tensor | None,
    grad_after: Tensor | None,
    y: Tensor,
    v: Tensor,
    bits: Tensor,
    numbers: list[float],
    held: list[Tensor],
    v_reset: float | None,
    detach_reset: bool,
    strict: bool,
    surrogate: str,
    slopes: list[float],
    split_dim: int,
) -> tuple[Tensor, Tensor]:
    """The gradients at input and potential, from the step's output, its bits and the potential
    before."""
    coupled = _equations(numbers, held, v_reset, detach_reset, strict, surrogate, slopes, split_dim)
    halves, v_halves = coupled.halves(y), coupled.halves(v)
    spikes = coupled.halves(_packed(bits, y).binary())
    after1, _ = coupled.again(halves, spikes, v_halves)
    charged = coupled.charge_first(halves, spikes, v_halves), coupled.charge_second(halves, after1)
    given = (None if each is None else coupled.halves(each) for each in (grad_y, grad_after))
    gradients = torch.empty_like(y), torch.empty_like(y)
    coupled.gradient(charged, spikes, *given, *(coupled.halves(each) for each in gradients))
    return gradients


@coupled_step_backward.register_fake
def _(grad_y, grad_after, y, v, bits, *equations):
    return y.new_empty(y.shape), y.new_empty(y.shape)


# ------------------------------------------------------------ T time steps


@opaque
def coupled_sequence(
    x_seq: Tensor,
    v: Tensor,
    numbers: list[float],
    held: list[Tensor],
    v_reset: float | None,
    detach_reset: bool,
    strict: bool,
    surrogate: str,
    slopes: list[float],
    split_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs ``[T, ...]`` and potential after T time steps, contiguous, and the spikes' bits."""
    call = Call(
        _equations(numbers, held, v_reset, detach_reset, strict, surrogate, slopes, split_dim)
    )
    y_seq, last = call.run(x_seq.contiguous(), v)
    return y_seq, last.contiguous(), call.fired.bits


@coupled_sequence.register_fake
def _(x_seq, v, *equations):
    return (
        x_seq.new_empty(x_seq.shape),
        x_seq.new_empty(v.shape),
        x_seq.new_empty(_bytes(x_seq), dtype=torch.uint8),
    )


@opaque
def coupled_sequence_backward(
    grad_y: Tensor | None,
    grad_last: Tensor | None,
    y: Tensor,
    v: Tensor,
    bits: Tensor,
    numbers: list[float],
    held: list[Tensor],
    v_reset: float | None,
    detach_reset: bool,
    strict: bool,
    surrogate: str,
    slopes: list[float],
    split_dim: int,
) -> tuple[Tensor, Tensor]:
    """The gradients at inputs and first potential, from the outputs, their bits and the first
    potential."""
    call = Call(
        _equations(numbers, held, v_reset, detach_reset, strict, surrogate, slopes, split_dim)
    )
    call.outputs, call.fired, call.start = Outputs(y), _packed(bits, y), Versioned(v)
    grad_x, grad_v = call.gradient(grad_y, grad_last)
    return grad_x, grad_v.contiguous()


@coupled_sequence_backward.register_fake
def _(grad_y, grad_last, y, v, bits, *equations):
    return y.new_empty(y.shape), y.new_empty(v.shape)


# ------------------------------------------------------------ autograd


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, v, numbers, held, *others = inputs
    y, _, bits = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y, v, bits, *held)
    ctx.numbers, ctx.others = numbers, others


def _differentiate(
    backward: Any, ctx: Any, grad_y: Tensor | None, grad_v: Tensor | None
) -> tuple[Tensor | None, ...]:
    # A list of tensors wants a list of gradients, and an empty list counts as one.
    rest = [[] if each == [] else None for each in (ctx.numbers, *ctx.others)]
    rest.insert(1, [None] * (len(ctx.saved_tensors) - 3))
    if grad_y is None and grad_v is None:
        return None, None, *rest
    y, v, bits, *held = ctx.saved_tensors
    return *backward(grad_y, grad_v, y, v, bits, ctx.numbers, held, *ctx.others), *rest


def _backward_of_step(
    ctx: Any, grad_y: Tensor | None, grad_v: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    return _differentiate(coupled_step_backward, ctx, grad_y, grad_v)


def _backward_of_sequence(
    ctx: Any, grad_y: Tensor | None, grad_v: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    return _differentiate(coupled_sequence_backward, ctx, grad_y, grad_v)


coupled_step.register_autograd(_backward_of_step, setup_context=_save)
coupled_sequence.register_autograd(_backward_of_sequence, setup_context=_save)


def _bytes(tensor: Tensor) -> int:
    return (tensor.numel() + BITS - 1) // BITS


def _packed(bits: Tensor, like: Tensor) -> PackedSpikes:
    return PackedSpikes.of_bits(bits, like.shape, like.stride(), like.dtype)

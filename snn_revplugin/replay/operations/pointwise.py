"""Arithmetic element by element, casts, copies, means and sums."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...packed.spikes import PackedSpikes
from ...torch_internals import capture
from ...torch_internals.graph import Node, attribute_of, name_of, type_of_output
from ...torch_internals.saved_tensors import saved_by
from .operation import DecidedBy, Operation, Replay, register

ONE = (None,)


def _scaled(function: Replay) -> DecidedBy:
    return DecidedBy(lambda alpha: partial(function, alpha=alpha), "alpha")


def _cast(node: Node) -> Replay:
    dtype, device = type_of_output(node)
    return partial(Tensor.to, device=device, dtype=dtype)


def _reduced(function):
    def replay(node: Node) -> Replay:
        dim, keepdim = attribute_of(node, "dim"), attribute_of(node, "keepdim")
        return partial(function, dim=dim or None, keepdim=keepdim, dtype=type_of_output(node)[0])

    return replay


def _native_dropout(node: Node) -> Replay:
    """The mask, one byte an element, stays; the scale is the one that the kernel used."""
    p, mask = attribute_of(node, "p"), saved_by(node, "result1")
    scale = 0.0 if p == 1 else 1.0 / (1.0 - p)
    return lambda x: x * mask * scale


def constant_of(node: Node, x: Tensor, output: Tensor) -> Replay | None:
    """A sum with a constant that its node does not save (``1 - spikes``), solved for the constant.

    Args:
        node: of ``x + c``, ``x - c`` or ``c - x``.
        x: the operand that is known.
        output: what the operation gave.

    Returns:
        The sum as a function of ``x`` alone, or None if no one constant gives ``output`` again, bit
        for bit.
    """
    name = name_of(node)
    alpha = attribute_of(node, "alpha")
    with torch.no_grad():
        if x.numel() == 0 or x.shape != output.shape or not capture.may_synchronise(x):
            return None
        at = x.abs().argmin()  # where x is zero the constant can be read off
        x_there, output_there = x.reshape(-1)[at].item(), output.reshape(-1)[at].item()
        if name == "RsubBackward1":
            c = output_there + alpha * x_there
            replay = lambda x: torch.rsub(x, c, alpha=alpha)  # noqa: E731
        else:
            sign = 1 if name == "AddBackward0" else -1
            c = sign * (output_there - x_there) / alpha
            function = torch.add if sign == 1 else torch.sub
            replay = lambda x: function(x, c, alpha=alpha)  # noqa: E731
        return replay if torch.equal(replay(x), output) else None


def packed_mask(mask: Tensor) -> PackedSpikes | None:
    """A dropout mask, whose elements are zero or one and the same number, at one bit each; None for
    any other tensor."""
    if not capture.may_synchronise(mask):
        return None
    scale = mask.max()
    fired = mask != 0
    return PackedSpikes(fired, mask.dtype, scale) if torch.equal(fired * scale, mask) else None


register(
    Operation(
        "AddBackward0",
        (None, None),
        _scaled(torch.add),
        constant=True,
        pointwise=True,
        recompute_always=True,
    ),
    Operation(
        "SubBackward0",
        (None, None),
        _scaled(torch.sub),
        constant=True,
        pointwise=True,
        recompute_always=True,
    ),
    Operation(
        "RsubBackward0", (None, None), _scaled(torch.rsub), pointwise=True, recompute_always=True
    ),
    Operation(
        "RsubBackward1",
        (None, None),
        _scaled(torch.rsub),
        constant=True,
        pointwise=True,
        recompute_always=True,
    ),
    Operation(
        "MulBackward0",
        ("self", "other"),
        lambda _: torch.mul,
        pointwise=True,
        recompute_always=True,
    ),
    Operation(
        "DivBackward0",
        ("self", "other"),
        lambda _: torch.div,
        pointwise=True,
        recompute_always=True,
    ),
    Operation("NegBackward0", ONE, lambda _: torch.neg, pointwise=True, recompute_always=True),
    Operation("ReluBackward0", ONE, lambda _: torch.relu, {"result": 0}, pointwise=True),
    Operation("ToCopyBackward0", ONE, _cast, layout=True, pointwise=True),
    Operation("CloneBackward0", ONE, lambda _: torch.clone, layout=True),
    Operation("MeanBackward1", ONE, _reduced(torch.mean)),
    Operation("SumBackward1", ONE, _reduced(torch.sum)),
    Operation("NativeDropoutBackward0", ONE, _native_dropout, pointwise=True),
)

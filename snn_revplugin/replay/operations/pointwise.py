"""Elementwise arithmetic, casts, copies, dropout."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...packed.spikes import PackedSpikes
from ...torch_internals import capture
from ...torch_internals.graph import Node, attribute_of, name_of, type_of_output
from ...torch_internals.saved_tensors import saved_by
from ..kind import COPY, ELEMENTWISE
from ..recipe import Replay
from .operation import ONE, DecidedBy, Operation, register

LONG = torch.float32, torch.float64  # in shorter dtypes torch computes with a longer number


def _scaled(function: Replay) -> DecidedBy:
    return DecidedBy(lambda alpha: partial(function, alpha=alpha), "alpha")


def _cast(node: Node) -> Replay:
    dtype, device = type_of_output(node)
    return partial(Tensor.to, device=device, dtype=dtype)


def _native_dropout(node: Node) -> Replay:
    """The node keeps the mask, one byte per element; the scale is the one that the kernel used."""
    p, mask = attribute_of(node, "p"), saved_by(node, "result1")
    scale = 0.0 if p == 1 else 1.0 / (1.0 - p)
    return lambda x: x * mask * scale


def solve_constant(node: Node, x: Tensor, output: Tensor) -> Replay | None:
    """Solve a sum with a constant that its node does not save (``1 - spikes``) for the constant.

    Args:
        node: of ``x + c``, ``x - c`` or ``c - x``.
        x: the operand with a gradient.
        output: of the operation.

    Returns:
        The sum as a function of ``x`` alone, or None if no single constant gives ``output`` bit for
        bit.
    """
    name = name_of(node)
    alpha = attribute_of(node, "alpha")
    with torch.no_grad():
        if x.numel() == 0 or x.shape != output.shape:
            return None
        if not capture.may_compare(x) and x.dtype in LONG:
            replay = _with_a_number_there(name, alpha, x, output)
            # The node of ``c - x`` stands for a number alone.
            known = name == "RsubBackward1" or (
                capture.may_synchronise(x) and torch.equal(replay(x), output)
            )
            return replay if known else None
        if not capture.may_synchronise(x):
            return None
        at = x.abs().argmin()  # where x is zero the output is the constant
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


def _with_a_number_there(name: str, alpha: float, x: Tensor, output: Tensor) -> Replay:
    """The sum with a constant on a device that is not asked for values: the constant stays
    there."""
    at = x.abs().argmin().reshape(1)  # an index without a dimension would be read
    x_there, output_there = (each.reshape(-1).index_select(0, at) for each in (x, output))
    if name == "RsubBackward1":
        c = (output_there + alpha * x_there).reshape(())
        return lambda x: torch.rsub(x, c, alpha=alpha)
    sign, function = (1, torch.add) if name == "AddBackward0" else (-1, torch.sub)
    c = (sign * (output_there - x_there) / alpha).reshape(())
    return lambda x: function(x, c, alpha=alpha)


def packed_mask(mask: Tensor) -> PackedSpikes | None:
    """Pack a dropout mask, whose elements are zero or one number, at one bit per element.

    Returns:
        None for any other tensor.
    """
    if not capture.may_synchronise(mask):
        return None
    scale = mask.max()
    fired = mask != 0
    return PackedSpikes(fired, mask.dtype, scale) if torch.equal(fired * scale, mask) else None


NEITHER = (None, None)  # two operands, which the node does not save
BOTH = ("self", "other")


def _sum(node: str, function: Replay) -> Operation:
    return Operation(node, ELEMENTWISE, NEITHER, _scaled(function), solve_constant=solve_constant)


register(
    _sum("AddBackward0", torch.add),
    _sum("SubBackward0", torch.sub),
    _sum("RsubBackward1", torch.rsub),
    Operation("RsubBackward0", ELEMENTWISE, NEITHER, _scaled(torch.rsub)),
    Operation("MulBackward0", ELEMENTWISE, BOTH, lambda _: torch.mul),
    Operation("DivBackward0", ELEMENTWISE, BOTH, lambda _: torch.div),
    Operation("NegBackward0", ELEMENTWISE, ONE, lambda _: torch.neg),
    Operation("NativeDropoutBackward0", ELEMENTWISE, ONE, _native_dropout),
    Operation("ToCopyBackward0", COPY, ONE, _cast),
    Operation("CloneBackward0", COPY, ONE, lambda _: torch.clone),
)

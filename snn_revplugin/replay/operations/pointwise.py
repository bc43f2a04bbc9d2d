"""Elementwise arithmetic, casts, copies, dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ...packed.spikes import PackedSpikes
from ...torch_internals import capture
from ...torch_internals.graph import (
    Node,
    attribute_of,
    is_on_one_device,
    name_of,
    type_of_output,
)
from ...torch_internals.saved_tensors import replace_saved, replacement_of, saved_by
from ..kind import COPY, ELEMENTWISE
from ..recipe import Replay
from .operation import ONE, DecidedBy, Operation, register
from .shape import applying

LONG = torch.float32, torch.float64  # in shorter dtypes torch computes with a longer number


def _scaled(function: Replay) -> DecidedBy:
    return DecidedBy(lambda alpha: partial(function, alpha=alpha), "alpha")


def _with_value(function: Replay) -> DecidedBy:
    return DecidedBy(lambda value: partial(function, value=value), "value")


def _to(kind: tuple[torch.dtype, torch.device]) -> Replay:
    dtype, device = kind
    return partial(Tensor.to, device=device, dtype=dtype)


_cast_to = DecidedBy(_to, read=type_of_output)


def _cast(node: Node) -> Replay | None:
    """No copy to another device: backward runs in a thread for each device, and would read from the
    other one on a stream that may not be that of forward."""
    return _cast_to(node) if is_on_one_device(node) else None


def _native_dropout(node: Node) -> Replay | None:
    """The node keeps its mask at one byte per element, here at one bit; the scale is the one that
    the kernel used."""
    mask = _mask_of(node)
    if mask is None:
        return None
    scale = dropout_scale(attribute_of(node, "p"), *type_of_output(node))
    return lambda x: x * mask() * scale


def _mask_of(node: Node) -> Callable[[], Tensor] | None:
    """The mask of a dropout, packed in the place where its node saved it; None where another tool's
    hooks are on it."""
    mask, saved = replacement_of(node, "result1"), saved_by(node, "result1")
    if mask is None and saved is not None:
        mask = PackedSpikes(saved, saved.dtype).binary
        replace_saved(node, "result1", mask)
    return mask


def dropout_scale(p: float, dtype: torch.dtype, device: torch.device) -> float:
    """What dropout multiplies the elements with that it keeps. The kernel on CUDA rounds to float32
    before it divides, where the numbers are not float64."""
    if p == 1:
        return 0.0
    if device.type == "cuda" and dtype is not torch.float64:
        return (1.0 / torch.tensor(1.0 - p, dtype=torch.float32, device="cpu")).item()
    return 1.0 / (1.0 - p)


def solve_constant(node: Node, x: Tensor, output: Tensor) -> Replay | None:
    """Solve a sum with a constant that its node does not save (``1 - spikes``) for the constant.

    Args:
        node: of ``x + c``, ``x - c`` or ``c - x``.
        x: the operand with a gradient.
        output: of the operation.

    Returns:
        The sum as a function of ``x`` and None, or None if no single constant gives ``output`` bit
        for bit.
    """
    alpha = attribute_of(node, "alpha")
    function, of_x, of_number = {
        "AddBackward0": (torch.add, 1, alpha),
        "SubBackward0": (torch.sub, 1, -alpha),
        "RsubBackward1": (torch.rsub, -alpha, 1),
    }[name_of(node)]
    if x.numel() == 0 or x.shape != output.shape or not capture.may_synchronise(x):
        return None
    with torch.no_grad():
        if not capture.may_compare(x) and x.dtype in LONG:
            replay = _with_a_number_there(name_of(node), alpha, x, output)
            # The node of ``c - x`` stands for a number alone.
            known = name_of(node) == "RsubBackward1" or torch.equal(replay(x), output)
            return replay if known else None
        for number in _candidates(x.detach(), of_x, of_number, output.detach()):
            replay = partial(_with_number, function, number, alpha)
            if torch.equal(replay(x), output):
                return replay
    return None


def _with_number(
    function: Replay, number: float, alpha: float, x: Tensor, _: Tensor | None = None
) -> Tensor:
    return function(x, number, alpha=alpha)


SAMPLE = 4096  # elements from which a number is guessed, before all are compared
MOST_DIGITS = 8


def _candidates(x: Tensor, of_x: float, of_number: float, output: Tensor) -> Iterator[float]:
    """Numbers ``c`` with ``of_x x + of_number c`` near to ``output``, the shortest decimals
    first."""
    at = x.abs().argmin()  # where x is zero the output is the number
    step = x.numel() // SAMPLE + 1
    xs, outputs = (
        torch.cat([each[::step], each[at : at + 1]]).double()
        for each in (x.reshape(-1), output.reshape(-1))
    )
    numbers = (outputs - of_x * xs) / of_number
    eps = torch.finfo(output.dtype).eps
    rounding = (outputs.abs() / abs(of_number) + numbers.abs()) * eps
    low, high = (numbers - rounding).max().item(), (numbers + rounding).min().item()
    if not low <= high:
        return
    decimals = (float(f"{(low + high) / 2:.{digits}g}") for digits in range(1, MOST_DIGITS))
    yield from dict.fromkeys(
        each for each in (*decimals, numbers[-1].item()) if low <= each <= high
    )


def _with_a_number_there(name: str, alpha: float, x: Tensor, output: Tensor) -> Replay:
    """The sum with a constant on a device that is not asked for values: the constant stays
    there."""
    at = x.abs().argmin().reshape(1)  # an index without a dimension would be read
    x_there, output_there = (each.reshape(-1).index_select(0, at) for each in (x, output))
    if name == "RsubBackward1":
        c = (output_there + alpha * x_there).reshape(())
        return lambda x, _=None: torch.rsub(x, c, alpha=alpha)
    sign, function = (1, torch.add) if name == "AddBackward0" else (-1, torch.sub)
    c = (sign * (output_there - x_there) / alpha).reshape(())
    return lambda x, _=None: function(x, c, alpha=alpha)


def packed_mask(mask: Tensor) -> PackedSpikes | None:
    """Pack a mask, whose elements are zero or one number (a dropout's) or bools, at one bit per
    element.

    Returns:
        None for any other tensor.
    """
    if mask.dtype is torch.bool:
        return PackedSpikes(mask, mask.dtype)
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
    Operation("MulBackward1", ELEMENTWISE, ONE, applying(torch.mul, "other")),
    Operation("DivBackward0", ELEMENTWISE, BOTH, lambda _: torch.div),
    Operation("DivBackward1", ELEMENTWISE, ONE, applying(torch.div, "other")),
    Operation(
        "DivBackward2",
        ELEMENTWISE,
        BOTH,
        DecidedBy(lambda mode: partial(torch.div, rounding_mode=mode), "rounding_mode"),
    ),
    Operation(
        "LerpBackward0",
        ELEMENTWISE,
        NEITHER,
        DecidedBy(lambda weight: partial(torch.lerp, weight=weight), "weight"),
    ),
    Operation("LerpBackward1", ELEMENTWISE, ("self", "end", "weight"), lambda _: torch.lerp),
    Operation(
        "AddcmulBackward0", ELEMENTWISE, (None, "tensor1", "tensor2"), _with_value(torch.addcmul)
    ),
    Operation(
        "AddcdivBackward0", ELEMENTWISE, (None, "tensor1", "tensor2"), _with_value(torch.addcdiv)
    ),
    Operation("NegBackward0", ELEMENTWISE, ONE, lambda _: torch.neg),
    Operation("NativeDropoutBackward0", ELEMENTWISE, ONE, _native_dropout),
    Operation("ToCopyBackward0", COPY, ONE, _cast),
    Operation("CloneBackward0", COPY, ONE, lambda _: torch.clone),
)

"""Elementwise functions in pieces: clamps, absolute value, the larger of two, powers, a slope for
each channel."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...torch_internals.graph import Node, attribute_of
from ..kind import ELEMENTWISE
from .operation import DecidedBy, Operation, register
from .shape import applying


def _clamp(low: float | None, high: float | None, x: Tensor) -> Tensor:
    return torch.clamp(x, low, high)


def _bounds_absent(node: Node) -> tuple[int, ...]:
    return tuple(i for i, name in ((1, "min"), (2, "max")) if attribute_of(node, name) is None)


SELF = ("self",)
BOTH = ("self", "other")
aten = torch.ops.aten

register(
    Operation(
        "ClampBackward0",
        ELEMENTWISE,
        ("self", "min", "max"),
        lambda _: torch.clamp,
        absent=_bounds_absent,
    ),
    Operation(
        "ClampBackward1",
        ELEMENTWISE,
        SELF,
        DecidedBy(lambda low, high: partial(_clamp, low, high), "min", "max"),
    ),
    Operation("ClampMinBackward0", ELEMENTWISE, SELF, applying(torch.clamp_min, "min")),
    Operation("ClampMaxBackward0", ELEMENTWISE, SELF, applying(torch.clamp_max, "max")),
    Operation(
        "HardtanhBackward0", ELEMENTWISE, SELF, applying(aten.hardtanh, "min_val", "max_val")
    ),
    Operation("LeakyReluBackward0", ELEMENTWISE, SELF, applying(aten.leaky_relu, "negative_slope")),
    Operation("AbsBackward0", ELEMENTWISE, SELF, lambda _: torch.abs),
    Operation("MaximumBackward0", ELEMENTWISE, BOTH, lambda _: torch.maximum),
    Operation("MinimumBackward0", ELEMENTWISE, BOTH, lambda _: torch.minimum),
    Operation("Atan2Backward0", ELEMENTWISE, BOTH, lambda _: torch.atan2),
    Operation(
        "PreluKernelBackward0", ELEMENTWISE, ("self", "weight"), lambda _: aten._prelu_kernel
    ),
    Operation("PowBackward0", ELEMENTWISE, SELF, applying(torch.pow, "exponent")),
    Operation(
        "PowBackward1", ELEMENTWISE, ("self", "exponent"), lambda _: torch.pow, {"result": 0}
    ),
    Operation(
        "PowBackward2",
        ELEMENTWISE,
        ("exponent",),
        DecidedBy(lambda base: partial(torch.pow, base), "self"),
        {"result": 0},
    ),
)

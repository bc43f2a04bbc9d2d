"""Functions that go element by element and in pieces: clamps, absolute value, the larger of two;
and powers."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...torch_internals.graph import Node, attribute_of
from .operation import DecidedBy, Operation, register
from .shape import applying


def _clamp(low: float | None, high: float | None, x: Tensor) -> Tensor:
    return torch.clamp(x, low, high)


def _bounds_absent(node: Node) -> tuple[int, ...]:
    return tuple(i for i, name in ((1, "min"), (2, "max")) if attribute_of(node, name) is None)


register(
    Operation(
        "ClampBackward0",
        ("self", "min", "max"),
        lambda _: torch.clamp,
        absent=_bounds_absent,
        recompute_always=True,
        pointwise=True,
    ),
    Operation(
        "ClampBackward1",
        ("self",),
        DecidedBy(lambda low, high: partial(_clamp, low, high), "min", "max"),
        recompute_always=True,
        pointwise=True,
    ),
    Operation(
        "ClampMinBackward0",
        ("self",),
        applying(torch.clamp_min, "min"),
        recompute_always=True,
        pointwise=True,
    ),
    Operation(
        "ClampMaxBackward0",
        ("self",),
        applying(torch.clamp_max, "max"),
        recompute_always=True,
        pointwise=True,
    ),
    Operation(
        "HardtanhBackward0",
        ("self",),
        applying(torch.ops.aten.hardtanh, "min_val", "max_val"),
        recompute_always=True,
        pointwise=True,
    ),
    Operation(
        "LeakyReluBackward0",
        ("self",),
        applying(torch.ops.aten.leaky_relu, "negative_slope"),
        recompute_always=True,
        pointwise=True,
    ),
    Operation(
        "AbsBackward0", ("self",), lambda _: torch.abs, recompute_always=True, pointwise=True
    ),
    Operation(
        "MaximumBackward0",
        ("self", "other"),
        lambda _: torch.maximum,
        recompute_always=True,
        pointwise=True,
    ),
    Operation(
        "MinimumBackward0",
        ("self", "other"),
        lambda _: torch.minimum,
        recompute_always=True,
        pointwise=True,
    ),
    Operation(
        "PowBackward0",
        ("self",),
        applying(torch.pow, "exponent"),
        recompute_always=True,
        pointwise=True,
    ),
)

"""Fourier transforms, and complex numbers as pairs of real ones."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...torch_internals.graph import Node, attribute_of, shape_of_output
from ..kind import LAYER, PLAIN, VIEW
from ..recipe import Replay
from .operation import ONE, Operation, register
from .shape import applying

aten = torch.ops.aten


def _to_real(node: Node) -> Replay:
    dim, normalization = attribute_of(node, "dim"), attribute_of(node, "normalization")
    return partial(_transform_to_real, dim, normalization, shape_of_output(node)[dim[-1]])


def _transform_to_real(dim: tuple[int, ...], normalization: int, size: int, x: Tensor) -> Tensor:
    return aten._fft_c2r(x, dim, normalization, size)


register(
    Operation(
        "FftR2CBackward0",
        LAYER,
        ("self",),
        applying(aten._fft_r2c, "dim", "normalization", "onesided"),
        shape_only=("self",),
    ),
    Operation(
        "FftC2CBackward0", PLAIN, ONE, applying(aten._fft_c2c, "dim", "normalization", "forward")
    ),
    Operation("FftC2RBackward0", PLAIN, ONE, _to_real),
    Operation("ViewAsRealBackward0", VIEW, ONE, lambda _: torch.view_as_real),
    Operation("ViewAsComplexBackward0", VIEW, ONE, lambda _: torch.view_as_complex),
)

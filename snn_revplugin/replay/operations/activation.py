"""Activations that save their output."""

from __future__ import annotations

import torch

from .operation import Operation, register

register(
    Operation("SigmoidBackward0", (None,), lambda _: torch.sigmoid, {"result": 0}, pointwise=True),
    Operation("TanhBackward0", (None,), lambda _: torch.tanh, {"result": 0}, pointwise=True),
)

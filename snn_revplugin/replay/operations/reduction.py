"""Reductions: sums and means over everything, largest and smallest elements with their indices, 8
bytes each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ...torch_internals.graph import Node, type_of_output
from .operation import DecidedBy, Operation, Replay, register


def _of_all(function: Replay) -> Callable[[Node], Replay]:
    def replay(node: Node) -> Replay:
        return partial(function, dtype=type_of_output(node)[0])

    return replay


def _along(function: Replay) -> DecidedBy:
    return DecidedBy(
        lambda dim, keepdim: partial(function, dim=dim, keepdim=keepdim), "dim", "keepdim"
    )


register(
    Operation("MeanBackward0", (None,), _of_all(torch.mean)),
    Operation("SumBackward0", (None,), _of_all(torch.sum)),
    Operation("MaxBackward0", (None,), _along(torch.max), {"indices": 1}, multiple_outputs=True),
    Operation("MinBackward0", (None,), _along(torch.min), {"indices": 1}, multiple_outputs=True),
    Operation("AmaxBackward0", ("self",), _along(torch.amax), {"result": 0}),
    Operation("AminBackward0", ("self",), _along(torch.amin), {"result": 0}),
)

"""Reductions: sums and means; largest and smallest elements, with indices of 8 bytes each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ...torch_internals.graph import Node, attribute_of, type_of_output
from ..kind import PLAIN
from ..recipe import Replay
from .operation import ONE, DecidedBy, Operation, register


def _of_all(function: Replay) -> Callable[[Node], Replay]:
    def replay(node: Node) -> Replay:
        return partial(function, dtype=type_of_output(node)[0])

    return replay


def _along(function: Replay) -> DecidedBy:
    return DecidedBy(
        lambda dim, keepdim: partial(function, dim=dim, keepdim=keepdim), "dim", "keepdim"
    )


def _along_some(function: Replay) -> Callable[[Node], Replay]:
    def replay(node: Node) -> Replay:
        dim, keepdim = attribute_of(node, "dim"), attribute_of(node, "keepdim")
        return partial(function, dim=dim or None, keepdim=keepdim, dtype=type_of_output(node)[0])

    return replay


SELF = ("self",)
INDICES = {"indices": 1}

register(
    Operation("MeanBackward0", PLAIN, ONE, _of_all(torch.mean)),
    Operation("SumBackward0", PLAIN, ONE, _of_all(torch.sum)),
    Operation("MeanBackward1", PLAIN, ONE, _along_some(torch.mean)),
    Operation("SumBackward1", PLAIN, ONE, _along_some(torch.sum)),
    Operation("MaxBackward0", PLAIN, ONE, _along(torch.max), INDICES),
    Operation("MinBackward0", PLAIN, ONE, _along(torch.min), INDICES),
    Operation("MaxBackward1", PLAIN, SELF, lambda _: torch.max, {"result": 0}),
    Operation("MinBackward1", PLAIN, SELF, lambda _: torch.min, {"result": 0}),
    Operation("AmaxBackward0", PLAIN, SELF, _along(torch.amax), {"result": 0}),
    Operation("AminBackward0", PLAIN, SELF, _along(torch.amin), {"result": 0}),
)

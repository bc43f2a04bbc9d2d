"""Reductions: sums, means, deviations, norms; largest and smallest elements, with indices of 8
bytes each; running sums."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ...torch_internals.graph import Node, attribute_of, type_of_output
from ..kind import PARAMETRISATION, PARAMETRISATIONS, PLAIN
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


def _spread(function: Replay) -> DecidedBy:
    """A deviation or variance; of all elements, where there is no dimension."""
    return DecidedBy(
        lambda dim, correction, keepdim: partial(
            function, dim=dim, correction=correction, keepdim=keepdim
        ),
        "dim",
        "correction",
        "keepdim",
    )


def _norm(node: Node) -> Replay:
    order, dim, keepdim = (attribute_of(node, name) for name in ("ord", "dim", "keepdim"))
    dtype = type_of_output(node)[0]
    return partial(torch.linalg.vector_norm, ord=order, dim=dim, keepdim=keepdim, dtype=dtype)


def _cumsum(node: Node) -> Replay:
    return partial(torch.cumsum, dim=attribute_of(node, "dim"), dtype=type_of_output(node)[0])


SELF = ("self",)
RESULT = {"result": 0}
INDICES = {"indices": 1}

register(
    Operation("MeanBackward0", PLAIN, ONE, _of_all(torch.mean)),
    Operation("SumBackward0", PLAIN, ONE, _of_all(torch.sum)),
    Operation("MeanBackward1", PLAIN, ONE, _along_some(torch.mean)),
    Operation("SumBackward1", PLAIN, ONE, _along_some(torch.sum)),
    Operation("MaxBackward0", PLAIN, ONE, _along(torch.max), INDICES),
    Operation("MinBackward0", PLAIN, ONE, _along(torch.min), INDICES),
    Operation("MaxBackward1", PLAIN, SELF, lambda _: torch.max, RESULT),
    Operation("MinBackward1", PLAIN, SELF, lambda _: torch.min, RESULT),
    Operation("AmaxBackward0", PLAIN, SELF, _along(torch.amax), RESULT),
    Operation("AminBackward0", PLAIN, SELF, _along(torch.amin), RESULT),
    Operation("StdBackward0", PARAMETRISATION, SELF, _spread(torch.std), RESULT),
    Operation("VarBackward0", PARAMETRISATION, SELF, _spread(torch.var)),
    Operation("StdMeanBackward0", PARAMETRISATIONS, SELF, _spread(torch.std_mean), {"result0": 0}),
    Operation("VarMeanBackward0", PARAMETRISATIONS, SELF, _spread(torch.var_mean)),
    Operation("LinalgVectorNormBackward0", PARAMETRISATION, SELF, _norm, RESULT),
    Operation("LogsumexpBackward0", PARAMETRISATION, SELF, _along(torch.logsumexp), RESULT),
    Operation("CumsumBackward0", PARAMETRISATION, ONE, _cumsum),
)

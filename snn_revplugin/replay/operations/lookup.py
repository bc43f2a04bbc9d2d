"""Elements selected by index: embedding, advanced indexing; and elements put in a place by index.
Their nodes keep the indices, which are few or the user's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...torch_internals import capture
from ...torch_internals.graph import Node, attribute_of
from ...torch_internals.saved_tensors import saved_by
from ...torch_internals.versioned import Versioned
from ..kind import LAYER, PARAMETRISATION, PLAIN
from ..recipe import Replay
from .operation import ONE, Operation, register


class _Selection:
    """A function of tensors and of indices that its node saves.

    Args:
        function: takes the tensors, the key and the indices; an index of None stands for a whole
            dimension.
    """

    __slots__ = ("function", "indices", "key")

    def __init__(self, function: Replay, indices: tuple[Tensor | None, ...], *key: int) -> None:
        self.function, self.key = function, key
        self.indices = tuple(each if each is None else Versioned(each) for each in indices)

    @property
    def identity(self) -> tuple:
        where = (
            each and (each.tensor.data_ptr(), each.version, each.tensor.shape, each.tensor.stride())
            for each in self.indices
        )
        return self.function, self.key, *where

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self.function(
            *tensors,
            *self.key,
            *(each and each.get("a selection by index") for each in self.indices),
        )


def _by(function: Replay, name: str, *attributes: str) -> Callable[[Node], Replay | None]:
    def replay(node: Node) -> Replay | None:
        index = saved_by(node, name)
        if index is None:
            return None
        indices = index if isinstance(index, tuple | list) else (index,)
        return _Selection(
            function, tuple(indices), *(attribute_of(node, each) for each in attributes)
        )

    return replay


def _index(x: Tensor, *indices: Tensor | None) -> Tensor:
    return torch.ops.aten.index.Tensor(x, indices)


def _embed(weight: Tensor, indices: Tensor) -> Tensor:
    return torch.embedding(weight, indices)


def _scatter(base: Tensor, source: Tensor, dim: int, index: Tensor) -> Tensor:
    return torch.scatter(base, dim, index, source)


def _scatter_add(base: Tensor, source: Tensor, dim: int, index: Tensor) -> Tensor:
    return torch.scatter_add(base, dim, index, source)


def _index_add(base: Tensor, source: Tensor, dim: int, alpha: float, index: Tensor) -> Tensor:
    return torch.index_add(base, dim, index, source, alpha=alpha)


def _index_put(base: Tensor, source: Tensor, accumulate: bool, *indices: Tensor | None) -> Tensor:
    return torch.ops.aten.index_put(base, indices, source, accumulate)


def _into_zeros(
    replay: Callable[[Node], Replay | None],
) -> Callable[[Node, Tensor, Tensor], Replay | None]:
    """The same where the tensor that is put into is not known: it is tried with zeros."""

    def solve(node: Node, source: Tensor, output: Tensor) -> Replay | None:
        place = replay(node)
        if place is None or not capture.may_synchronise(output):
            return None
        function = partial(_put_into_zeros, place, tuple(output.shape))
        with torch.no_grad():
            return function if torch.equal(function(None, source), output) else None

    return solve


def _put_into_zeros(place: Replay, shape: tuple[int, ...], _: None, source: Tensor) -> Tensor:
    return place(source.new_zeros(shape), source)


def _placement(
    name: str, function: Replay, index: str, *key: str, source: str | None = None
) -> Operation:
    replay = _by(function, index, *key)
    return Operation(
        f"{name}Backward0",
        PLAIN,
        (None, source),
        replay,
        solve_constant=_into_zeros(replay),
        solved=0,
    )


register(
    _placement("Scatter", _scatter, "index", "dim"),
    _placement("ScatterAdd", _scatter_add, "index", "dim"),
    _placement("IndexAdd", _index_add, "index", "dim", "alpha", source="source"),
    _placement("IndexPut", _index_put, "indices", "accumulate"),
    Operation("EmbeddingBackward0", LAYER, ONE, _by(_embed, "indices")),
    Operation("IndexBackward0", PARAMETRISATION, ONE, _by(_index, "indices")),
    Operation(
        "IndexSelectBackward0", PARAMETRISATION, ONE, _by(torch.index_select, "index", "dim")
    ),
    Operation(
        "GatherBackward0",
        PARAMETRISATION,
        ("self",),
        _by(torch.gather, "index", "dim"),
        shape_only=("self",),
    ),
)

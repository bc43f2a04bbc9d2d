"""Elements selected by index: embedding, advanced indexing. Their nodes keep the indices, which are
few or the user's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...torch_internals.graph import Node, attribute_of
from ...torch_internals.saved_tensors import saved_by
from ...torch_internals.versioned import Versioned
from ..kind import LAYER, PARAMETRISATION
from ..recipe import Replay
from .operation import ONE, Operation, register


class _Selection:
    """A function of a tensor and of indices that its node saves.

    Args:
        function: takes the tensor and the indices; an index of None stands for a whole dimension.
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

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(
            x, *self.key, *(each and each.get("a selection by index") for each in self.indices)
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


register(
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

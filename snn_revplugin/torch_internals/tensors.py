"""A tensor's class and memory, and a watch over the tensors that operations read and make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


class Watch(TorchDispatchMode):
    """Calls back around every operation that runs inside a ``with`` block in this thread, those of
    a backward included.

    Args:
        before: called with the tensors that an operation is about to read.
        after: called with the tensors that it gave.

    Attributes:
        operation: name of the operation that runs, or of the last that ran: ``"convolution"``.
    """

    def __init__(
        self, before: Callable[[list[Tensor]], None], after: Callable[[list[Tensor]], None]
    ) -> None:
        super().__init__()
        self.before, self.after, self.operation = before, after, ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.before([each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)])
        self.operation = func.__name__.partition(".")[0]
        result = func(*args, **kwargs)
        self.after([each for each in tree_leaves(result) if isinstance(each, Tensor)])
        return result


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """The memory behind a tensor: the same Python object for as long as the memory lives, so that
    a weak reference can watch it. None for a tensor without a storage of its own
    (a sparse one)."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None

"""The bytes of live tensors on a CPU."""

from __future__ import annotations

import gc
import os
import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are born inside the block and still alive: ``now``, and
    at most ``peak``.

    Args:
        *there_already: tensors whose memory does not count, under whatever alias they pass by.
    """

    def __init__(self, *there_already: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, object] = {
            id(each.untyped_storage()): each.untyped_storage() for each in there_already
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in (out,) if isinstance(out, Tensor) else tree_iter(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._died(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _died(self, key: int, size: int) -> None:
        self.now -= size
        del self._known[key]


def after_launches() -> None:
    """To be called before memory is read where neurons may have run in Triton's interpreter.

    Each launch there leaves a cycle of the interpreter's own, a function that refers to itself and
    to the storages of its arguments (``GridExecutor._init_args_hst``). That one is left to the
    garbage collector; without the interpreter nothing is.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        gc.collect()

"""Which operations run inside of a block, and how often."""

from __future__ import annotations

import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Counts the operations that run, and watches the memory of what some of them give out."""

    def __init__(self, *watched: torch._ops.OpOverload) -> None:
        super().__init__()
        self.count: Counter[torch._ops.OpOverload] = Counter()
        self.watched, self.memory, self.most_alive = watched, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count[func] += 1
        if func in self.watched:
            self.memory.append(weakref.ref(out.untyped_storage()))
            self.most_alive = max(self.most_alive, self.alive)
        return out

    @property
    def alive(self) -> int:
        return sum(each() is not None for each in self.memory)

"""The autocast that forward ran under, for code that backward runs again."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch


class AutocastState(NamedTuple):
    """Whether operations on a type of device are cast, and to which dtype."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device_type: str) -> AutocastState:
        """That of this thread."""
        return cls(
            device_type,
            torch.is_autocast_enabled(device_type),
            torch.get_autocast_dtype(device_type),
        )

    def restored(self) -> AbstractContextManager:
        """A context in which it holds again. Casts are not cached there: a cached cast of a weight
        would belong to another graph."""
        if not self.enabled and not torch.is_autocast_enabled(self.device_type):
            return nullcontext()
        return torch.autocast(self.device_type, self.dtype, self.enabled, cache_enabled=False)

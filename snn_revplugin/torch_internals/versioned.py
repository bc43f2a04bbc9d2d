"""Noticing that a tensor was changed in place.

Autograd asks the version of every tensor that it saved, but not of one that it saved through hooks;
where a value is recomputed from a tensor, the library checks the version itself.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

CHANGED = (
    "one of the variables needed to recompute {what} has been modified by an inplace operation:"
    " a {kind} of shape {shape} is at version {now}, expected version {then}. Call backward before"
    " you change it (optimizer.step, load_state_dict, an in-place edit), or clone it."
)


class Versioned:
    """A tensor and the version it had when it was noted."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version

    def unchanged(self) -> bool:
        return self.tensor._version == self.version

    def get(self, what: str) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: it was changed in place; the message names ``what`` needs it.
        """
        if not self.unchanged():
            kind = "parameter" if isinstance(self.tensor, torch.nn.Parameter) else "tensor"
            raise RuntimeError(
                CHANGED.format(
                    what=what,
                    kind=kind,
                    shape=tuple(self.tensor.shape),
                    now=self.tensor._version,
                    then=self.version,
                )
            )
        return self.tensor


def mark_of(tensor: Tensor) -> tuple[int, bool, int]:
    """What changes when a tensor is written into, is frozen, or is given other memory."""
    pointer = tensor.data_ptr() if tensor.layout is torch.strided else 0
    return tensor._version, tensor.requires_grad, pointer


def version_counter(tensor: Tensor) -> Tensor:
    """An alias of a tensor that has none of its memory and all of its versions."""
    # A detached alias shares the version counter; giving it other data leaves the counter as it is.
    alias = tensor.detach()
    alias.data = _empty(tensor.dtype, tensor.device)
    return alias


@cache
def _empty(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)

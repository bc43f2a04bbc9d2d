"""Tensors of which it is known, without a look at their values, that all elements are equal."""

from __future__ import annotations

from torch import Tensor

_MARK = "snn_revplugin_uniform"


def note_uniform(tensor: Tensor) -> Tensor:
    """Note that all elements of a tensor are equal, for as long as it is not written into.

    Returns:
        The tensor.
    """
    if not tensor.is_inference():  # which has no versions, and no graph
        setattr(tensor, _MARK, tensor._version)
    return tensor


def is_uniform(tensor: Tensor) -> bool:
    """Whether all elements are known to be equal."""
    return hasattr(tensor, _MARK) and getattr(tensor, _MARK) == tensor._version

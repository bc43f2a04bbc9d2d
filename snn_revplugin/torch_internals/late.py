"""Numbers that a device copies to the CPU while Python goes on. A later call reads them.

While a CUDA graph is captured, no number can be read.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from . import capture

MARGIN = 4.0  # by which a largest number may grow from one look to the next and still be trusted
GREW = (
    "the largest potential of a reversible neuron grew from {before:.3g} to {now:.3g} from one"
    " backward pass to the next; gradients of the last one may be less exact than usual"
)


class Late:
    """Some numbers, copied to the CPU behind what the device has to do.

    Args:
        numbers: one dimension.
    """

    __slots__ = ("_event", "_here")

    def __init__(self, numbers: Tensor) -> None:
        numbers, self._event = numbers.detach(), None
        if numbers.is_cuda:
            self._here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._here.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._here = numbers

    def read(self) -> list[float] | None:
        """The numbers, or None until the device has copied them."""
        if self._event is not None and (
            torch.cuda.is_current_stream_capturing() or not self._event.query()
        ):
            return None
        return self._here.tolist()


class Largest:
    """The largest magnitude of tensors of one kind, watched from one look to the next."""

    __slots__ = ("_coming", "_known", "_trusted")

    def __init__(self) -> None:
        self._known: float | None = None
        self._coming: Late | None = None
        self._trusted = False

    def stays_below(self, limit: float, tensors: tuple[Tensor, ...]) -> bool:
        """Whether no element is larger than a limit, or NaN.

        The device is asked, and waited for, at the first look and where the numbers came near the
        limit. Otherwise the last numbers that the device has copied decide.
        """
        present = [each.abs().max() for each in tensors if each.numel()]
        if not present:
            return True
        magnitudes, before = torch.stack(present), self._known
        come = None if self._coming is None else self._coming.read()
        if come is not None:
            self._known, self._coming = max(come), None
            if self._trusted and not self._known <= limit:
                warnings.warn(GREW.format(before=before, now=self._known), stacklevel=2)
        self._trusted = self._known is not None and self._known * MARGIN <= limit
        if not self._trusted:
            self._known, self._coming = max(capture.numbers(magnitudes)), None
            return self._known <= limit
        if self._coming is None:
            self._coming = Late(magnitudes)
        return True

"""Small whole numbers, such as sums of spikes, at a few bits each."""

from __future__ import annotations

import torch
from torch import Tensor

from .spikes import PackedSpikes

MOST_BITS = 5  # per element; larger numbers would save little memory


class PackedIntegers:
    """A tensor of whole numbers from 0 to 31, as bit planes that are packed like spikes. The
    largest number decides how many planes there are.

    >>> packed = PackedIntegers.of(torch.tensor([0.0, 3.0, 5.0]))
    >>> len(packed.planes), packed.numbers()
    (3, tensor([0., 3., 5.]))
    """

    __slots__ = ("planes",)

    def __init__(self, planes: tuple[PackedSpikes, ...]) -> None:
        self.planes = planes  # the lowest bit first

    @classmethod
    def of(cls, tensor: Tensor) -> PackedIntegers | None:
        """Pack a floating-point tensor of any shape; None if its numbers are not small and
        whole."""
        # one row is enough to reject most other tensors
        if tensor.numel() == 0 or not _is_whole(tensor[(0,) * (tensor.dim() - 1)]):
            return None
        octets = tensor.to(torch.uint8)
        bits = int(octets.max()).bit_length()
        if bits > MOST_BITS or not torch.equal(octets.to(tensor.dtype), tensor):
            return None
        planes = (octets.bitwise_and(1 << i).bool() for i in range(max(bits, 1)))
        return cls(tuple(PackedSpikes(plane, tensor.dtype) for plane in planes))

    @property
    def nbytes(self) -> int:
        """The size of all planes in bytes."""
        return sum(plane.nbytes for plane in self.planes)

    def numbers(self) -> Tensor:
        """Unpack to a new tensor, of the dtype, shape and strides of the one that was packed."""
        octets = self.planes[0].binary(torch.uint8)
        for i, plane in enumerate(self.planes[1:], 1):
            octets.add_(plane.binary(torch.uint8), alpha=1 << i)
        return octets.to(self.planes[0].dtype)


def _is_whole(tensor: Tensor) -> bool:
    return torch.equal(tensor, tensor.round())

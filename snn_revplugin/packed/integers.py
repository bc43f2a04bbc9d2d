"""Small whole numbers, such as sums of spikes, at a few bits each."""

from __future__ import annotations

import torch
from torch import Tensor

from .spikes import PackedSpikes

MAX_BITS = 5  # per element; packing larger numbers would save little


class PackedIntegers:
    """A tensor of whole numbers, at most 31 apart, as bit planes, each packed like spikes, in as
    many planes as the numbers take.

    >>> packed = PackedIntegers.of(torch.tensor([-1.0, 0.0, 3.0]))
    >>> len(packed.planes), packed.numbers()
    (3, tensor([-1.,  0.,  3.]))
    """

    __slots__ = ("lowest", "planes")

    def __init__(self, planes: tuple[PackedSpikes, ...], lowest: float = 0.0) -> None:
        self.planes = planes  # the lowest bit first, of the numbers less ``lowest``
        self.lowest = lowest

    @classmethod
    def of(cls, tensor: Tensor) -> PackedIntegers | None:
        """Pack a floating-point tensor of any shape.

        Returns:
            None if its numbers are not whole, or too far apart.
        """
        if tensor.numel() == 0:
            return None
        first_row = tensor[(0,) * (tensor.dim() - 1)]
        if not torch.equal(first_row, first_row.round()):  # rules most other tensors out
            return None
        lowest = min(tensor.min().item(), 0.0)
        octets = (tensor - lowest if lowest else tensor).to(torch.uint8)
        bits = int(octets.max()).bit_length()
        packed = cls(planes_of(octets, bits, tensor.dtype), lowest)
        return packed if bits <= MAX_BITS and torch.equal(packed.numbers(), tensor) else None

    @property
    def nbytes(self) -> int:
        """Bytes that the planes take."""
        return sum(plane.nbytes for plane in self.planes)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of what :meth:`numbers` gives."""
        return self.planes[0].layout

    def numbers(self) -> Tensor:
        """Unpack to a new tensor, equal in value, dtype, shape and strides."""
        octets = self.planes[0].binary(torch.uint8)
        for i, plane in enumerate(self.planes[1:], 1):
            octets.add_(plane.binary(torch.uint8), alpha=1 << i)
        numbers = octets.to(self.planes[0].dtype)
        return numbers.add_(self.lowest) if self.lowest else numbers


def planes_of(octets: Tensor, bits: int, dtype: torch.dtype) -> tuple[PackedSpikes, ...]:
    """The lowest bits of some octets, packed: at least one plane."""
    planes = (octets.bitwise_and(1 << i).bool() for i in range(max(bits, 1)))
    return tuple(PackedSpikes(plane, dtype) for plane in planes)

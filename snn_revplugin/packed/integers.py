"""Small whole numbers, such as sums of spikes, at a few bits each."""

from __future__ import annotations

import torch
from torch import Tensor

from .spikes import PackedSpikes

MAX_BITS = 5  # per element; packing larger numbers would save little


class PackedIntegers:
    """A tensor of whole numbers from 0 to 31 as bit planes, each packed like spikes, in as many
    planes as the largest takes.

    >>> packed = PackedIntegers.of(torch.tensor([0.0, 3.0, 5.0]))
    >>> len(packed.planes), packed.numbers()
    (3, tensor([0., 3., 5.]))
    """

    __slots__ = ("planes",)

    def __init__(self, planes: tuple[PackedSpikes, ...]) -> None:
        self.planes = planes  # the lowest bit first

    @classmethod
    def of(cls, tensor: Tensor) -> PackedIntegers | None:
        """Pack a floating-point tensor of any shape.

        Returns:
            None if its numbers are not small and whole.
        """
        if tensor.numel() == 0:
            return None
        first_row = tensor[(0,) * (tensor.dim() - 1)]
        if not torch.equal(first_row, first_row.round()):  # rules most other tensors out
            return None
        octets = tensor.to(torch.uint8)
        bits = int(octets.max()).bit_length()
        if bits > MAX_BITS or not torch.equal(octets.to(tensor.dtype), tensor):
            return None
        planes = (octets.bitwise_and(1 << i).bool() for i in range(max(bits, 1)))
        return cls(tuple(PackedSpikes(plane, tensor.dtype) for plane in planes))

    @property
    def nbytes(self) -> int:
        """Bytes that the planes take."""
        return sum(plane.nbytes for plane in self.planes)

    def numbers(self) -> Tensor:
        """Unpack to a new tensor, equal in value, dtype, shape and strides."""
        octets = self.planes[0].binary(torch.uint8)
        for i, plane in enumerate(self.planes[1:], 1):
            octets.add_(plane.binary(torch.uint8), alpha=1 << i)
        return octets.to(self.planes[0].dtype)

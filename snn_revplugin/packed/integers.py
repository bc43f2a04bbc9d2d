"""Small whole numbers at a few bits each: what sums of spikes are."""

from __future__ import annotations

import torch
from torch import Tensor

from .spikes import PackedSpikes

MOST_BITS = 5  # an element; of larger numbers little would be saved


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
        """The numbers of a floating-point tensor of any shape; None if they are not small and
        whole."""
        if tensor.numel() == 0 or not _is_whole(
            tensor[(0,) * (tensor.dim() - 1)]
        ):  # a row tells most others
            return None
        octets = tensor.to(torch.uint8)
        bits = int(octets.max()).bit_length()
        if bits > MOST_BITS or not torch.equal(octets.to(tensor.dtype), tensor):
            return None
        planes = (octets.bitwise_and(1 << i).bool() for i in range(max(bits, 1)))
        return cls(tuple(PackedSpikes(plane, tensor.dtype) for plane in planes))

    @property
    def nbytes(self) -> int:
        """Bytes that the planes take."""
        return sum(plane.nbytes for plane in self.planes)

    def numbers(self) -> Tensor:
        """The tensor that was packed: a new one, of the same dtype, shape and strides."""
        octets = self.planes[0].binary(torch.uint8)
        for i, plane in enumerate(self.planes[1:], 1):
            octets.add_(plane.binary(torch.uint8), alpha=1 << i)
        return octets.to(self.planes[0].dtype)


def _is_whole(tensor: Tensor) -> bool:
    return torch.equal(tensor, tensor.round())

"""Few different numbers, such as spikes as high as a learned threshold, at a few bits each."""

from __future__ import annotations

import torch
from torch import Tensor

from .integers import MAX_BITS, PackedIntegers, planes_of

SAMPLE = 256  # elements, which rule most tensors out
# A tensor of more than LARGE bytes is looked up in PARTS, so that no second one stands.
PARTS, LARGE = 8, 2**19


class PackedValues:
    """A tensor of at most 32 different numbers: a table of these, and the place of each element in
    it as bit planes.

    >>> packed = PackedValues.of(torch.tensor([0.0, 0.3, 0.3, 0.0]))
    >>> packed.nbytes, packed.numbers()
    (9, tensor([0.0000, 0.3000, 0.3000, 0.0000]))
    """

    __slots__ = ("places", "table")

    def __init__(self, places: PackedIntegers, table: Tensor) -> None:
        self.places, self.table = places, table

    @classmethod
    def of(cls, tensor: Tensor) -> PackedValues | None:
        """Pack a tensor of float32 or float64 and one or more dimensions.

        Returns:
            None if it has more different numbers, or NaN, or another dtype.
        """
        if tensor.numel() == 0 or tensor.dtype not in (torch.float32, torch.float64):
            return None
        flat = tensor.reshape(-1)
        table = flat[:: -(-len(flat) // SAMPLE)].unique()
        places = torch.empty_like(tensor, dtype=torch.uint8)
        while len(table) <= 1 << MAX_BITS:
            missing = _look_up(tensor, table, places)
            if missing is None:
                bits = (len(table) - 1).bit_length()
                return cls(PackedIntegers(planes_of(places, bits, torch.int32)), table)
            if missing.isnan().any():
                return None
            table = torch.cat((table, missing.unique())).unique()
        return None

    @property
    def nbytes(self) -> int:
        """Bytes that the planes and the table take."""
        return self.places.nbytes + self.table.nbytes

    def numbers(self) -> Tensor:
        """Unpack to a new tensor, equal in value, dtype, shape and strides."""
        return self.table[self.places.numbers()]


def _look_up(tensor: Tensor, table: Tensor, places: Tensor) -> Tensor | None:
    """Look elements up in a table, up to a part of the tensor that has some which are not there:
    these; None if there are none."""
    count = PARTS if tensor.nbytes > LARGE else 1
    for part, into in zip(tensor.chunk(count), places.chunk(count), strict=True):
        found = torch.searchsorted(table, part.contiguous(), out_int32=True)
        found.clamp_(max=len(table) - 1)
        differ = table[found] != part
        if differ.any():
            return part[differ]
        into.copy_(found)
    return None

"""Spikes of consecutive time steps, unpacked in one call.

A neuron's steps lie in one block of memory, row after row, and backward reads them row by row
downwards: for the input of the layer above, for that layer's weight gradient, for the reset that
they left. To unpack a row of a small layer is a few calls that cost more than its bits. So a
backward pass unpacks as many rows as :data:`MOST_BYTES` allows at once, and all readers share them.
"""

from __future__ import annotations

from torch import Tensor

from ..torch_internals.backward_pass import NO_PASS, current_pass
from ..torch_internals.pass_cache import pass_cache
from .spikes import PackedSpikes

# What a backward pass holds of the spikes of one layer so that several time steps share it. The
# graph nodes and Python objects of two neuron calls take more.
MOST_BYTES = 1 << 13


class UnpackedRows:
    """The rows of a block up to that of some spikes, as zeros and ones, not to be written to.

    Args:
        last: the spikes.
        count: the number of rows.
    """

    __slots__ = ("first", "last", "like", "rows", "tensor")

    def __init__(self, last: PackedSpikes, count: int) -> None:
        self.first, self.last, self.like = last.row - count + 1, last.row, last
        self.tensor = last.unpacked_with_rows_below(count)
        self.rows: tuple[Tensor, ...] | None = None

    def have(self, packed: PackedSpikes) -> bool:
        """Whether some spikes of the block are among these, in the same dtype, shape and layout."""
        return self.first <= packed.row <= self.last and packed.is_like(self.like)

    def of(self, packed: PackedSpikes) -> Tensor:
        """The zeros and ones of some spikes."""
        if self.rows is None:
            self.rows = self.tensor.unbind()
        return self.rows[packed.row - self.first]

    def joined(self, first: PackedSpikes, last: PackedSpikes) -> Tensor:
        """Those from ``first`` to ``last``, side by side along dimension 0."""
        part = self.tensor[first.row - self.first : last.row - self.first + 1]
        return part.flatten(0, 1)


def rows_with(packed: PackedSpikes, earlier: PackedSpikes | None = None) -> UnpackedRows | None:
    """Unpacked rows that the backward pass under way shares, with those of ``packed`` among them,
    and those of ``earlier`` ones in the same block.

    Returns:
        None outside of a backward pass, and where two rows would take more than the most.
    """
    block = packed.block
    if block.rows == 1:
        return None
    values = pass_cache()
    rows: UnpackedRows | None = values.get(block)
    if rows is not None and rows.have(packed) and (earlier is None or rows.have(earlier)):
        return rows
    nbytes = packed.unpacked_nbytes
    if not 0 < 2 * nbytes <= MOST_BYTES or current_pass() == NO_PASS:
        return None
    rows = values[block] = UnpackedRows(packed, min(MOST_BYTES // nbytes, packed.row + 1))
    return rows


def shared_binary(packed: PackedSpikes) -> Tensor:
    """The zeros and ones of some spikes, not to be written to."""
    rows = rows_with(packed)
    return packed.binary() if rows is None else rows.of(packed)


def release_rows(packed: PackedSpikes) -> None:
    """Drop the shared rows of a backward pass that has done with these spikes and all later
    ones."""
    if packed.block.rows == 1:
        return
    values = pass_cache()
    rows: UnpackedRows | None = values.get(packed.block)
    if rows is not None and packed.row <= rows.first:
        del values[packed.block]

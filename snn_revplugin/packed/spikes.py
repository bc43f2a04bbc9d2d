"""Spikes at one bit each.

A spike train is a tensor of zeros and ones, which autograd would save as floats. ``PackedSpikes``
stores one bit per spike. It unpacks to a tensor that equals the packed one in value, dtype, shape
and strides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..torch_internals import streams
from .codec import BITS, NUMPY, codec_for


class Block:
    """The bits of many time steps in one allocation, one row per step, all of one stream.

    Small allocations that stay, between large ones that come and go, would fragment the memory of
    the process. The number of rows doubles from block to block of a chain, up to ``MOST_ROWS``. On
    a device whose allocator rounds up to ``ROUNDED_TO`` bytes, as CUDA's does, the rows of a block
    fill as much at least.

    Args:
        bits: uint8 of [rows, bytes a row].
    """

    __slots__ = ("array", "bits", "codec", "nbytes", "rows", "stream", "used")

    MOST_ROWS = 16
    ROUNDED_TO = 512

    def __init__(self, bits: Tensor) -> None:
        self.bits, self.used, self.stream = bits, 0, streams.stream_of(bits.device)
        self.rows, self.nbytes = bits.shape  # the bytes of a row
        # Chosen in forward: the settings of this thread do not hold in autograd's threads.
        self.codec = NUMPY if bits.device.type == "cpu" else codec_for(bits)
        # numpy reads and writes a row without making a tensor for it.
        self.array = bits.numpy() if bits.device.type == "cpu" else None

    @classmethod
    def after(cls, before: Block | None, nbytes: int, device: torch.device) -> Block:
        """A block with room for one more row: ``before`` if it has room, else a larger new one."""
        rows = 1
        if before is not None and before.takes(nbytes, device):
            if before.used < before.rows:
                return before
            rows = min(2 * before.rows, cls.MOST_ROWS)
        if device.type != "cpu":
            rows = max(rows, cls.ROUNDED_TO // max(nbytes, 1))
        return cls(torch.empty((rows, nbytes), dtype=torch.uint8, device=device))

    def takes(self, nbytes: int, device: torch.device) -> bool:
        """Whether rows of this size, written on a device's current stream, may stand here."""
        same_size = self.nbytes == nbytes and self.bits.device == device
        return same_size and self.stream == streams.stream_of(device)

    @classmethod
    def of(cls, bits: Tensor) -> Block:
        """A full block of one row that holds ``bits``."""
        self = cls(bits.unsqueeze(0))
        self.used = 1
        return self

    def take(self) -> int:
        """Reserve the next row and return its index."""
        self.used += 1
        return self.used - 1


class PackedSpikes:
    """A binary tensor of any shape and layout, packed into eight elements per byte.

    Args:
        fired: where a neuron fired; bool, or zeros and ones in any real dtype; of any shape, dense
            in memory or not.
        dtype: the dtype of the unpacked spikes.
        factor: the graded-spike factor that multiplies every spike (snnTorch's
            ``graded_spikes_factor``), a scalar or a tensor that broadcasts with ``fired``. It is
            stored beside the bits.
        before: the spikes of the previous time step. These spikes go into the same block of memory
            if it has room.

    The strides are stored too. An operation that is recomputed from unpacked spikes must read the
    strides that it read in forward, or it may round differently.
    """

    __slots__ = ("block", "dtype", "factor", "row", "shape", "strides")

    def __init__(
        self,
        fired: Tensor,
        dtype: torch.dtype = torch.float32,
        factor: Tensor | None = None,
        before: PackedSpikes | None = None,
    ) -> None:
        self.shape, self.dtype, self.factor, self.strides = fired.shape, dtype, factor, None
        if not fired.is_contiguous():
            if _is_dense(fired):
                self.strides, fired = fired.stride(), fired.as_strided((fired.numel(),), (1,))
            else:
                fired = fired.contiguous()
        nbytes = -(-fired.numel() // BITS)
        self.block = Block.after(None if before is None else before.block, nbytes, fired.device)
        self.row = self.block.take()
        _pack(fired, self.block, self.row)

    @classmethod
    def of_bits(
        cls,
        bits: Tensor,
        shape: torch.Size,
        strides: tuple[int, ...],
        dtype: torch.dtype,
        factor: Tensor | None = None,
    ) -> PackedSpikes:
        """Wrap spikes that are packed already, in the memory order of a dense tensor with these
        strides."""
        self = cls.__new__(cls)
        self.block, self.row = Block.of(bits), 0
        self.shape, self.dtype, self.factor = shape, dtype, factor
        self.strides = None if _is_contiguous(shape, strides) else strides
        return self

    @property
    def bits(self) -> Tensor:
        """The bits: uint8 of ceil(n / 8) elements, lowest bit first."""
        return self.block.bits[self.row]

    @property
    def nbytes(self) -> int:
        """The size of the bits in bytes."""
        return self.block.nbytes

    @property
    def allocated(self) -> int:
        """The size of the block in bytes if it was allocated for these spikes (and later ones),
        else 0."""
        return self.block.bits.nbytes if self.row == 0 else 0

    @property
    def layout(self) -> tuple[int, ...]:
        """The strides of the unpacked spikes, which are dense in memory."""
        return contiguous(self.shape) if self.strides is None else self.strides

    def fired(self) -> Tensor:
        """Unpack to a new bool tensor."""
        return self._unpacked(torch.bool)

    def binary(self, dtype: torch.dtype | None = None) -> Tensor:
        """Unpack to a new tensor of zeros and ones in ``dtype``, by default that of the spikes."""
        return self._unpacked(dtype or self.dtype)

    def spikes(self) -> Tensor:
        """The spikes as the neuron gave them out, graded factor and all: a new tensor."""
        return self.binary() if self.factor is None else self.binary() * self.factor

    @property
    def unpacked_nbytes(self) -> int:
        """The bytes of the unpacked spikes."""
        return self.shape.numel() * self.dtype.itemsize

    def is_like(self, other: PackedSpikes) -> bool:
        """Whether other spikes unpack to the same shape, strides and dtype."""
        return (
            self.shape == other.shape
            and self.dtype is other.dtype
            and self.strides == other.strides
        )

    def follows(self, earlier: PackedSpikes) -> bool:
        """Whether ``earlier`` spikes are like these and lie in the row before, multiplied with the
        same factor, which is one for all samples of dimension 0."""
        return (
            self.block is earlier.block
            and self.row == earlier.row + 1
            and self.factor is earlier.factor
            and (self.factor is None or self.factor.dim() < len(self.shape))
            and self.is_like(earlier)
        )

    def unpacked_with_rows_below(self, count: int) -> Tensor:
        """The zeros and ones of ``count`` rows of the block, the last of them these spikes': of
        ``[count, *shape]``."""
        flat = _unpack_rows(self.block, self.row + 1 - count, count, self.shape.numel(), self.dtype)
        if self.strides is None:
            return flat.view(count, *self.shape)
        return flat.as_strided((count, *self.shape), (self.shape.numel(), *self.strides))

    def steps(self) -> PackedSteps:
        """The spikes of each time step, of those of a sequence ``[T, ...]``."""
        return PackedSteps(self)

    def _unpacked(self, dtype: torch.dtype) -> Tensor:
        flat = _unpack(self.block, self.row, self.shape.numel(), dtype)
        return (
            flat.view(self.shape)
            if self.strides is None
            else flat.as_strided(self.shape, self.strides)
        )

    def __repr__(self) -> str:
        return f"PackedSpikes(shape={tuple(self.shape)}, dtype={self.dtype}, nbytes={self.nbytes})"


class PackedSteps:
    """The spikes of each time step of a sequence ``[T, ...]``.

    Small steps are unpacked many at a time, because a call costs more than their bits.
    """

    __slots__ = ("_first", "_layout", "_length", "_packed", "_unpacked")

    TOGETHER = 2**14  # spikes that are unpacked in one call

    def __init__(self, packed: PackedSpikes) -> None:
        self._packed, self._layout = packed, packed.layout
        count = packed.shape[1:].numel()
        whole_bytes = BITS // math.gcd(count, BITS)  # steps whose bits end with a byte
        self._length = max(self.TOGETHER // max(count, 1) // whole_bytes, 1) * whole_bytes
        if self._layout[0] != count:  # a step's spikes do not lie together
            self._length = max(packed.shape[0], 1)
        self._first, self._unpacked = -1, None

    def binary(self, t: int) -> Tensor:
        """Zeros and ones of time step ``t``, not to be written to."""
        first = t - t % self._length
        if first != self._first:
            self._unpacked = None  # released before the next ones are allocated
            self._first, self._unpacked = first, self._unpack(first)
        fired = self._unpacked[t - first]
        return fired if fired.dtype is self._packed.dtype else to_binary(fired, self._packed.dtype)

    def silent(self, t: int) -> Tensor:
        """Ones where no spike is at time step ``t``. It may overwrite the tensor that
        :meth:`binary` returned for the step: do not read that one afterwards."""
        fired = self.binary(t)
        if self._length > 1 or fired.dtype is torch.bool:
            return torch.rsub(fired, 1.0)
        self._first, self._unpacked = -1, None
        return fired.neg_().add_(1.0)

    def _unpack(self, first: int) -> Tensor:
        """The steps from ``first`` on: numbers if they are few, else bools."""
        packed = self._packed
        steps = min(self._length, packed.shape[0] - first)
        count = packed.shape[1:].numel()
        few = steps == 1 or steps * count <= self.TOGETHER
        flat = _unpack(
            packed.block,
            packed.row,
            steps * count,
            packed.dtype if few else torch.bool,
            first * count // BITS,
        )
        return flat.as_strided((steps, *packed.shape[1:]), self._layout)


def to_binary(fired: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros and ones of a bool tensor; from uint8 the cast is several times as fast."""
    return fired.view(torch.uint8).to(dtype)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(
        (s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _is_contiguous(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    return all(
        a == b for a, b, size in zip(strides, contiguous(shape), shape, strict=True) if size != 1
    )


def _pack(fired: Tensor, block: Block, row: int) -> None:
    """Pack a contiguous tensor into one bit per element, lowest bit first."""
    if block.array is not None:
        NUMPY.pack_array(fired, block.array[row])
    else:
        block.codec.pack(fired.reshape(-1).bool(), block.bits[row])


def _unpack(block: Block, row: int, count: int, dtype: torch.dtype, start: int = 0) -> Tensor:
    """``count`` bits of a row, from byte ``start`` on, as a flat tensor of zeros and ones."""
    stop = start + -(-count // BITS)
    if block.array is not None:
        return NUMPY.unpack_array(block.array[row, start:stop], count, dtype)
    bits = block.bits[row, start:stop]
    return block.codec.unpack(bits, count, dtype)


def _unpack_rows(block: Block, first: int, rows: int, count: int, dtype: torch.dtype) -> Tensor:
    """The first ``count`` bits of some rows each, as a tensor of zeros and ones of ``[rows,
    count]``."""
    in_bytes = rows * block.nbytes
    if block.array is not None:
        array = block.array[first : first + rows].reshape(-1)
        flat = NUMPY.unpack_array(array, in_bytes * BITS, dtype)
    else:
        flat = block.codec.unpack(block.bits[first : first + rows].view(-1), in_bytes * BITS, dtype)
    return flat.view(rows, -1)[:, :count].contiguous()

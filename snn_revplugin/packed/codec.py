"""How bits are packed and unpacked: by numpy on a CPU, by torch operations or a registered codec
elsewhere.

A byte holds eight elements, the first one in its lowest bit. A codec packs a flat bool tensor of n
elements into uint8 ``bits`` of ceil(n / 8) elements, and unpacks the first n bits to zeros and
ones.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

BITS = 8
CHUNK = 1 << 16  # bytes unpacked at a time: their zeros and ones fit into a core's cache


class Codec(Protocol):
    """Packs and unpacks bits on some devices."""

    def takes(self, tensor: Tensor) -> bool:
        """Whether it packs and unpacks on the device of ``tensor``, under the current
        settings."""

    def pack(self, fired: Tensor, bits: Tensor) -> None:
        """Pack the flat bool tensor ``fired`` into the uint8 tensor ``bits``."""

    def unpack(self, bits: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """Return the first ``count`` bits as a new flat tensor of zeros and ones in ``dtype``."""


class NumpyCodec:
    """For the memory of a CPU: numpy reads and writes it in place, without a copy."""

    def takes(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu"

    def pack(self, fired: Tensor, bits: Tensor) -> None:
        self.pack_array(fired, bits.numpy())

    def unpack(self, bits: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        return self.unpack_array(bits.numpy(), count, dtype)

    def pack_array(self, fired: Tensor, row: np.ndarray) -> None:
        """Pack a contiguous tensor, bool or of zeros and ones, into a numpy array: to make a tensor
        for each row would cost time."""
        if fired.dtype is torch.bfloat16:  # which numpy does not have
            fired = fired.bool()
        flat = fired.numpy().reshape(-1)
        # numpy compares faster than torch casts to bool
        row[:] = np.packbits(flat if flat.dtype == bool else flat != 0, bitorder="little")

    def unpack_array(self, row: np.ndarray, count: int, dtype: torch.dtype) -> Tensor:
        """Unpack a numpy array: to make a tensor for each row would cost time."""
        if row.size <= CHUNK:
            octets = torch.from_numpy(np.unpackbits(row, count=count, bitorder="little"))
            # conversion from uint8 is three times as fast as from bool
            return octets.view(dtype) if dtype is torch.bool else octets.to(dtype)
        flat = torch.empty(count, dtype=dtype)
        # one chunk of bytes, not of floats, is the only temporary memory
        for start in range(0, row.size, CHUNK):
            octets = torch.from_numpy(np.unpackbits(row[start : start + CHUNK], bitorder="little"))
            part = flat[start * BITS : (start + CHUNK) * BITS]
            part.copy_(octets[: part.numel()])
        return flat


class TorchCodec:
    """For every device, by torch operations, of which each makes a tensor of a byte per element: a
    chunk at a time."""

    CHUNK = 1 << 19  # bytes of bits: few calls for a large tensor, and little beside it

    def takes(self, tensor: Tensor) -> bool:
        return True

    def pack(self, fired: Tensor, bits: Tensor) -> None:
        fired, shifts = fired.view(torch.uint8), _shifts(fired.device)
        for start in range(0, bits.numel(), self.CHUNK):
            octets = fired[start * BITS : (start + self.CHUNK) * BITS]
            if octets.numel() % BITS:
                octets = torch.nn.functional.pad(octets, (0, -octets.numel() % BITS))
            packed = bits[start : start + self.CHUNK]
            torch.sum(octets.view(-1, BITS) << shifts, 1, dtype=torch.uint8, out=packed)

    def unpack(self, bits: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        if bits.numel() <= self.CHUNK:
            return unpack_bits(bits, count, dtype)
        flat, shifts = torch.empty(count, dtype=dtype, device=bits.device), _shifts(bits.device)
        for start in range(0, bits.numel(), self.CHUNK):
            octets = bits[start : start + self.CHUNK].unsqueeze(1) >> shifts
            part = flat[start * BITS : (start + self.CHUNK) * BITS]
            part.copy_(octets.bitwise_and_(1).view(-1)[: part.numel()])
        return flat


NUMPY = NumpyCodec()
_codecs: list[Codec] = [TorchCodec()]


def register_codec(codec: Codec) -> None:
    """Give ``codec`` priority over the codecs registered before. (On a CPU numpy always packs.)"""
    _codecs.insert(0, codec)


def codec_for(tensor: Tensor) -> Codec:
    """The codec for a tensor that is not on a CPU."""
    return next(codec for codec in _codecs if codec.takes(tensor))


def unpack_bits(bits: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return the first ``count`` bits of a uint8 tensor as zeros and ones, by torch operations that
    a compiler can trace and fuse."""
    return ((bits.unsqueeze(1) >> _shifts(bits.device)) & 1).view(-1)[:count].to(dtype)


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(BITS, dtype=torch.uint8, device=device)

"""Spikes at one bit each.

A spike train is a tensor of zeros and ones that autograd would keep as floats. ``PackedSpikes`` keeps one bit a
spike, and unpacks to a tensor equal to the one that was packed in value, dtype, shape and strides.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .kernels.backend import packed_by_kernel, takes_triton, unpacked_by_kernel

BITS = 8
CHUNK = 1 << 16  # bytes unpacked at a time: the zeros and ones they make fit a core's cache


class PackedSpikes:
    """A binary tensor of any shape and layout, eight elements a byte.

    Args:
        fired: where a neuron fired; a bool tensor of any shape, dense in memory or not.
        dtype: the dtype in which the spikes are handed out again.
        factor: the graded-spike factor that multiplies every spike (snnTorch's ``graded_spikes_factor``), a scalar
            or a tensor that broadcasts with ``fired``. It is kept beside the bits.

    The layout is kept too: an operation that is computed again from unpacked spikes must see the strides that it saw
    the first time, or it may round otherwise.
    """

    __slots__ = ("bits", "dtype", "factor", "shape", "strides")

    def __init__(self, fired: Tensor, dtype: torch.dtype = torch.float32, factor: Tensor | None = None) -> None:
        if fired.dtype is not torch.bool:
            raise TypeError(f"fired must be a bool tensor, got {fired.dtype}")
        self.shape, self.dtype, self.factor = fired.shape, dtype, factor
        if fired.is_contiguous():
            self.strides, flat = None, fired.reshape(-1)
        elif _is_dense(fired):
            self.strides, flat = fired.stride(), fired.as_strided((fired.numel(),), (1,))
        else:
            self.strides, flat = None, fired.contiguous().reshape(-1)
        self.bits = _pack(flat)

    @classmethod
    def of_bits(
        cls, bits: Tensor, shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, factor: Tensor | None = None
    ) -> PackedSpikes:
        """Spikes that are packed already, in the memory order of a dense tensor with these strides."""
        self = cls.__new__(cls)
        self.bits, self.shape, self.dtype, self.factor = bits, shape, dtype, factor
        self.strides = None if _is_contiguous(shape, strides) else strides
        return self

    @property
    def nbytes(self) -> int:
        """Bytes that the bits take."""
        return self.bits.numel()

    def fired(self) -> Tensor:
        """The spikes as they were packed: a new bool tensor."""
        return self._arranged(_unpack(self.bits, self.shape.numel(), torch.bool))

    def binary(self, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros and ones in ``dtype``, by default that of the spikes: a new tensor."""
        return self._arranged(_unpack(self.bits, self.shape.numel(), dtype or self.dtype))

    def spikes(self) -> Tensor:
        """The spikes as the neuron gave them out, graded factor and all: a new tensor."""
        return self.binary() if self.factor is None else self.binary() * self.factor

    def _arranged(self, flat: Tensor) -> Tensor:
        return flat.view(self.shape) if self.strides is None else flat.as_strided(self.shape, self.strides)

    def __repr__(self) -> str:
        return f"PackedSpikes(shape={tuple(self.shape)}, dtype={self.dtype}, nbytes={self.nbytes})"


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _is_contiguous(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _pack(flat: Tensor) -> Tensor:
    """One bit an element of a flat bool tensor, lowest bit first; uint8 of ceil(n / 8) elements."""
    if flat.device.type == "cpu":
        # The bits live in memory of torch's own, so that whoever counts torch's bytes counts them too.
        packed = np.packbits(flat.numpy(), bitorder="little")
        return torch.empty(packed.size, dtype=torch.uint8).copy_(torch.from_numpy(packed))
    if takes_triton(flat):
        return packed_by_kernel(flat)
    octets = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % BITS)).view(-1, BITS)
    return (octets << _shifts(flat.device)).sum(1, dtype=torch.uint8)


def _unpack(bits: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The first ``count`` bits as a flat tensor of zeros and ones."""
    if bits.device.type != "cpu":
        if takes_triton(bits):
            return unpacked_by_kernel(bits, count, dtype)
        return ((bits.unsqueeze(1) >> _shifts(bits.device)) & 1).view(-1)[:count].to(dtype)
    packed = bits.numpy()
    if packed.size <= CHUNK:
        octets = torch.from_numpy(np.unpackbits(packed, count=count, bitorder="little"))
        return octets.view(dtype) if dtype is torch.bool else octets.to(dtype)  # from uint8: thrice as fast as from bool
    flat = torch.empty(count, dtype=dtype)
    for start in range(0, packed.size, CHUNK):  # a chunk of bytes, not floats, is all that stands beside the result
        octets = torch.from_numpy(np.unpackbits(packed[start : start + CHUNK], bitorder="little"))
        part = flat[start * BITS : (start + CHUNK) * BITS]
        part.copy_(octets[: part.numel()])
    return flat


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(BITS, dtype=torch.uint8, device=device)

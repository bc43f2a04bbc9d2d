"""Packing and unpacking by Triton kernels: a codec for the bits of spikes on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packed.codec import register_codec
from . import backend


class TritonCodec:
    """The kernels for packing, where the settings and the kernels' self-test allow them."""

    def takes(self, tensor: Tensor) -> bool:
        return backend.takes_triton(tensor)

    def pack(self, fired: Tensor, bits: Tensor) -> None:
        from .launch import kernels, pack

        pack(kernels(backend.INTERPRETED), fired, bits)

    def unpack(self, bits: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        from .launch import kernels, unpack

        return unpack(kernels(backend.INTERPRETED), bits, count, dtype)


register_codec(TritonCodec())

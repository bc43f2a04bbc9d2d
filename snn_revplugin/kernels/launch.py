"""Launchers: tensors in one dense layout become flat memory, outputs are made, and a kernel walks
over them.

A *layout* is a tuple of strides that fills one stretch of memory, in whatever order of dimensions.
All tensors of a launch have the same one; whatever has not is copied.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .kernel_spec import KernelSpec

ROWS = 128  # bytes of spikes, and so eight times as many neurons, that one program takes
WARPS = 4
BITS = 8
Layout = tuple[int, ...]


@cache
def kernels(interpreted: bool, name: str = "neuron") -> ModuleType:
    """A module of kernels, compiled or run by Triton's interpreter. Triton decides that when a
    kernel is defined, so the modules are executed once for each, in a package of their own."""
    package = f"{__package__}.{'interpreted' if interpreted else 'compiled'}"
    if package not in sys.modules:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(Path(__file__).parent)]
    before = _set_interpreter("1" if interpreted else "0")
    try:
        return importlib.import_module(f"{package}.{name}")
    finally:
        _set_interpreter(before)


def _set_interpreter(value: str | None) -> str | None:
    before = os.environ.pop("TRITON_INTERPRET", None)
    if value is not None:
        os.environ["TRITON_INTERPRET"] = value
    return before


def blocks(count: int) -> int:
    """The programs of a launch over so many neurons."""
    return -(-count // (BITS * ROWS))


def launch(
    kernel: Any,
    count: int,
    *arguments: Any,
    like: Tensor,
    spec: KernelSpec | None = None,
    **constants: Any,
) -> None:
    """Launch a kernel over ``count`` neurons on the device of ``like``.

    Multiplications and additions are not fused: a potential on its threshold must round as the
    host's does.
    """
    if spec is not None:
        constants = {"NEURON": _for_triton(spec), "WIDE": count + BITS * ROWS >= 2**31} | constants
    with _surroundings(like):
        kernel[(blocks(count),)](
            *arguments, **constants, ROWS=ROWS, num_warps=WARPS, enable_fp_fusion=False
        )


def _surroundings(like: Tensor) -> AbstractContextManager:
    if not like.is_cuda:
        return np.errstate(all="ignore")  # the interpreter's numpy would warn of every infinity
    return (
        nullcontext()
        if like.device.index == torch.cuda.current_device()
        else torch.cuda.device(like.device)
    )


@cache
def _for_triton(spec: KernelSpec) -> KernelSpec:
    import triton.language as tl

    dtypes = {each.name: getattr(spec, each.name) for each in fields(spec)}
    dtypes = {name: dtype for name, dtype in dtypes.items() if isinstance(dtype, torch.dtype)}
    return replace(
        spec,
        **{name: getattr(tl, str(dtype).removeprefix("torch.")) for name, dtype in dtypes.items()},
    )


# ------------------------------------------------------------ layouts


def has_layout(tensor: Tensor, layout: Layout) -> bool:
    return all(
        a == b for a, b, n in zip(tensor.stride(), layout, tensor.shape, strict=True) if n != 1
    )


def arranged(tensor: Tensor, layout: Layout) -> Tensor:
    """The tensor in a layout, itself if it has it."""
    tensor = tensor.detach()
    return (
        tensor
        if has_layout(tensor, layout)
        else empty(tensor.shape, layout, tensor.dtype, tensor).copy_(tensor)
    )


def empty(shape: Sequence[int], layout: Layout, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Every output of a kernel is made here, but for spikes that are packed into a block."""
    return torch.empty_strided(shape, layout, dtype=dtype, device=like.device)


# ------------------------------------------------------------ parameters


class Parameters(NamedTuple):
    """Decay, threshold and factor as the kernels take them; where neurons have their own, ``size``
    of them, each for ``inner`` neurons in a row."""

    decay: Tensor | float
    threshold: Tensor | float
    factor: Tensor | float
    inner: int = 1
    size: int = 1


def parameters_in(
    given: tuple[Tensor | float, ...], shape: Sequence[int], layout: Layout
) -> Parameters:
    """Parameters that broadcast to ``shape``, in the order in which its neurons lie in memory."""
    order = sorted(range(len(shape)), key=lambda dim: -layout[dim])
    each = [isinstance(value, Tensor) and value.numel() > 1 for value in given]
    many = [
        value.detach().expand(shape).permute(order)
        for value, several in zip(given, each, strict=True)
        if several
    ]
    if not many:
        return Parameters(*given)
    varying = [
        i
        for i in range(len(order))
        if any(value.shape[i] > 1 and value.stride(i) for value in many)
    ]
    first, last = varying[0], varying[-1]
    sizes = [shape[dim] for dim in order]
    inside = tuple(slice(None) if first <= i <= last else 0 for i in range(len(order)))
    flat = iter([value[inside].reshape(-1).contiguous() for value in many])
    given = tuple(
        next(flat) if several else value for value, several in zip(given, each, strict=True)
    )
    return Parameters(
        *given, inner=_product(sizes[last + 1 :]), size=_product(sizes[first : last + 1])
    )


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


class Total:
    """The gradient of a parameter: room for a kernel to write it, by neuron or by block, and its
    sum.

    Args:
        wanted: False for a parameter that needs none; ``room`` is None then.
        held: as in :class:`.form.Form`.
    """

    def __init__(
        self, wanted: bool, held: str, shape: Sequence[int], layout: Layout, like: Tensor
    ) -> None:
        self.room = None
        if wanted and held == "each":
            self.room = empty(shape, layout, torch.float32, like)
        elif wanted:
            self.room = empty((blocks(_product(shape)),), (1,), torch.float32, like)

    def sum(self, parameter: Tensor) -> Tensor | None:
        if self.room is None:
            return None
        if parameter.numel() == 1:
            return self.room.sum().reshape(parameter.shape)
        return self.room.sum_to_size(parameter.shape)


# ------------------------------------------------------------ bits


def pack(code: ModuleType, fired: Tensor, bits: Tensor) -> None:
    """One bit an element of a flat tensor of zeros and ones, lowest bit first, into uint8 ``bits``
    of ceil(n / 8) elements."""
    count = fired.numel()
    if count:
        launch(code.pack_kernel, count, _as_numbers(fired), bits, count, like=fired)


def unpack(code: ModuleType, bits: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The first ``count`` bits as a flat tensor of zeros and ones."""
    ones = empty((count,), (1,), dtype, bits)
    if count:
        launch(code.unpack_kernel, count, bits, _as_numbers(ones), count, like=bits)
    return ones


def _as_numbers(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor

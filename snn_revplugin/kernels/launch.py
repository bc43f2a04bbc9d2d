"""Launchers: tensors in one dense layout are flat memory to a kernel.

A *layout* is a tuple of strides that fill one stretch of memory, in any order of dimensions. All
tensors of a launch have the same one; a tensor with another one is copied.
"""

from __future__ import annotations

import importlib
import math
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

from ..neurons.kernel_spec import KernelNumbers, KernelSpec

INTERPRETED, COMPILED = "interpreted", "compiled"  # packages of kernels, see :mod:`.jit`
# Neurons of a thread, see :mod:`.equations`: of a byte of spikes, or half of one; or a quarter,
# where the thread holds more than ``FEW_STEPS`` potentials of each.
BITS, HALF, QUARTER = 8, 4, 2
FEW_STEPS = 4
# Threads of a program: many, if that leaves every multiprocessor programs to switch between.
MANY, FEW, WARP = 128, 32, 32
PROGRAMS = 4
# Time steps whose charged potentials a program holds in registers: of a sequence of up to AT_ONCE
# steps all of them; of a longer one STRETCH at a time.
AT_ONCE, STRETCH = 16, 8
FIRST_KNOWN, LAST_KNOWN = (3, 6), (3, 8)  # releases of Triton, see :func:`knows_launcher`
Layout = tuple[int, ...]


@cache
def kernels(interpreted: bool, name: str = "neuron") -> ModuleType:
    """A module of kernels, compiled or run by Triton's interpreter. A kernel is one or the other
    from its definition on (:mod:`.jit`), so each module is imported once into either package."""
    package = f"{__package__}.{INTERPRETED if interpreted else COMPILED}"
    if package not in sys.modules:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(Path(__file__).parent)]
    return importlib.import_module(f"{package}.{name}")


def threads_for(count: int, per_thread: int, device: torch.device) -> int:
    """The threads of a program, of a launch over so many neurons."""
    wanted = PROGRAMS * _multiprocessors(device)
    return MANY if count >= wanted * per_thread * MANY else FEW


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter's programs run one after the other
    return torch.cuda.get_device_properties(device).multi_processor_count


def blocks(count: int, per_thread: int, device: torch.device) -> int:
    """The programs of a launch over so many neurons."""
    return -(-count // (per_thread * threads_for(count, per_thread, device)))


class Compiled:
    """A kernel that was launched before.

    Args:
        kernel: what ``triton.jit`` made of it.
        constants: its last arguments, in their order.
        spec: held, so that no other one gets its ``id``.
    """

    __slots__ = ("_constants", "_device", "_hooks", "_kernel", "_spec")

    def __init__(self, kernel: Any, constants: tuple, spec: KernelSpec | None) -> None:
        from triton import knobs
        from triton.runtime.driver import driver

        self._kernel, self._constants, self._spec = kernel, constants, spec
        self._device, self._hooks = driver.active, knobs.runtime

    def launch(self, programs: int, index: int | None, arguments: tuple) -> None:
        """Launch it on the current device, whose index this is."""
        kernel, hooks = self._kernel, self._hooks
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:  # a profiler's
            kernel[programs, 1, 1](*arguments, *self._constants)
            return
        stream = self._device.get_current_stream(index)
        kernel.run(
            programs, 1, 1, stream, kernel.function, kernel.packed_metadata, None, None, None,
            *arguments, *self._constants,
        )  # fmt: skip


@cache
def knows_launcher() -> bool:
    """Whether :class:`Compiled` knows what a compiled kernel of this Triton takes: its releases do
    not promise that it stays."""
    import triton

    release = tuple(map(int, triton.__version__.split(".")[:2]))
    return FIRST_KNOWN <= release <= LAST_KNOWN


# By all that a kernel is compiled for. ``kernel[grid]`` finds that out at each launch, by way of
# strings.
_compiled: dict[tuple, Compiled] = {}


def launch(
    kernel: Any,
    count: int,
    *arguments: Any,
    like: Tensor,
    spec: KernelSpec | None = None,
    per_thread: int = BITS,
    **constants: Any,
) -> None:
    """Launch a kernel over ``count`` neurons, so many for each thread, on the device of ``like``.

    Multiplications and additions are not fused: a potential on its threshold must round as the
    host's does.
    """
    device, wide = like.device, count + BITS * MANY >= 2**31
    threads = threads_for(count, per_thread, device)
    programs = -(-count // (per_thread * threads))
    kinds = map(_kind_of, arguments)
    key = id(kernel), device, threads, wide, id(spec), *constants.values(), *kinds
    known = _compiled.get(key)
    if known is not None and (not like.is_cuda or device.index == torch.cuda.current_device()):
        known.launch(programs, device.index, arguments)
        return
    if spec is not None:
        constants |= {"NEURON": _for_triton(spec), "WIDE": wide}
    constants["ROWS"] = threads
    with _surroundings(like):
        made = kernel[(programs,)](
            *arguments, **constants, num_warps=threads // WARP, enable_fp_fusion=False
        )
    if made is not None and knows_launcher():  # the interpreter makes none
        names = kernel.arg_names[len(arguments) :]
        _compiled[key] = Compiled(made, tuple(constants[name] for name in names), spec)


def _kind_of(argument: Any) -> Any:
    """What a kernel is compiled for, of an argument: of a pointer its dtype and whether vectors can
    be read from it; of a number whether it is one, a multiple of 16, and fits into 32 bits."""
    kind = type(argument)
    if argument is None or kind is float:
        return kind
    if kind is int:
        return argument == 1 or (argument & 15 == 0, argument >> 31)
    return argument.dtype if argument.data_ptr() & 15 == 0 else (argument.dtype,)


def forget_compiled() -> None:
    """Let every kernel's next launch compile it."""
    _compiled.clear()


def _surroundings(like: Tensor) -> AbstractContextManager:
    if not like.is_cuda:
        return np.errstate(all="ignore")  # the interpreter's numpy would warn of each infinity
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
    """The tensor in a layout: itself, or a copy."""
    tensor = tensor.detach()
    return (
        tensor
        if has_layout(tensor, layout)
        else empty(tensor.shape, layout, tensor.dtype, tensor).copy_(tensor)
    )


def empty(shape: Sequence[int], layout: Layout, dtype: torch.dtype, like: Tensor) -> Tensor:
    """The memory of an output. Every output of a kernel is made here, except for spikes that are
    packed into a block."""
    return torch.empty_strided(shape, layout, dtype=dtype, device=like.device)


# ------------------------------------------------------------ parameters


class Parameters(NamedTuple):
    """Decay, threshold and factor as the kernels take them. Where neurons have values of their own,
    there are ``size`` of these, each for ``inner`` neurons in a row."""

    decay: Tensor | float
    threshold: Tensor | float
    factor: Tensor | float
    inner: int = 1
    size: int = 1


def parameters_in(numbers: KernelNumbers, shape: Sequence[int], layout: Layout) -> Parameters:
    """Decay, threshold and factor, which broadcast to ``shape``, in the memory order of its
    neurons."""
    given = numbers[:3]
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
        *given, inner=math.prod(sizes[last + 1 :]), size=math.prod(sizes[first : last + 1])
    )


class Totals:
    """The gradients of decay, threshold and factor: memory that a kernel writes them to, per neuron
    or per block, and their sums.

    Args:
        spec: of the kernel.
        wanted: which of the three are needed.
        shape, layout: of the neurons.
        like: a tensor on their device.
        per_thread: the neurons of a thread.

    Attributes:
        memory: for the kernel; None for a gradient that is not needed.
    """

    def __init__(
        self, spec: KernelSpec, wanted: Sequence[bool], shape: Sequence[int], layout: Layout,
        like: Tensor, per_thread: int = HALF,
    ) -> None:  # fmt: skip
        self.memory: list[Tensor | None] = []
        for held, needed in zip(
            (spec.decay_held, spec.threshold_held, spec.factor_held), wanted, strict=True
        ):
            if not needed:
                self.memory.append(None)
            elif held == "each":
                self.memory.append(empty(shape, layout, torch.float32, like))
            else:
                programs = blocks(math.prod(shape), per_thread, like.device)
                self.memory.append(empty((programs,), (1,), torch.float32, like))

    def sums(self, numbers: KernelNumbers) -> list[Tensor | None]:
        """The gradients, each of its number's shape."""
        return [
            None if memory is None else _summed(memory, number)
            for memory, number in zip(self.memory, numbers, strict=False)
        ]


def _summed(memory: Tensor, number: Tensor) -> Tensor:
    if number.numel() == 1:
        return memory.sum().reshape(number.shape)
    return memory.sum_to_size(number.shape)


# ------------------------------------------------------------ bits


def pack(code: ModuleType, fired: Tensor, bits: Tensor) -> None:
    """Pack a flat tensor of n zeros and ones into uint8 ``bits`` of ceil(n / 8) elements, lowest
    bit first."""
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

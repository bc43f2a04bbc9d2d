"""How much memory one training step holds: after the forward, and at most.

On CPU there are no statistics of torch's to read, so :class:`LiveBytes` watches every operation and
counts the bytes of the tensors that are born and die. Operations free their own scratch memory
before they return; that is not seen. On CUDA the allocator's statistics are read after every
operation, of what was allocated and of what was reserved. Its peaks are the user's and are not
reset; they tell the scratch memory inside operations where they rise.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..torch_internals import backward_pass, tensors

MIB = 2**20


@dataclass(frozen=True)
class MemoryReport:
    """The memory of one training step, in bytes, beyond what was held before it.

    Attributes:
        device: where it was measured.
        retained: held when the first backward began; what the graph keeps, mostly.
        peak: the most that was held at any moment of the step. Parameter gradients that the step
            made are part of it.
        left: still held when the step was over: gradients, and states that are carried on.
        retained_reserved: like ``retained``, of the memory that torch had reserved from the device;
            None on CPU.
        peak_reserved: like ``peak``, likewise.
    """

    device: str
    retained: int
    peak: int
    left: int
    retained_reserved: int | None = None
    peak_reserved: int | None = None

    def __str__(self) -> str:
        figures = (
            f"retained {mib(self.retained)}, peak {mib(self.peak)}, left {mib(self.left)} on"
            f" {self.device}"
        )
        if self.peak_reserved is None:
            return figures
        return (
            f"{figures}; reserved {mib(self.retained_reserved)}, at most {mib(self.peak_reserved)}"
        )


def mib(size: float) -> str:
    """Bytes as a number to read.

    >>> mib(3 * 2**20)
    '3.0 MiB'
    """
    return f"{size / MIB:.1f} MiB"


class LiveBytes:
    """Counts, inside a ``with`` block, the bytes of the memory that was born in it and is still
    alive, by device.

    Memory from before counts nothing, wherever it turns up, and a view counts nothing beside its
    base. Memory that dies after the block is still taken off, so that a leak can be told from what
    lives as long as a variable.

    Args:
        at_first_backward: called, if given, when the first backward pass inside the block begins.
        after_each: called, if given, after every operation.

    >>> import torch
    >>> with LiveBytes() as live:
    ...     x = torch.zeros(1024)
    ...     y = x.view(32, 32) + 1
    >>> live.now(), live.peak()
    (8192, 8192)
    >>> del y
    >>> live.now(), live.peak()
    (4096, 8192)
    """

    def __init__(
        self,
        at_first_backward: Callable[[], None] | None = None,
        after_each: Callable[[], None] | None = None,
    ) -> None:
        self._now: Counter[str] = Counter()
        self._peak: Counter[str] = Counter()
        self._retained: Counter[str] | None = None  # what was alive when the first backward began
        self._at_first_backward, self._after_each = at_first_backward, after_each
        self._sizes: dict[
            int, int
        ] = {}  # of every storage that is known, by id; 0 for those from before
        self._watched: dict[int, weakref.ref] = {}
        self._mode = tensors.Watch(self._before, self._after)

    def __enter__(self) -> LiveBytes:
        self._mode.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._mode.__exit__(*exception)

    def now(self, device: str = "cpu") -> int:
        """Bytes alive."""
        return self._now[device]

    def peak(self, device: str = "cpu") -> int:
        """The most bytes that were alive at once."""
        return self._peak[device]

    def retained(self, device: str = "cpu") -> int | None:
        """Bytes that were alive when the first backward began; None if none has."""
        return None if self._retained is None else self._retained[device]

    def busiest_device(self) -> str:
        """The device with the largest peak."""
        return max(self._peak, key=self._peak.__getitem__, default="cpu")

    def _before(self, inputs: list[Tensor]) -> None:
        if self._retained is None and backward_pass.current_pass() != backward_pass.NO_PASS:
            self._retained = self._now.copy()
            if self._at_first_backward is not None:
                self._at_first_backward()
        for each in inputs:
            storage = tensors.storage_of(each)
            if storage is not None and id(storage) not in self._sizes:
                self._watch(storage, str(storage.device), 0)

    def _after(self, outputs: list[Tensor]) -> None:
        for each in outputs:
            storage = tensors.storage_of(each)
            if storage is None:
                continue
            key, size = id(storage), storage.nbytes()
            device = str(storage.device)
            if key not in self._sizes:
                self._watch(storage, device, size)
            elif self._sizes[key] and self._sizes[key] != size:  # resized in place
                self._grow(device, size - self._sizes[key])
                self._sizes[key] = size
        if self._after_each is not None:
            self._after_each()

    def _watch(self, storage: torch.UntypedStorage, device: str, size: int) -> None:
        key = id(storage)
        self._sizes[key] = size
        self._watched[key] = weakref.ref(storage, lambda _: self._died(key, device))
        self._grow(device, size)

    def _grow(self, device: str, size: int) -> None:
        self._now[device] += size
        self._peak[device] = max(self._peak[device], self._now[device])

    def _died(self, key: int, device: str) -> None:
        self._now[device] -= self._sizes.pop(key)
        del self._watched[key]


def memory_report(
    step_fn: Callable[[], Tensor | object],
    *,
    device: torch.device | str | None = None,
    at_first_backward: Callable[[], None] | None = None,
) -> MemoryReport:
    """Run one training step and measure the memory that it holds.

    On CUDA, run the step once before: libraries allocate their workspaces when they are first used.
    ``peak`` contains the scratch memory inside its operations where it is a new peak of
    ``torch.cuda``: call :func:`torch.cuda.reset_peak_memory_stats` before to be sure. Gradients
    that are there already are added to and cost nothing; for those of a fresh step call
    ``zero_grad(set_to_none=True)`` first.

    Args:
        step_fn: runs a forward and returns the loss, a scalar, whose backward is then run here; or
            runs a whole step, its own backward included, and returns whatever it likes.
        device: what to measure; the device that held most, if it is not given.
        at_first_backward: called, if given, when ``retained`` is measured.

    Returns:
        What was held after the forward, at most, and at the end.

    Raises:
        ValueError: the step ran no backward and returned no loss to run one on.

    >>> import torch
    >>> w = torch.ones(2**20, requires_grad=True)
    >>> print(memory_report(lambda: w.exp().exp().sum()))
    retained 8.0 MiB, peak 12.0 MiB, left 4.0 MiB on cpu
    """
    wanted = None if device is None else torch.device(device)
    if wanted is not None and wanted.type == "cuda" and wanted.index is None:
        wanted = torch.device("cuda", torch.cuda.current_device())
    count = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    allocators = {f"cuda:{index}": _Allocator(index) for index in range(count)}
    observers = [each.first_backward for each in allocators.values()]
    if at_first_backward is not None:
        observers.append(at_first_backward)
    look = (lambda: [each.look() for each in allocators.values()]) if allocators else None
    with LiveBytes(lambda: [observe() for observe in observers], look) as live:
        result = step_fn()
        if live.retained() is None:
            _check_loss(result)
            result.backward()
    del result
    where = str(wanted or live.busiest_device())
    if where in allocators:
        return allocators[where].report()
    return MemoryReport(where, live.retained(where), live.peak(where), live.now(where))


def reset_peaks(device: torch.device | str) -> None:
    """Reset torch's peak statistics of a CUDA device, in a program that is there to measure."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


class _Allocator:
    """The statistics of one CUDA device, from the moment this is made."""

    def __init__(self, index: int) -> None:
        self.index, self.name = index, f"cuda:{index}"
        torch.cuda.synchronize(index)
        torch.cuda.empty_cache()
        self.start, self.peaks_before = self._now(), self._peaks()
        self.most, self.retained = self.start, (0, 0)

    def _now(self) -> tuple[int, int]:
        return torch.cuda.memory_allocated(self.index), torch.cuda.memory_reserved(self.index)

    def _peaks(self) -> tuple[int, int]:
        """The user's, of whatever ran before."""
        return (
            torch.cuda.max_memory_allocated(self.index),
            torch.cuda.max_memory_reserved(self.index),
        )

    def _since_start(self, figures: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(now - start for now, start in zip(figures, self.start, strict=True))

    def look(self) -> None:
        self.most = tuple(map(max, self.most, self._now()))

    def first_backward(self) -> None:
        self.retained = self._since_start(self._now())

    def report(self) -> MemoryReport:
        torch.cuda.synchronize(self.index)
        self.look()
        peak = self._since_start(
            tuple(
                peak if peak > before else most
                for peak, before, most in zip(
                    self._peaks(), self.peaks_before, self.most, strict=True
                )
            )
        )
        left, _ = self._since_start(self._now())
        return MemoryReport(self.name, self.retained[0], peak[0], left, self.retained[1], peak[1])


def _check_loss(result: object) -> None:
    if not isinstance(result, Tensor):
        raise ValueError(
            f"step_fn ran no backward and returned {type(result).__name__}; return the loss or call"
            " its backward"
        )
    if result.grad_fn is None:
        raise ValueError(
            "step_fn returned a tensor without a graph; return the loss of a forward with gradients"
        )
    if result.numel() != 1:
        raise ValueError(
            f"step_fn returned a tensor of shape {tuple(result.shape)}; return a scalar loss"
        )

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
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, overload

import torch
from torch import Tensor

from ..torch_internals import backward_pass, tensors
from .figures import MIB as MIB
from .figures import MemoryReport
from .figures import mib as mib
from .timeline import LayerReport, Timeline
from .timeline_picture import check_matplotlib, draw


class LiveBytes:
    """Counts, inside a ``with`` block, the bytes of the memory that was born in it and is still
    alive, by device.

    Memory from before counts nothing, wherever it turns up, and a view counts nothing beside its
    base. Memory that dies after the block is still taken off, so that a leak can be told from what
    lives as long as a variable.

    Args:
        at_first_backward: called, if given, when the first backward pass inside the block begins.
        after_each: called, if given, after every operation.
        at_change: called, if given, whenever memory is born, resized or dies: with the ``id`` of
            its storage, its device, its new size, the tensor and the operation's name; at a death
            the size is 0, and tensor and name are None.

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
        at_change: Callable[[int, str, int, Tensor | None, str | None], None] | None = None,
    ) -> None:
        self._now: Counter[str] = Counter()
        self._peak: Counter[str] = Counter()
        self._retained: Counter[str] | None = None  # what was alive when the first backward began
        self._at_first_backward, self._after_each = at_first_backward, after_each
        self._at_change = at_change
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
            else:
                continue
            if self._at_change is not None:
                self._at_change(key, device, size, each, self._mode.operation)
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
        if self._at_change is not None:
            self._at_change(key, device, 0, None, None)


@overload
def memory_report(
    step_fn: Callable[[], Tensor | object],
    *,
    device: torch.device | str | None = ...,
    at_first_backward: Callable[[], None] | None = ...,
) -> MemoryReport: ...


@overload
def memory_report(
    step_fn: Callable[[], Tensor | object],
    *,
    by: Literal["layer"],
    host: LayerReport | None = ...,
    plot: Path | str | None = ...,
    device: torch.device | str | None = ...,
    at_first_backward: Callable[[], None] | None = ...,
) -> LayerReport: ...


def memory_report(
    step_fn: Callable[[], Tensor | object],
    *,
    by: Literal["layer"] | None = None,
    host: LayerReport | None = None,
    plot: Path | str | None = None,
    device: torch.device | str | None = None,
    at_first_backward: Callable[[], None] | None = None,
) -> MemoryReport | LayerReport:
    """Run one training step and measure the memory that it holds.

    On CUDA, run the step once before: libraries allocate their workspaces when they are first used.
    ``peak`` contains the scratch memory inside its operations where it is a new peak of
    ``torch.cuda``: call :func:`torch.cuda.reset_peak_memory_stats` before to be sure. Gradients
    that are there already are added to and cost nothing; for those of a fresh step call
    ``zero_grad(set_to_none=True)`` first.

    Args:
        step_fn: runs a forward and returns the loss, a scalar, whose backward is then run here; or
            runs a whole step, its own backward included, and returns whatever it likes.
        by: ``"layer"`` for a report that says which layer holds what, in forward and in backward,
            and which layer runs at the peak.
        host: such a report of the same step with the host's neurons, to stand beside this one.
        plot: the file for a picture of the report by layer, and of ``host``; the ending of its name
            decides the format. It needs matplotlib, which the extra ``cli`` brings.
        device: what to measure; the device that held most, if it is not given.
        at_first_backward: called, if given, when ``retained`` is measured.

    Returns:
        What was held after the forward, at most, and at the end; in bytes.

    Raises:
        ValueError: the step ran no backward and returned no loss to run one on; ``by`` is neither
            None nor ``"layer"``; ``host`` or ``plot`` is given without ``by="layer"``.
        TypeError: ``host`` is no report by layer.
        ImportError: ``plot`` is given and matplotlib is not installed.

    >>> import torch
    >>> w = torch.ones(2**20, requires_grad=True)
    >>> print(memory_report(lambda: w.exp().exp().sum()))
    retained 8.0 MiB, peak 12.0 MiB, left 4.0 MiB on cpu
    """
    _check_choices(by, host, plot)
    timeline = None if by is None else Timeline()
    total = _measure(step_fn, timeline, _with_index(device), at_first_backward)
    if timeline is None:
        return total
    report = timeline.report(total, host)
    if plot is not None:
        draw(report).savefig(plot, dpi=150)
    return report


def _measure(
    step_fn: Callable[[], Tensor | object],
    timeline: Timeline | None,
    device: torch.device | None,
    at_first_backward: Callable[[], None] | None,
) -> MemoryReport:
    """The totals of the step; the timeline, if there is one, sees it run."""
    count = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    allocators = {f"cuda:{index}": _Allocator(index) for index in range(count)}
    observers = [each.first_backward for each in allocators.values()]
    if timeline is not None:
        observers.append(timeline.first_backward)
    if at_first_backward is not None:
        observers.append(at_first_backward)
    look = (lambda: [each.look() for each in allocators.values()]) if allocators else None
    live = LiveBytes(
        lambda: [observe() for observe in observers], look, timeline and timeline.changed
    )
    with timeline or nullcontext(), live:
        result = step_fn()
        if live.retained() is None:
            _check_loss(result)
            result.backward()
    del result
    where = str(device or live.busiest_device())
    if where in allocators:
        return allocators[where].report()
    return MemoryReport(where, live.retained(where), live.peak(where), live.now(where))


def _with_index(device: torch.device | str | None) -> torch.device | None:
    """The device; "cuda" is the current one."""
    wanted = None if device is None else torch.device(device)
    if wanted is not None and wanted.type == "cuda" and wanted.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return wanted


def _check_choices(by: str | None, host: LayerReport | None, plot: Path | str | None) -> None:
    if by not in (None, "layer"):
        raise ValueError(f"by must be None or 'layer', got {by!r}")
    for name, value in (("host", host), ("plot", plot)):
        if value is not None and by is None:
            raise ValueError(f"{name} needs by='layer'")
    if host is not None and not isinstance(host, LayerReport):
        raise TypeError(
            f"host must be a report by layer, of memory_report(step, by='layer'), got"
            f" {type(host).__name__}"
        )
    if plot is not None:
        check_matplotlib()


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

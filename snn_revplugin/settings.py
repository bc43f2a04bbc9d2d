"""The settings: a few numbers that trade memory against time and rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from .budget import LEAST, check_budget

BACKENDS = ("auto", "triton", "torch")


@dataclass(frozen=True, slots=True)
class Settings:
    """How the library saves memory. A reversible neuron reads the settings at each call.

    Args:
        reversible: with False every neuron takes its host's own path, for comparison.
        lost_bits: how many bits of a membrane potential's mantissa (24 in float32, 53 in float64)
            reversal in time may lose before an anchor corrects it, at most 5. More bits mean fewer
            anchors and less exact gradients. At 0 a neuron with a leak is not reversed: its
            potentials are rebuilt forward, exactly.
        max_anchor_interval: the largest number of time steps between two anchors of a neuron that
            is reversed.
        rebuild_interval: the number of time steps between two anchors of a neuron whose reset
            cannot be inverted. Its potentials are rebuilt forward from the anchor below, exactly;
            the potentials of one interval stand in memory at the same time. At 1 every potential
            is stored, and the layers below run forward twice instead of three times.
        backend: what computes a neuron's arithmetic: "triton" for fused kernels, "torch" for plain
            torch code, "auto" for kernels where they are available and have agreed with the plain
            code on a sample. With "triton" the kernels are not tested first, and a call raises an
            error where they are not available.
        recompute_min_bytes: a size in bytes per time step, of a neuron's current and of what was
            saved on the way to it. Up to this size both are stored, from the second such step on:
            the Python objects of a recipe would take about as many bytes, and time. A larger value
            is faster where Python takes most of the time. At 0 everything is recomputed.
        memory_budget: what a training step may keep of the values that backward could recompute.
            "least": none of them. "peak": whatever does not raise the peak of the step. "host": all
            of them. A number of bytes, an amount such as "2 GiB", or a share of the device's memory
            such as "60%": as much as leaves the peak below it. The first step is observed, later
            ones follow its plan.
        match_host_order: with True backward keeps the host's own order of operations and memory
            formats, so that gradients have the host's bits wherever potentials are not reversed.
            With False a layer that receives the same data at every time step is differentiated
            once, spikes reach a convolution's backward in the memory format that is fastest, and
            several time steps of a small layer are recomputed in one call.
        capturable: with True everything is decided without looking at values, as while a CUDA graph
            is captured. Warm up under it: then the warm-up takes the decisions, and loads the
            kernels, of the capture.

    Raises:
        ValueError: a number is out of range, or the backend is unknown.
    """

    reversible: bool = True
    lost_bits: float = 4
    max_anchor_interval: int = 64
    rebuild_interval: int = 12
    backend: str = "auto"
    recompute_min_bytes: int = 1024
    memory_budget: float | str = LEAST
    match_host_order: bool = False
    capturable: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.lost_bits <= 5:
            raise ValueError(f"lost_bits must lie between 0 and 5, got {self.lost_bits}")
        for name in ("max_anchor_interval", "rebuild_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.recompute_min_bytes >= 0:
            raise ValueError(
                f"recompute_min_bytes must be at least 0, got {self.recompute_min_bytes}"
            )
        check_budget(self.memory_budget)
        if self.backend not in BACKENDS:
            raise ValueError(
                f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {self.backend!r}"
            )


_settings: ContextVar[Settings] = ContextVar("snn_revplugin_settings", default=Settings())  # noqa: B039 (frozen)


def get_settings() -> Settings:
    """The current settings of this thread."""
    return _settings.get()


@contextmanager
def use_settings(**changes: float | str) -> Iterator[Settings]:
    """Change some of the settings inside a ``with`` block.

    >>> with use_settings(lost_bits=3) as settings:
    ...     settings.lost_bits
    3
    """
    token = _settings.set(replace(get_settings(), **changes))
    try:
        yield get_settings()
    finally:
        _settings.reset(token)

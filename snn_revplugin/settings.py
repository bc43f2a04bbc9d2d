"""The few numbers that weigh memory against time and rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

BACKENDS = ("auto", "triton", "torch")


@dataclass(frozen=True, slots=True)
class Settings:
    """How the memory saving works, for every reversible neuron that is called while these settings
    hold.

    Args:
        reversible: False makes every neuron take its host's own path, for comparison.
        lost_bits: how many bits of a membrane potential's mantissa (24 in float32, 53 in float64)
            reversing time may cost before an anchor mends it, at most 5. More bits mean fewer
            anchors and coarser gradients; at 0 a neuron that leaks is not reversed at all but
            rebuilt forward, exactly.
        max_anchor_interval: the most time steps between two anchors of a neuron that is reversed.
        rebuild_interval: the time steps between two anchors of a neuron whose reset cannot be
            inverted. Its potentials are rebuilt forward from the anchor below, exactly; a whole
            stretch of them stands in memory at a time. At 1 every potential is kept, and the layers
            below run forward twice, not three times.
        backend: what computes a neuron's arithmetic: "triton" for fused kernels, "torch" for plain
            torch code, "auto" for kernels where they can be had and have agreed with the plain code
            on a sample. With "triton" they are taken on trust, and a call raises where they cannot
            be had.
        smallest: the bytes of a time step, of a neuron's current and what was saved on the way to
            it, up to which both are kept as they are from the second such step on: Python would
            need about as many to note how to have them again, and time. Larger means faster where
            Python takes most of the time; at 0 everything is computed again.
        match_host_order: True keeps backward to the host's own order of operations and memory
            formats, for gradients with the host's very bits wherever potentials are not reversed.
            Otherwise a layer that sees the same data at every time step is differentiated once, and
            spikes come to a convolution's backward as that is fastest.

    Raises:
        ValueError: a number out of range, or an unknown backend.
    """

    reversible: bool = True
    lost_bits: float = 4
    max_anchor_interval: int = 64
    rebuild_interval: int = 12
    backend: str = "auto"
    recompute_min_bytes: int = 1024
    match_host_order: bool = False

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
        if self.backend not in BACKENDS:
            raise ValueError(
                f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {self.backend!r}"
            )


_settings: ContextVar[Settings] = ContextVar("snn_revplugin_settings", default=Settings())  # noqa: B039 (frozen)


def get_settings() -> Settings:
    """The settings that hold at present in this thread."""
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

"""The figures of a training step's memory, and how they are printed."""

from __future__ import annotations

from dataclasses import dataclass

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

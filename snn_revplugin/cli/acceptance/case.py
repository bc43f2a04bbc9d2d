"""What one process examines, what it finds, and the sizes of a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ...report.memory import MIB, mib
from ..comparison import Setup
from ..workloads import WORKLOADS

PASSED, FAILED, MEASURED = "passed", "failed", "measured"
ABSENT = "not here"  # the device, or a package, cannot run it: no failure
LATE = "out of time"
OUTCOMES = PASSED, FAILED, MEASURED, ABSENT, LATE
NO_CUDA = "needs a CUDA device"


@dataclass(frozen=True)
class Case:
    """What one process examines.

    Args:
        part: a key of :data:`.parts.PARTS`.
        subject: what is examined; of a work, a key of ``WORKLOADS``.
        way: how: whose neurons, in which precision, by which way to save memory.
        device: where.
        time_steps: T.
        batch: images, or of a kernel the neurons.
        repeats: how often what is timed is timed.
        limit: bytes that count as the memory of a device that does not run out of its own.
        longest: the size at which a search ends.
        seconds: the time that the case has.
    """

    part: str
    subject: str
    way: str
    device: str
    time_steps: int = 0
    batch: int = 0
    repeats: int = 1
    limit: int | None = None
    longest: int = 2**20
    seconds: float = 60.0

    @property
    def setup(self) -> Setup:
        return Setup(WORKLOADS[self.subject], self.time_steps, self.batch, device=self.device)

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def found(self, outcome: str, subject: str = "", why: str = "", **figures: Any) -> Finding:
        """What was found: a figure is a number, a list of measurements or a word."""
        return Finding(replace(self, subject=subject or self.subject), outcome, figures, why)


@dataclass(frozen=True)
class Finding:
    """What was found out about a case, or about a part of it that has a subject of its own."""

    case: Case
    outcome: str
    figures: dict[str, Any] = field(default_factory=dict)
    why: str = ""

    def __str__(self) -> str:
        case = self.case
        sizes = [f"T {case.time_steps}"] * bool(case.time_steps)
        sizes += [f"{'N' if case.part == 'floor' else 'batch'} {case.batch}"] * bool(case.batch)
        head = ", ".join(each for each in (case.part, case.subject, *sizes, case.way) if each)
        figures = ", ".join(f"{name} {text}" for name, text in self.texts().items())
        return f"{head}: {self.outcome}{self.why and f' ({self.why})'}{figures and f'; {figures}'}"

    def texts(self) -> dict[str, str]:
        """The figures as texts to read, by name and unit."""
        return dict(_text(*each) for each in self.figures.items())


def _text(name: str, figure: Any) -> tuple[str, str]:
    """A figure's name without its unit, and its median with it."""
    value = statistics.median(figure) if isinstance(figure, list) else figure
    if name.endswith("_seconds"):
        return name.removesuffix("_seconds"), f"{1000 * value:.3g} ms"
    if name.endswith("_bytes"):
        return name.removesuffix("_bytes"), mib(value)
    if isinstance(value, float) and math.isfinite(value):
        return name, f"{value:.3g}"
    return name, str(value)


@dataclass(frozen=True)
class Sizes:
    """How much a run does."""

    precisions: tuple[str, ...] = (
        "float32",
        "TF32",
        "cudnn.benchmark",
        "channels_last",
        "autocast float16",
        "autocast bfloat16",
    )
    neurons: tuple[int, ...] = (2**16, 2**20, 2**24)
    kernel_steps: int = 16
    kernel_ways: tuple[str, ...] = ("host", "ours", "torch.compile")
    works: tuple[tuple[str, int, int], ...] = (  # T, batch
        ("csnn", 100, 128),
        ("vgg", 16, 64),
        ("spiking_resnet18", 4, 32),
        ("sew_resnet18", 4, 32),
        ("spikformer", 4, 32),
    )
    small_works: tuple[tuple[str, int, int], ...] = (
        ("digits-snntorch", 25, 64),
        ("digits-spikingjelly", 8, 64),
    )
    searches: tuple[tuple[str, str, int, int], ...] = (
        ("csnn", "time_steps", 16, 128),
        ("vgg", "batch", 16, 16),
    )
    repeats: int = 10
    limit: int | None = None
    longest: int = 2**20


QUICK = Sizes(
    neurons=(256,),
    kernel_steps=2,
    kernel_ways=("host", "ours"),
    works=(("digits-snntorch", 2, 2), ("digits-spikingjelly", 2, 2)),
    small_works=(("digits-snntorch", 4, 2), ("digits-spikingjelly", 4, 2)),
    searches=(("digits-snntorch", "time_steps", 2, 2), ("digits-spikingjelly", "batch", 2, 2)),
    repeats=1,
    limit=MIB // 2,
    longest=8,
)

Cases = Iterator[Case]
Findings = Iterator[Finding]

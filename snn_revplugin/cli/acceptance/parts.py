"""The parts, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import environment, fit, floor, kernels, replay, steps, works
from .case import Case, Cases, Findings, Sizes


@dataclass(frozen=True)
class Part:
    """A part of the acceptance.

    Args:
        title: what it shows, in a line.
        cases: what to examine, on a device; each case runs in a process of its own.
        examine: examines one case.
        seconds: the time that the part has.
        seconds_of_case: the time that one of its cases has.
    """

    title: str
    cases: Callable[[Sizes, str], Cases]
    examine: Callable[[Case], Findings]
    seconds: float
    seconds_of_case: float


def _part(title: str, module: object, seconds: float, seconds_of_case: float) -> Part:
    return Part(title, module.cases, module.examine, seconds, seconds_of_case)


# Ten minutes in all.
PARTS = {
    "environment": _part("versions, device, driver, rounding", environment, 15, 15),
    "replay": _part("each operation, recomputed in backward", replay, 80, 30),
    "kernels": _part("each kernel form against the plain code", kernels, 65, 65),
    "steps": _part("capture, synchronisation, settings of another thread", steps, 40, 20),
    "works": _part("works and models: spikes, gradients, memory, time", works, 240, 40),
    "floor": _part("kernels over the bandwidth floor, launches", floor, 50, 30),
    "fit": _part("the longest T and the largest batch", fit, 110, 60),
}

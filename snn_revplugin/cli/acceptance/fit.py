"""Part 6: the longest T, or the largest batch, with which a training step fits the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from ...report.memory import memory_report
from ..workloads import HOST, OURS
from .case import LATE, MEASURED, Case, Cases, Findings, Sizes

CLOSE_ENOUGH = 1.05  # ratio of what does not fit any more to what does, at which bisecting stops
SPARE = 5.0  # seconds that are left to say what was found


def cases(sizes: Sizes, device: str) -> Cases:
    for work, axis, time_steps, batch in sizes.searches:
        start = {"time_steps": time_steps, "batch": batch} | {axis: 0}
        for way in (HOST, OURS):
            yield Case("fit", work, way, device, **start, limit=sizes.limit, longest=sizes.longest)


def examine(case: Case) -> Findings:
    """Double, then bisect; the size that the case leaves open is the one that is looked for."""
    axis = "time_steps" if case.time_steps == 0 else "batch"
    until = time.monotonic() + case.seconds - SPARE
    largest, is_settled = largest_that_fits(
        lambda size: fits(replace(case, **{axis: size})),
        case.longest,
        lambda: time.monotonic() > until,
    )
    yield case.found(MEASURED if is_settled else LATE, **{f"largest_{axis}": largest})


def fits(case: Case) -> bool:
    """Whether a training step fits: without running out of memory, or below the limit."""
    try:
        setup = case.setup
        net, batch = setup.net(case.way), setup.data()
        if case.limit is None:
            setup.loss(net, batch).backward()
            torch.accelerator.synchronize()
            return True
        return memory_report(lambda: setup.loss(net, batch), device=case.device).peak <= case.limit
    except torch.OutOfMemoryError:
        return False
    finally:
        if case.on_cuda:
            torch.cuda.empty_cache()


def largest_that_fits(
    fits: Callable[[int], bool], longest: int, is_late: Callable[[], bool]
) -> tuple[int, bool]:
    """The largest size that fits, found by doubling and then by bisecting.

    Args:
        fits: whether a size does.
        longest: where the search ends.
        is_late: whether to stop with what is found.

    Returns:
        It, 0 if not even the smallest does, and whether the search came to its end.
    """
    low, high = 0, 1
    while high <= longest and not is_late() and fits(high):
        low, high = high, 2 * high
    if is_late():
        return low, False
    while high > low + 1 and high > CLOSE_ENOUGH * low:
        if is_late():
            return low, False
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, True

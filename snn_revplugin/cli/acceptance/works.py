"""Part 4: whole works and models. First whether ours are the host's spikes and gradients, then
memory and time of a training step by every way to save memory, each in a fresh process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn as nn
from torch import Tensor

from ...report.memory import memory_report, reset_peaks
from ...settings import use_settings
from ..comparison import largest_relative_difference, observe
from ..workloads import HOST, OURS, WORKLOADS, CheckpointedLeakyConvNet, checkpoint_each
from .case import FAILED, MEASURED, PASSED, Case, Cases, Finding, Findings, Sizes

AGREEMENT, CHECKPOINT = "agreement", "torch.utils.checkpoint"
HALFWAY = "halfway"  # bytes between the peaks of the budgets "least" and "host"
BUDGETS = {f"{OURS}, {budget}": budget for budget in ("least", HALFWAY, "peak", "host")}
MEMOPT = {f"memopt level {level}": level for level in (1, 4)}
CLOSE = 1e-4  # of gradients
WARM_UPS = 3


def cases(sizes: Sizes, device: str) -> Cases:
    for work, time_steps, batch in sizes.works:
        ways = (AGREEMENT, HOST, *BUDGETS, CHECKPOINT)
        for way in (*ways, *(MEMOPT if WORKLOADS[work].host == "spikingjelly" else ())):
            yield Case("works", work, way, device, time_steps, batch, sizes.repeats)


def examine(case: Case) -> Findings:
    if case.way == AGREEMENT:
        yield from agreements(case)
    else:
        yield measured(case)


def agreements(case: Case) -> Findings:
    """Ours at each budget against the host, and the host against itself: the noise of the device.
    A budget's plan is made of the first training step, so the second one is compared."""
    setup = case.setup
    batch = setup.data()
    (spikes, gradients), (_, again) = (observe(setup, HOST, batch) for _ in range(2))
    noise = largest_relative_difference(gradients, again)
    for way in BUDGETS:
        of_way = replace(case, way=way)
        with use_settings(memory_budget=budget_of(of_way)):
            our_spikes, ours = observe(setup, OURS, batch, earlier_steps=1)
        error = largest_relative_difference(gradients, ours)
        spikes_equal, potentials_equal = spikes.equals(our_spikes)
        yield replace(case, way=f"{AGREEMENT}: {way}").found(
            PASSED if spikes_equal and error <= max(CLOSE, 3 * noise) else FAILED,
            spikes_equal=spikes_equal,
            potentials_equal=potentials_equal or None,
            gradient_error=error,
            host_gradient_error=noise,
        )


def budget_of(case: Case) -> float | str:
    """The memory budget of one of ``BUDGETS``."""
    budget = BUDGETS[case.way]
    if budget != HALFWAY:
        return budget
    peaks = []
    for end in ("least", "host"):
        with use_settings(memory_budget=end):
            peaks.append(_Step(replace(case, way=OURS)).memory()["peak_bytes"])
    return sum(peaks) / 2


def measured(case: Case) -> Finding:
    """Seconds of forward, backward and the whole step, bytes as in
    :class:`...report.memory.MemoryReport`."""
    if case.way not in BUDGETS:
        return case.found(MEASURED, **_memory_and_time(case))
    with use_settings(memory_budget=budget_of(case)) as settings:
        budget = settings.memory_budget
        given = {} if isinstance(budget, str) else {"budget_bytes": budget}
        return case.found(MEASURED, **given, **_memory_and_time(case))


def _memory_and_time(case: Case) -> dict[str, float | list[float]]:
    step = _Step(case)
    return step.memory() | timed(step.forward, lambda loss: loss.backward(), case)


class _Step:
    """A training step of a work, by a way."""

    def __init__(self, case: Case) -> None:
        self.case, self.net, self.batch = case, net_of(case), case.setup.data()

    def forward(self) -> Tensor:
        self.net.zero_grad(set_to_none=True)
        return self.case.setup.loss(self.net, self.batch)

    def memory(self) -> dict[str, float]:
        """Bytes, after warm-ups."""
        for _ in range(WARM_UPS if self.case.on_cuda else 1):
            self.forward().backward()
        self.net.zero_grad(set_to_none=True)
        reset_peaks(self.case.device)
        report = memory_report(self.forward, device=self.case.device)
        names = "retained", "peak", "retained_reserved", "peak_reserved"
        sizes = {f"{name}_bytes": getattr(report, name) for name in names}
        return {name: size for name, size in sizes.items() if size is not None}


def net_of(case: Case) -> nn.Module:
    """The net of a work, by a way."""
    setup = case.setup
    if case.way in (HOST, OURS, *BUDGETS):
        return setup.net(HOST if case.way == HOST else OURS)
    net = setup.net(HOST)
    if setup.workload.host == "snntorch":
        net.__class__ = CheckpointedLeakyConvNet
        return net
    block = setup.workload.in_blocks(net)
    if case.way == CHECKPOINT:
        return checkpoint_each(net, block)
    from spikingjelly.activation_based import functional, memopt

    images, level = setup.data().images, MEMOPT[case.way]
    forward = lambda net: net(images, case.time_steps)  # noqa: E731
    net = memopt.optimize_memory(net, block, forward, level=level, checkpoint_budget="memory")
    functional.reset_net(net)
    return net


def timed(
    forward: Callable[[], Tensor], backward: Callable[[Tensor], None], case: Case
) -> dict[str, list[float]]:
    """Seconds of forward, of backward and of both."""
    seconds: dict[str, list[float]] = {
        f"{name}_seconds": [] for name in ("forward", "backward", "step")
    }
    for turn in range(1 + case.repeats):
        start = now(case.device)
        result = forward()
        middle = now(case.device)
        backward(result)
        end = now(case.device)
        if turn:
            for each, taken in zip(
                seconds.values(), (middle - start, end - middle, end - start), strict=True
            ):
                each.append(taken)
    return seconds


def now(device: str) -> float:
    """Seconds, when the device has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()

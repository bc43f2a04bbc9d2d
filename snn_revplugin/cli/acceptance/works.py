"""Part 4: whole works and models. First whether ours are the host's spikes and gradients, then
memory and time of a training step by every way to save memory, each in a fresh process."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from ...report.memory import memory_report
from ..comparison import largest_relative_difference, observe
from ..workloads import HOST, OURS, WORKLOADS, CheckpointedLeakyConvNet, checkpoint_each
from .case import FAILED, MEASURED, PASSED, Case, Cases, Finding, Findings, Sizes

AGREEMENT, CHECKPOINT = "agreement", "torch.utils.checkpoint"
MEMOPT = {f"memopt level {level}": level for level in (1, 4)}
CLOSE = 1e-4  # of gradients
WARM_UPS = 3


def cases(sizes: Sizes, device: str) -> Cases:
    for work, time_steps, batch in sizes.works:
        ways = (AGREEMENT, HOST, OURS, CHECKPOINT)
        for way in (*ways, *(MEMOPT if WORKLOADS[work].host == "spikingjelly" else ())):
            yield Case("works", work, way, device, time_steps, batch, sizes.repeats)


def examine(case: Case) -> Findings:
    yield agreement(case) if case.way == AGREEMENT else measured(case)


def agreement(case: Case) -> Finding:
    """Ours against the host, and the host against itself: the noise of the device."""
    setup = case.setup
    batch = setup.data()
    (spikes, gradients), (_, again), (our_spikes, ours) = (
        observe(setup, whose, batch) for whose in (HOST, HOST, OURS)
    )
    noise, error = (largest_relative_difference(gradients, each) for each in (again, ours))
    spikes_equal, potentials_equal = spikes.equals(our_spikes)
    return case.found(
        PASSED if spikes_equal and error <= max(CLOSE, 3 * noise) else FAILED,
        spikes_equal=spikes_equal,
        potentials_equal=potentials_equal or None,
        gradient_error=error,
        host_gradient_error=noise,
    )


def measured(case: Case) -> Finding:
    """Seconds of forward, backward and the whole step, bytes as in
    :class:`...report.memory.MemoryReport`."""
    setup, net = case.setup, net_of(case)
    batch = setup.data()

    def forward() -> Tensor:
        net.zero_grad(set_to_none=True)
        return setup.loss(net, batch)

    for _ in range(WARM_UPS if case.on_cuda else 1):
        forward().backward()
    net.zero_grad(set_to_none=True)
    report = memory_report(forward, device=case.device)
    sizes = {
        f"{name}_bytes": getattr(report, name)
        for name in ("retained", "peak", "retained_reserved", "peak_reserved")
        if getattr(report, name) is not None
    }
    return case.found(MEASURED, **sizes, **timed(forward, lambda loss: loss.backward(), case))


def net_of(case: Case) -> nn.Module:
    """The net of a work, by a way."""
    setup = case.setup
    if case.way in (HOST, OURS):
        return setup.net(case.way)
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

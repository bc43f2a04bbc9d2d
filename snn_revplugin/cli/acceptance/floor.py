"""Part 5: T time steps of LIF neurons (hard reset, detached, ATan) alone: time over the bandwidth
floor, and launches."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from ...settings import use_settings
from ..workloads import WORKLOADS
from .case import MEASURED, Case, Cases, Findings, Sizes
from .works import WARM_UPS, now, timed

COMPILED = "torch.compile"
# The least that has to move, bytes a neuron-step in float32: current and spikes with their bits;
# current, two gradients.
FLOOR = {"forward": 8.125, "backward": 12.0}


def cases(sizes: Sizes, device: str) -> Cases:
    for count in sizes.neurons:
        for way in sizes.kernel_ways:
            yield Case("floor", "LIF", way, device, sizes.kernel_steps, count, sizes.repeats)


def examine(case: Case) -> Findings:
    currents = torch.randn(case.time_steps, case.batch, device=case.device, requires_grad=True)
    gradient = torch.randn_like(currents)
    node = node_of(case)

    def forward() -> Tensor:
        currents.grad = None
        return node(currents)

    def backward(spikes: Tensor) -> None:
        spikes.backward(gradient)

    for _ in range(WARM_UPS):
        backward(forward())
    figures = timed(forward, backward, case)
    bandwidth = copy_bandwidth(case.device)
    over = {
        f"{name}_over_floor": [
            each * bandwidth / (floor * currents.numel()) for each in figures[f"{name}_seconds"]
        ]
        for name, floor in FLOOR.items()
    }
    launches = _launches(case, forward, backward)
    yield case.found(MEASURED, **figures, **over, copy_gb_per_second=bandwidth / 1e9, **launches)


def node_of(case: Case) -> Callable[[Tensor], Tensor]:
    """A layer of neurons that starts from rest at every call."""
    if case.way == COMPILED:
        return torch.compile(plain_lif)
    from spikingjelly.activation_based import functional, surrogate

    options = {"tau": 2.0, "detach_reset": True, "surrogate_function": surrogate.ATan()}
    kind = WORKLOADS["vgg"].neuron(case.way)
    node = kind(**options, step_mode="m").to(case.device)

    def run(currents: Tensor) -> Tensor:
        functional.reset_net(node)
        with use_settings(backend="auto"):
            return node(currents)

    return run


def plain_lif(currents: Tensor) -> Tensor:
    """The LIF neuron as one writes it down, for a compiler to fuse."""
    from spikingjelly.activation_based import surrogate

    v, spikes = torch.zeros_like(currents[0]), []
    for current in currents:
        h = v + (current - v) / 2.0
        spikes.append(surrogate.atan.apply(h - 1.0, 2.0))
        v = (1.0 - spikes[-1].detach()) * h
    return torch.stack(spikes)


def copy_bandwidth(device: str, size: int = 2**28) -> float:
    """Bytes a second, read and written, of copying a tensor of ``size`` bytes (a sixteenth of that
    on a CPU)."""
    source = torch.empty(
        size // (1 if device.startswith("cuda") else 16), dtype=torch.uint8, device=device
    ).zero_()
    target, seconds = torch.empty_like(source), []
    for _ in range(WARM_UPS + 10):
        start = now(device)
        target.copy_(source)
        seconds.append(now(device) - start)
    return 2 * source.numel() / statistics.median(seconds[WARM_UPS:])


def _launches(
    case: Case, forward: Callable[[], Tensor], backward: Callable[[Tensor], None]
) -> dict[str, int]:
    """Kernels that the profiler sees in forward and in backward; nothing on a CPU, which has
    none."""
    if not case.on_cuda:
        return {}
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    counts, result = {}, None
    for name in FLOOR:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            if name == "forward":
                result = forward()
            else:
                backward(result)
            torch.cuda.synchronize()
        events = [each for each in profiler.events() if each.device_type == DeviceType.CUDA]
        counts[f"{name}_launches"] = len(events)
    return counts

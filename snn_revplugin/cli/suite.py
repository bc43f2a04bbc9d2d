"""``snn-revplugin bench --suite gpu``: kernels alone, whole works by every way to save memory, and
what fits the card.

Every case runs in a fresh process, after a warm-up, and hands its figures back as JSON; one that
cannot run hands back why. ``python -m snn_revplugin.cli.suite CASE`` is such a process. On a CPU
the suite runs the same code in small (``quick``).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..report.memory import MIB, memory_report, mib, reset_peaks
from ..settings import use_settings
from .comparison import Row, Setup, write_csv
from .workloads import (
    HOST,
    OURS,
    WORKLOADS,
    Block,
    CheckpointedBlock,
    CheckpointedLeakyConvNet,
    in_blocks,
)

CHECKPOINT, COMPILED = "torch.utils.checkpoint", "torch.compile"
MEMOPT = {f"memopt level {level}": level for level in (1, 4)}
# The least that has to move, bytes a neuron-step in float32: current and spikes with their bits;
# current, two gradients.
FLOOR = {"forward": 8.125, "backward": 12.0}
WARM_UPS = 3
CLOSE_ENOUGH = 1.05  # ratio of what does not fit any more to what does, at which bisecting stops


@dataclass(frozen=True)
class Case:
    """What one process measures.

    Args:
        part: "kernel", "work" or "fit".
        work: a key of ``WORKLOADS``; of a kernel "vgg", for its neuron.
        way: ``HOST``, ``OURS``, or another way to save memory, or of a kernel ``COMPILED``.
        time_steps: T.
        batch: images, or of a kernel the neurons.
        repeats: how often what is timed is timed.
        limit: bytes that count as the memory of a device that does not run out of its own.
    """

    part: str
    work: str
    way: str
    time_steps: int
    batch: int
    device: str
    repeats: int
    limit: int | None = None

    @property
    def setup(self) -> Setup:
        return Setup(WORKLOADS[self.work], self.time_steps, self.batch, device=self.device)


@dataclass(frozen=True)
class Sizes:
    """How much the suite does."""

    neurons: tuple[int, ...] = tuple(2**power for power in range(16, 25, 2))
    kernel_steps: int = 16
    works: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("csnn", (10, 50, 100, 500, 1000)),
        ("vgg", (4, 8, 16, 32, 64)),
    )
    batch: int = 128
    repeats: int = 20
    limit: int | None = None
    longest: int = 2**20  # of T and of the batch, where a search ends


QUICK = Sizes(
    (256,), 2, (("digits-snntorch", (2,)), ("digits-spikingjelly", (2,))), 2, 1, MIB // 2, 8
)


def run(
    say: Callable[[str], None],
    device: str,
    out: Path,
    quick: bool,
    measured: Callable[[Case], dict[str, Any]] | None = None,
) -> None:
    """Measure everything, write ``gpu.csv`` and ``gpu.png`` into the folder ``out``.

    Args:
        say: takes a line to read for every case.
        measured: measures a case; by default :func:`in_a_fresh_process`.
    """
    measured = measured or in_a_fresh_process
    sizes = QUICK if quick else Sizes()
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for case in cases(sizes, device):
        found = measured(case)
        rows += rows_of(case, found)
        say(line_of(case, found))
    for work, several in sizes.works:
        for axis in ("time_steps", "batch"):
            for way in (HOST, OURS):
                case = Case("fit", work, way, several[0], sizes.batch, device, 1, sizes.limit)
                largest = largest_that_fits(case, axis, sizes.longest, measured)
                rows.append(Row.of([float(largest)], case.setup, way, f"largest_{axis}", "1"))
                say(f"{work}, {way}: the largest {axis} that fits is {largest}")
    write_csv(rows, out / "gpu.csv")
    draw(rows, out / "gpu.png")
    say(f"figures in {out / 'gpu.csv'}, plot in {out / 'gpu.png'}")


def cases(sizes: Sizes, device: str) -> list[Case]:
    """The kernels and the works, each by every way."""
    found = [
        Case("kernel", "vgg", way, sizes.kernel_steps, count, device, sizes.repeats)
        for count in sizes.neurons
        for way in (HOST, OURS, COMPILED)
    ]
    for work, several in sizes.works:
        ways = (HOST, OURS, CHECKPOINT, *(MEMOPT if WORKLOADS[work].host == "spikingjelly" else ()))
        found += [
            Case("work", work, way, steps, sizes.batch, device, sizes.repeats)
            for steps in several
            for way in ways
        ]
    return found


# -------------------------------------------------------------------------- in a process of its own


def in_a_fresh_process(case: Case) -> dict[str, Any]:
    """The figures of a case by name, lists of seconds or bytes; or under "why" the reason that
    there are none."""
    command = sys.executable, "-m", __name__, json.dumps(asdict(case))
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"why": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: Case) -> dict[str, Any]:
    """The figures of a case, in this process."""
    with use_settings(backend="auto"):
        try:
            return {"kernel": measure_kernel, "work": measure_work, "fit": measure_fit}[case.part](
                case
            )
        except torch.OutOfMemoryError:
            return {"why": "out of memory"}


def measure_work(case: Case) -> dict[str, Any]:
    """Seconds of forward, backward and the whole step, bytes as in
    :class:`..memory.MemoryReport`."""
    setup, net = case.setup, net_of(case)
    batch = setup.data()

    def forward() -> Tensor:
        net.zero_grad(set_to_none=True)
        return setup.loss(net, batch)

    for _ in range(WARM_UPS):
        forward().backward()
    net.zero_grad(set_to_none=True)
    reset_peaks(case.device)
    report = memory_report(forward, device=case.device)
    found = {
        "retained": report.retained,
        "peak": report.peak,
        "peak_reserved": report.peak_reserved,
    }
    figures: dict[str, Any] = {
        name: [float(size)] for name, size in found.items() if size is not None
    }
    return figures | timed(forward, lambda loss: loss.backward(), case)


def net_of(case: Case) -> nn.Module:
    """The net of a work, by a way."""
    setup = case.setup
    if case.way in (HOST, OURS):
        return setup.net(case.way)
    net = setup.net(HOST)
    if case.way == CHECKPOINT and setup.workload.host == "snntorch":
        net.__class__ = CheckpointedLeakyConvNet
    elif case.way == CHECKPOINT:
        net = in_blocks(net, CheckpointedBlock)
    else:
        from spikingjelly.activation_based import functional, memopt

        images, level = setup.data().images, MEMOPT[case.way]
        forward = lambda net: net(images, case.time_steps)  # noqa: E731
        net = memopt.optimize_memory(
            in_blocks(net, Block), Block, forward, level=level, checkpoint_budget="memory"
        )
        functional.reset_net(net)
    return net


def measure_kernel(case: Case) -> dict[str, Any]:
    """Seconds of T time steps of LIF neurons (hard reset, detached, ATan), forward and backward,
    and the floor of each."""
    from spikingjelly.activation_based import functional, surrogate

    options = {
        "tau": 2.0,
        "detach_reset": True,
        "surrogate_function": surrogate.ATan(),
        "step_mode": "m",
    }
    currents = torch.randn(case.time_steps, case.batch, device=case.device, requires_grad=True)
    gradient = torch.randn_like(currents)
    if case.way == COMPILED:
        node = torch.compile(plain_lif)
    else:
        node = case.setup.workload.neuron(case.way)(**options).to(case.device)

    def forward() -> Tensor:
        currents.grad = None
        if case.way != COMPILED:
            functional.reset_net(node)
        return node(currents)

    figures = timed(forward, lambda spikes: spikes.backward(gradient), case)
    bandwidth = copy_bandwidth(case.device)
    for name, each in FLOOR.items():
        figures[f"{name}_over_floor"] = [
            s * bandwidth / (each * currents.numel()) for s in figures[name]
        ]
    return figures | {"copy_bandwidth": [bandwidth]}


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


def timed(
    forward: Callable[[], Tensor], backward: Callable[[Tensor], None], case: Case
) -> dict[str, list[float]]:
    """Seconds of forward, of backward and of both."""
    seconds: dict[str, list[float]] = {"forward": [], "backward": [], "step": []}
    for turn in range(WARM_UPS + case.repeats):
        start = now(case.device)
        result = forward()
        middle = now(case.device)
        backward(result)
        end = now(case.device)
        if turn >= WARM_UPS:
            for name, taken in (
                ("forward", middle - start),
                ("backward", end - middle),
                ("step", end - start),
            ):
                seconds[name].append(taken)
    return seconds


def now(device: str) -> float:
    """Seconds, when the device has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ------------------------------------------------------------------------------- what fits the card


def measure_fit(case: Case) -> dict[str, Any]:
    """Whether a training step fits: without running out of memory, or below the limit."""
    setup, net = case.setup, net_of(case)
    batch = setup.data()
    reset_peaks(case.device)
    peak = memory_report(lambda: setup.loss(net, batch), device=case.device).peak
    return {"fits": case.limit is None or peak <= case.limit}


def largest_that_fits(
    case: Case, axis: str, longest: int, measured: Callable[[Case], dict[str, Any]]
) -> int:
    """The largest T or batch with which a training step fits, found by doubling and then by
    bisecting.

    Returns:
        0 if not even the smallest does.
    """

    def fits(size: int) -> bool:
        return measured(replace(case, **{axis: size})).get("fits", False)

    low, high = 0, 1
    while high <= longest and fits(high):
        low, high = high, 2 * high
    while high > low + 1 and high > CLOSE_ENOUGH * low:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ---------------------------------------------------------------------------------- what is written


def rows_of(case: Case, found: dict[str, Any]) -> list[Row]:
    """A case's figures as rows; none for one that could not run."""
    work = "lif_kernel" if case.part == "kernel" else ""
    units = {"copy_bandwidth": "B/s", **dict.fromkeys(("forward", "backward", "step"), "s")}

    def unit(name: str) -> str:
        return units.get(name, "1" if name.endswith("_floor") else "B")

    return [
        Row.of(values, case.setup, case.way, name, unit(name), work)
        for name, values in found.items()
        if name != "why"
    ]


def line_of(case: Case, found: dict[str, Any]) -> str:
    """A case's figures as a line to read."""
    size = f"N {case.batch}" if case.part == "kernel" else f"batch {case.batch}"
    head = (
        f"{'LIF kernel' if case.part == 'kernel' else case.work}, T {case.time_steps}, {size},"
        f" {case.way}: "
    )
    if "why" in found:
        return head + f"not measured, {found['why']}"
    parts = [
        f"{name} {1000 * statistics.median(found[name]):.3g} ms"
        for name in ("forward", "backward", "step")
    ]
    parts += [
        f"{name} {mib(found[name][0])}"
        for name in ("retained", "peak", "peak_reserved")
        if name in found
    ]
    floors = [name for name in FLOOR if f"{name}_over_floor" in found]
    parts += [
        f"{name} {statistics.median(found[f'{name}_over_floor']):.3g}x the floor" for name in floors
    ]
    return head + ", ".join(parts)


def draw(rows: list[Row], path: Path) -> None:
    """Kernels' time over the floor against N, works' peak memory and time of a step against T."""
    from matplotlib.figure import Figure

    panels = [
        ("lif_kernel", "forward_over_floor", "batch"),
        ("lif_kernel", "backward_over_floor", "batch"),
    ]
    panels += [
        (work, metric, "time_steps")
        for work in dict.fromkeys(row.work for row in rows)
        if work != "lif_kernel"
        for metric in ("peak", "step")
    ]
    figure = Figure(figsize=(5 * len(panels) / 2, 8), layout="constrained")
    for axes, (work, metric, against) in zip(
        figure.subplots(2, len(panels) // 2).T.flat, panels, strict=True
    ):
        chosen = [row for row in rows if (row.work, row.metric) == (work, metric)]
        for way in dict.fromkeys(row.neurons for row in chosen):
            points = [(getattr(row, against), row.p50) for row in chosen if row.neurons == way]
            axes.loglog(*zip(*points, strict=True), "o-", label=way)
        axes.set(
            title=work, xlabel=against, ylabel=f"{metric} [{chosen[0].unit}]" if chosen else metric
        )
        if chosen:
            axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))

"""Measures a training step under memory budgets: its peak, and its time over the host's.

Run ``python benchmarks/budget.py``. Workload 2 is eight conv-BN-LIF blocks of SpikingJelly in
multi-step mode, T 16; workload 1 the convolutional net of snnTorch's tutorials in a time loop. Host
and ours have the same weights. Peaks are of live bytes in one step, gradients included. The ratio
is the median over adjacent steps of the host and ours, which alternate, in CPU seconds. Workload 2
has a row for each other way to save memory of ``peers.py``, too; ``--plot FILE`` draws time over
memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from matplotlib.figure import Figure
from peers import peers

from snn_revplugin import memory_report, use_settings
from snn_revplugin.cli.comparison import Setup, print_head, take_turns
from snn_revplugin.cli.workloads import HOST, OURS, WORKLOADS, Workload
from snn_revplugin.report.memory import MIB, mib

COLUMNS = ("work", "T", "budget", "retained", "peak", "step", "gradients")
WORKS = (
    ("vgg", 16, ("least", "peak", "80 MiB", "100 MiB", "160 MiB", "host")),
    ("csnn", 100, ("least", "peak", "60 MiB", "150 MiB", "host")),
)
WITH_PEERS = "vgg"  # the other ways take their blocks of layers


class Point(NamedTuple):
    """What a training step came to.

    Attributes:
        name: the budget, or the other way to save memory.
        peak: in bytes.
        ratio: its time over that of the host's.
    """

    name: str
    peak: int
    ratio: float


def rows(
    work: Workload, steps: int, budgets: tuple[str, ...], repeats: int
) -> tuple[list[Point], list[Point]]:
    """Print the host's row of a work, a row for each budget, and a row for each other way.

    Returns:
        The points of the budgets; those of the host and of the other ways.
    """
    setup = Setup.usual(work, time_steps=steps)
    batch = setup.data()

    def step(net: nn.Module) -> Callable[[], None]:
        def run() -> None:
            net.zero_grad()
            setup.loss(net, batch).backward()

        return run

    nets = {whose: setup.net(whose) for whose in (HOST, OURS)}
    host = step(nets[HOST])
    host()
    theirs = gradients_of(nets[HOST])
    report = memory_report(host)
    print_row(work.name, steps, "the host's", mib(report.retained), mib(report.peak), "1", "0")

    def row(name: str, net: nn.Module) -> Point:
        once = step(net)
        once()  # is observed
        report = memory_report(once)
        error = (gradients_of(net) - theirs).norm() / theirs.norm()
        seconds = take_turns({HOST: host, OURS: once}, repeats, clock=time.process_time)
        ratio = statistics.median(a / b for a, b in zip(seconds[OURS], seconds[HOST], strict=True))
        memory = mib(report.retained), mib(report.peak)
        print_row(work.name, steps, name, *memory, f"{ratio:.2f}", f"{error.item():.0e}")
        return Point(name, report.peak, ratio)

    ours = []
    for budget in budgets:
        with use_settings(memory_budget=budget):
            ours.append(row(budget, nets[OURS]))
    others = peers(setup, batch) if work.name == WITH_PEERS else {}
    return ours, [Point("host", report.peak, 1.0), *(row(*each) for each in others.items())]


def draw(ours: list[Point], others: list[Point]) -> Figure:
    """Time over memory: a curve through the budgets, and a point for each other way."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    ours = sorted(ours, key=lambda each: (each.peak, -each.ratio))
    xs, ys = [each.peak / MIB for each in ours], [each.ratio for each in ours]
    axes.plot(xs, ys, "o-", label="ours, by memory_budget")
    for at, each in enumerate(ours):
        # Of two budgets that come to one peak the second is the faster.
        above = at == 0 or ours[at - 1].peak != each.peak
        axes.annotate(
            each.name,
            (xs[at], ys[at]),
            xytext=(5, 5 if above else -5),
            textcoords="offset points",
            va="bottom" if above else "top",
            rotation=30 if above else -30,
            rotation_mode="anchor",
            fontsize=8,
        )
    for each in others:
        axes.plot(each.peak / MIB, each.ratio, "s", label=each.name)
    axes.set_xlabel("peak of a training step (MiB)")
    axes.set_ylabel("time of a training step / the host's")
    axes.set_xlim(left=0)
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def gradients_of(net: nn.Module) -> torch.Tensor:
    """All gradients of a net as one vector."""
    return torch.cat([each.grad.flatten() for each in net.parameters()])


def print_row(*cells: object) -> None:
    """Print a row of the table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="file for the picture of workload 2")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print_head(COLUMNS, options.threads)
    for name, steps, budgets in WORKS:
        points = rows(WORKLOADS[name], steps, budgets, options.repeats)
        if options.plot is not None and name == WITH_PEERS:
            draw(*points).savefig(options.plot, dpi=150)


if __name__ == "__main__":
    main()

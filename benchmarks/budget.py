"""Measures a training step under memory budgets: its peak, and its time over the host's.

Run ``python benchmarks/budget.py``. Workload 2 is eight conv-BN-LIF blocks of SpikingJelly in
multi-step mode, T 16; workload 1 the convolutional net of snnTorch's tutorials in a time loop. Host
and ours have the same weights. Peaks are of live bytes in one step, gradients included. The ratio
is the median over adjacent steps of the host and ours, which alternate, in CPU seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn as nn

from snn_revplugin import memory_report, use_settings
from snn_revplugin.cli.comparison import print_head, take_turns
from snn_revplugin.cli.workloads import HOST, OURS, WORKLOADS, Workload
from snn_revplugin.report.memory import mib

COLUMNS = ("work", "T", "budget", "retained", "peak", "step", "gradients")
WORKS = (
    ("vgg", 16, ("least", "peak", "80 MiB", "100 MiB", "160 MiB", "host")),
    ("csnn", 100, ("least", "peak", "60 MiB", "150 MiB", "host")),
)


def rows(work: Workload, steps: int, budgets: tuple[str, ...], repeats: int) -> None:
    """Print the host's row of a work, and a row for each budget."""
    batch = work.data()

    def step(net: nn.Module) -> Callable[[], None]:
        def run() -> None:
            net.zero_grad()
            work.loss(net(batch.images, steps), batch.classes).backward()

        return run

    nets = {whose: work.build(whose) for whose in (HOST, OURS)}
    host, ours = (step(nets[whose]) for whose in (HOST, OURS))
    host()
    theirs = gradients_of(nets[HOST])
    report = memory_report(host)
    print_row(work.name, steps, "the host's", mib(report.retained), mib(report.peak), "1", "0")
    for budget in budgets:
        with use_settings(memory_budget=budget):
            ours()  # is observed
            report = memory_report(ours)
            error = (gradients_of(nets[OURS]) - theirs).norm() / theirs.norm()
            seconds = take_turns({HOST: host, OURS: ours}, repeats, clock=time.process_time)
        ratio = statistics.median(a / b for a, b in zip(seconds[OURS], seconds[HOST], strict=True))
        memory = mib(report.retained), mib(report.peak)
        print_row(work.name, steps, budget, *memory, f"{ratio:.2f}", f"{error.item():.0e}")


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
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print_head(COLUMNS, options.threads)
    for name, steps, budgets in WORKS:
        rows(WORKLOADS[name], steps, budgets, options.repeats)


if __name__ == "__main__":
    main()

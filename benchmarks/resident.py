"""Measures by how much a process grows in one training step.

Run ``python benchmarks/resident.py``. It trains workload 1, the convolutional net of snnTorch's
tutorials in its own time loop, batch 32 of 28x28, with the host's neurons and with ours. Each runs
in a fresh process, after a warm-up of two short steps. The script prints the growth of the largest
resident set that Linux reports (``VmHWM``), with no environment variable set. It also prints the
bytes of Python objects that a neuron call leaves behind in forward, by ``tracemalloc``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tracemalloc
from pathlib import Path

from snn_revplugin.cli.comparison import Setup
from snn_revplugin.cli.workloads import HOST, OURS, WORKLOADS

WARM_UP = 4  # time steps
NEURONS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--time-steps", type=int, default=400)
    parser.add_argument(
        "--whose", choices=(HOST, OURS), help="measure these neurons in this process"
    )
    options = parser.parse_args()
    if options.whose:
        print(*measure(options.whose, options.time_steps))
        return
    grown = {}
    print(
        "| neurons | resident set grows by | Python objects per neuron call |\n| --- | --- | --- |"
    )
    for whose in (HOST, OURS):
        command = (
            sys.executable,
            __file__,
            "--whose",
            whose,
            "--time-steps",
            str(options.time_steps),
        )
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        grown[whose] = float(answer[0])
        print(f"| {whose} | {grown[whose]:.1f} MiB | {float(answer[1]):.0f} bytes |", flush=True)
    print(f"\n{grown[HOST] / grown[OURS]:.1f} times less")


def measure(whose: str, time_steps: int) -> tuple[float, float]:
    """MiB by which the process grows, and bytes of Python objects per neuron call."""

    def step(time_steps: int) -> None:
        Setup.loss(Setup.usual(WORKLOADS["csnn"], time_steps=time_steps), net, batch).backward()

    setup = Setup.usual(WORKLOADS["csnn"], time_steps=time_steps)
    net, batch = setup.net(whose), setup.data()
    step(WARM_UP)
    step(WARM_UP)
    before = largest_resident_set()
    step(time_steps)
    grown = largest_resident_set() - before
    tracemalloc.start()
    loss = setup.loss(net, batch)
    objects, _ = tracemalloc.get_traced_memory()
    del loss
    return grown, objects / (NEURONS * time_steps)


def largest_resident_set() -> float:
    """The largest resident set of this process so far, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


if __name__ == "__main__":
    main()

"""Measures the workloads of the README with the host's neurons and with ours, in one run.

Run ``python benchmarks/work.py``. Workload 1 is the convolutional net of snnTorch's tutorials in
its own time loop, T 100 and 400, batch 32 of 28x28. Workload 2 is eight conv-BN-LIF blocks of
SpikingJelly in multi-step mode, T 16, batch 4 of 3x32x32. Memory is that of one training step,
forward and backward, in bytes of live tensors. Times are those of alternating steps, and their
ratio is the median over adjacent pairs.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch

from snn_revplugin.cli.comparison import Comparison, Setup, compare, rows_of, versions, write_csv
from snn_revplugin.cli.workloads import HOST, OURS, WORKLOADS
from snn_revplugin.report.memory import mib

WORKS = (
    ("workload 1", "csnn", 100),
    ("workload 1", "csnn", 400),
    ("workload 2", "vgg", 16),
)
COLUMNS = (
    "work",
    "T",
    "host retained",
    "ours",
    "less",
    "host peak",
    "ours",
    "less",
    "host step",
    "ours",
    "ratio",
    "spikes",
    "potentials",
    "gradients",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--repeats", type=int, default=7, help="number of timed training steps per workload"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, help="also write the figures to this file")
    options = parser.parse_args()

    rows = []
    print(
        ", ".join(f"{name} {version}" for name, version in versions().items() if version), end=", "
    )
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, {options.dtype} on"
        f" {options.device}\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    for title, name, time_steps in WORKS:
        dtype = getattr(torch, options.dtype)
        setup = Setup.usual(
            WORKLOADS[name], time_steps=time_steps, dtype=dtype, device=options.device
        )
        comparison = compare(setup, options.repeats)
        rows += rows_of(comparison)
        print(f"| {' | '.join(cells_of(title, comparison))} |", flush=True)
    if options.csv is not None:
        write_csv(rows, options.csv)


def cells_of(title: str, comparison: Comparison) -> tuple[str, ...]:
    """The cells of one comparison's row."""
    host, ours = (comparison.memory[whose] for whose in (HOST, OURS))
    step = {row.neurons: 1000 * row.p50 for row in rows_of(comparison) if row.metric == "step"}
    return (
        title,
        str(comparison.setup.time_steps),
        mib(host.retained),
        mib(ours.retained),
        f"{comparison.retained_ratio:.1f}x",
        mib(host.peak),
        mib(ours.peak),
        f"{comparison.peak_ratio:.1f}x",
        f"{step[HOST]:.0f} ms",
        f"{step[OURS]:.0f} ms",
        f"{comparison.time_ratio:.2f}",
        "equal" if comparison.spikes_equal else "DIFFER",
        "equal" if comparison.potentials_equal else "DIFFER",
        f"{comparison.gradient_error:.1e}",
    )


if __name__ == "__main__":
    main()

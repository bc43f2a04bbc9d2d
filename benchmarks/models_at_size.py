"""Measures SpikingJelly's models at realistic sizes, under each way to save memory.

Run ``python benchmarks/models_at_size.py [NAME ...]``; with ``--write docs/models.md`` it puts the
table into that page. Each model runs in a process of its own, with T 4 and a batch of 2: with the
host's neurons, with ours at two memory budgets, and with the host's in blocks that SpikingJelly's
``memopt.optimize_memory(level=1, checkpoint_budget="memory")`` checkpoints. All have the same
weights.

The gradients of the parameters stand before the measured step, zeroed in place, and are not
counted. What a layer's backward adds to them is counted while it stands. Memory is that of the
third step: the first is recorded, the plan holds from the second. The ratio is the median over
adjacent steps, which alternate, in CPU seconds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
import torch.nn as nn
from models import spikingjelly
from peers import in_memopt

from snn_revplugin import memory_report, use_settings
from snn_revplugin.budget import LEAST, PEAK
from snn_revplugin.cli.comparison import (
    Setup,
    largest_relative_difference,
    print_head,
    take_turns,
    write_table,
)
from snn_revplugin.cli.workloads import HOST, OURS, Batch, Workload
from snn_revplugin.report.memory import mib

COLUMNS = ("model", "image", "way", "retained", "less", "peak", "less", "step", "gradients")
BEGIN, END = "<!-- benchmarks/models_at_size.py: begin -->", "<!-- end -->"  # of the table
EARLIER_STEPS = 2  # before the one whose memory is measured
IMAGE, EVENTS = (3, 112, 112), (2, 128, 128)
SIZES = {"time_steps": 4, "batch": 2}
PATCHES = {"img_size_h": 112, "img_size_w": 112}
TEN = {"num_classes": 10}
# Each model in the mode that takes the whole sequence, and the classes of its blocks, by name.
MODELS: dict[str, tuple[Workload, tuple[str, ...]]] = {
    workload.name: (workload, blocks)
    for models, blocks in (
        (
            spikingjelly("spiking_resnet18", "spiking_resnet", IMAGE, "m", **SIZES, **TEN),
            ("BasicBlock",),
        ),
        (
            spikingjelly("sew_resnet34", "sew_resnet", IMAGE, "m", **SIZES, **TEN, cnf="ADD"),
            ("BasicBlock",),
        ),
        (
            spikingjelly("sew_resnet50", "sew_resnet", IMAGE, "m", **SIZES, **TEN, cnf="ADD"),
            ("Bottleneck",),
        ),
        (
            spikingjelly("spikformer_s", "spikformer", IMAGE, **SIZES, **TEN, **PATCHES),
            ("SpikformerConv2dBNLIF", "SpikformerBlock"),
        ),
        (
            spikingjelly("qkformer_10_384", "qkformer", IMAGE, **SIZES, **TEN),
            ("_PatchEmbedInit", "_PatchEmbedStage", "_Block"),
        ),
        (
            spikingjelly("sdt_8_384", "spike_driven_transformer", IMAGE, **SIZES, **TEN),
            ("_PatchEmbed", "_Block"),
        ),
        (
            spikingjelly("DVSGestureNet", "parametric_lif_net", EVENTS, "m", **SIZES, channels=128),
            (),
        ),
    )
    for workload, _ in models
}


def rows(workload: Workload, blocks: tuple[str, ...], repeats: int) -> None:
    """Print a row for each way to train a model."""
    setup = Setup.usual(workload)
    batch = setup.data()
    ways = {"host": (setup.net(HOST), LEAST)}
    ways |= {f"ours, {budget!r}": (setup.net(OURS), budget) for budget in (LEAST, PEAK)}
    if blocks:
        net = setup.net(HOST)
        kinds = tuple({type(each) for each in net.modules() if type(each).__name__ in blocks})
        ways["memopt, level 1"] = in_memopt(setup, net, kinds, batch), LEAST
    nets = {way: net for way, (net, _) in ways.items()}
    steps = {way: step_of(setup, net, batch, budget) for way, (net, budget) in ways.items()}
    memory, gradients = {}, {}
    for way, step in steps.items():
        for _ in range(EARLIER_STEPS):
            step()
        memory[way] = memory_report(step)
        gradients[way] = [each.grad.clone() for each in nets[way].parameters()]
    seconds = take_turns(steps, repeats, warm_ups=0, clock=time.process_time)
    host = memory["host"]
    for way, found in memory.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[way], seconds["host"], strict=True))
        error = largest_relative_difference(
            [torch.cat([each.flatten() for each in gradients["host"]])],
            [torch.cat([each.flatten() for each in gradients[way]])],
        )
        print_row(
            workload.name,
            "x".join(map(str, workload.image)),
            way,
            mib(found.retained),
            f"{host.retained / found.retained:.1f}x",
            mib(found.peak),
            f"{host.peak / found.peak:.1f}x",
            f"{ratio:.2f}",
            f"{error:.0e}",
        )


def step_of(setup: Setup, net: nn.Module, batch: Batch, budget: str) -> Callable[[], None]:
    """A training step that adds to gradients which stand already."""
    for each in net.parameters():
        each.grad = torch.zeros_like(each)

    def step() -> None:
        net.zero_grad(set_to_none=False)
        with use_settings(memory_budget=budget):
            setup.loss(net, batch).backward()

    return step


def print_row(*cells: str) -> None:
    """Print a row of the table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def in_own_process(name: str, repeats: int, threads: int) -> None:
    """Print a model's rows, measured in a process of its own."""
    options = ("--here", "--repeats", str(repeats), "--threads", str(threads))
    command = [sys.executable, __file__, name, *options]
    print(subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout, end="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="of models; by default all", metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3, help="number of timed steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--here", action="store_true", help="in this process, without a head")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page that has such a table")
    options = parser.parse_args()
    if unknown := set(options.names) - set(MODELS):
        parser.error(f"no model {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    names = options.names or list(MODELS)
    torch.set_num_threads(options.threads)
    if options.here:
        for name in names:
            rows(*MODELS[name], options.repeats)
        return
    printed = StringIO()
    with redirect_stdout(printed if options.write else sys.stdout):
        print_head(COLUMNS, options.threads)
        for name in names:
            in_own_process(name, options.repeats, options.threads)
    if options.write:
        write_table(options.write, BEGIN, END, printed.getvalue())


if __name__ == "__main__":
    main()

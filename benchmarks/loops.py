"""Measures a training step of small dense layers in a Python time loop.

Run ``python benchmarks/loops.py``. The net is three linear layers, each with ``snntorch.Leaky`` or
``RevLeaky`` above it, applied to one time step after the other as in snnTorch's tutorials. The
first column is the size of one layer's current at one time step; most of a small layer's time is
Python's. States are passed by hand (``mem``) or kept by the neurons (``init_hidden``). The time is
that of forward and backward, in seconds of CPU, divided by the number of neuron calls. Host and
ours alternate; the ratio is the median over adjacent runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import snntorch
import torch
import torch.nn as nn
from snntorch import utils

from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.cli.comparison import print_head, take_turns

LAYERS = 3
# bytes of a current, its batch, the time steps
SIZES = (
    (128, 1, 50),
    (2 << 10, 16, 50),
    (8 << 10, 32, 50),
    (32 << 10, 16, 25),
    (64 << 10, 64, 25),
    (256 << 10, 128, 10),
)
COLUMNS = ("bytes", "batch", "neurons", "T", "states", "host", "ours", "ratio")


def loop(
    kind: type[nn.Module], neurons: int, batch: int, time_steps: int, init_hidden: bool
) -> Callable[[], None]:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(neurons, neurons) for _ in range(LAYERS))
    leaky = nn.ModuleList(kind(beta=0.9, init_hidden=init_hidden) for _ in range(LAYERS))
    data = torch.rand(time_steps, batch, neurons)

    def passed() -> torch.Tensor:
        mems = [each.init_leaky() for each in leaky]
        total = torch.zeros(())
        for spikes in data:
            for i in range(LAYERS):
                spikes, mems[i] = leaky[i](layers[i](spikes), mems[i])
            total = total + spikes.sum()
        return total

    def hidden() -> torch.Tensor:
        utils.reset(leaky)
        total = torch.zeros(())
        for spikes in data:
            for i in range(LAYERS):
                spikes = leaky[i](layers[i](spikes))
            total = total + spikes.sum()
        return total

    return lambda: (hidden() if init_hidden else passed()).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print_head(COLUMNS, options.threads)
    for nbytes, batch, time_steps in SIZES:
        for init_hidden in (False, True):
            size = nbytes // 4 // batch, batch, time_steps, init_hidden
            steps = {"host": loop(snntorch.Leaky, *size), "ours": loop(RevLeaky, *size)}
            seconds = take_turns(steps, options.repeats, clock=time.process_time)
            host, ours = seconds["host"], seconds["ours"]
            calls = LAYERS * time_steps
            cells = (
                str(nbytes),
                str(batch),
                str(size[0]),
                str(time_steps),
                "init_hidden" if init_hidden else "mem",
                *(f"{1e6 * statistics.median(each) / calls:.0f} us" for each in (host, ours)),
                f"{statistics.median(a / b for a, b in zip(ours, host, strict=True)):.2f}",
            )
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""Measures the time of one neuron call, from a few neurons to many.

Run ``python benchmarks/neuron_call.py``. The net is one layer in a time loop: a linear layer with
as many inputs as neurons, on data that change at every step, then ``snntorch.Leaky`` or
``RevLeaky``, with a batch of one. The time is that of forward and backward of T steps, divided by
T. Host and ours alternate; the ratio is the median over adjacent runs. The library stores small
layers instead of recomputing them (the setting ``recompute_min_bytes``); the last columns recompute
them too.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import snntorch
import torch
import torch.nn as nn

from snn_revplugin import get_settings, use_settings
from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.cli.comparison import print_head, take_turns

NEURONS = (4, 64, 128, 256, 1024, 4096)
COLUMNS = ("neurons", "host", "ours", "ratio", "ours, all recomputed", "ratio")


def call(
    kind: type[nn.Module], neurons: int, time_steps: int, recompute_min_bytes: int
) -> Callable[[], None]:
    torch.manual_seed(0)
    neuron, data = kind(beta=0.9), torch.rand(time_steps, neurons)
    weight = nn.Parameter(torch.randn(neurons, neurons) / neurons**0.5)

    def step() -> None:
        with use_settings(recompute_min_bytes=recompute_min_bytes):
            mem, total = torch.zeros(neurons), torch.zeros(())
            for x in data:
                spikes, mem = neuron(weight @ x, mem)
                total = total + spikes.sum()
            total.backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--time-steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print_head(COLUMNS, options.threads)
    for neurons in NEURONS:
        sides = {
            "host": (snntorch.Leaky, 0),
            "ours": (RevLeaky, get_settings().recompute_min_bytes),
            "ours, recomputed": (RevLeaky, 0),
        }
        steps = {
            name: call(kind, neurons, options.time_steps, least)
            for name, (kind, least) in sides.items()
        }
        seconds = take_turns(steps, options.repeats)
        cells = [str(neurons)]
        for name, times in seconds.items():
            cells.append(f"{1e6 * statistics.median(times) / options.time_steps:.0f} us")
            if name != "host":
                ratios = (a / b for a, b in zip(times, seconds["host"], strict=True))
                cells.append(f"{statistics.median(ratios):.2f}")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""Measures what readers behind the last neuron keep: nets whose read-out has no neuron.

Run ``python benchmarks/readers.py``. The nets run T = 50 steps of a time loop on a batch of 16:

* dense, snnTorch: 784-128-10, ``out = out + fc(spikes)``;
* conv, snnTorch: two convolutional layers of neurons, then a convolution, a batch norm, a ReLU, the
  mean over the image and a linear layer;
* conv, SpikingJelly: the same in step mode 'm', with an average over time.

"host" has the host's neurons, "neurons alone" reversible ones without ``watch``, and "ours" is
converted. Retained and peak are the bytes of live tensors in one training step, "first peak" those
of the first step of all, which finds the readers. The step's time is the median of alternating
steps, in seconds of CPU time; the ratio is the median over adjacent steps.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import snntorch
import torch
import torch.nn as nn
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor

from snn_revplugin import convert, memory_report
from snn_revplugin.cli.comparison import print_head, take_turns
from snn_revplugin.swap.watch import unwatch

T, BATCH, CHANNELS, CLASSES = 50, 16, 16, 10
COLUMNS = ("net", "neurons", "retained", "less", "peak", "less", "first peak", "step", "ratio")
KIB = 1024


class Dense(nn.Module):
    """784-128-10 with a linear read-out in the time loop."""

    shape = (784,)

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lif, self.fc2 = nn.Linear(784, 128), snntorch.Leaky(0.9), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        mem, out = self.lif.reset_mem(), 0
        for _ in range(T):
            spikes, mem = self.lif(self.fc1(x), mem)
            out = out + self.fc2(spikes)
        return out


def head() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(CHANNELS, CHANNELS, 3),
        nn.BatchNorm2d(CHANNELS),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(CHANNELS, CLASSES),
    )


class Conv(nn.Module):
    """Two convolutional layers of neurons in the time loop, and a convolutional head."""

    shape = (1, 20, 20)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.lif1 = nn.Conv2d(1, CHANNELS, 5), snntorch.Leaky(0.9)
        self.conv2, self.lif2 = nn.Conv2d(CHANNELS, CHANNELS, 5), snntorch.Leaky(0.9)
        self.head = head()

    def forward(self, x: Tensor) -> Tensor:
        mem1, mem2, out = self.lif1.reset_mem(), self.lif2.reset_mem(), 0
        for _ in range(T):
            spikes, mem1 = self.lif1(self.conv1(x), mem1)
            spikes, mem2 = self.lif2(self.conv2(spikes), mem2)
            out = out + self.head(spikes)
        return out


class Sequence(nn.Module):
    """The same of SpikingJelly, in step mode 'm'."""

    shape = (1, 20, 20)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            layer.Conv2d(1, CHANNELS, 5),
            neuron.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True),
            layer.Conv2d(CHANNELS, CHANNELS, 5),
            neuron.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True),
        )
        functional.set_step_mode(self, "m")
        self.head = layer.SeqToANNContainer(*head())

    def forward(self, x: Tensor) -> Tensor:
        functional.reset_net(self)
        return self.head(self.body(x.expand(T, *x.shape))).mean(0)


NETS = {"dense, snnTorch": Dense, "conv, snnTorch": Conv, "conv, SpikingJelly": Sequence}


def step_of(net: nn.Module) -> Callable[[], None]:
    x = torch.rand(BATCH, *net.shape, generator=torch.Generator().manual_seed(1))
    target = torch.arange(BATCH) % CLASSES

    def step() -> None:
        net.zero_grad()
        F.cross_entropy(net(x), target).backward()

    return step


def sides_of(make: type[nn.Module]) -> dict[str, nn.Module]:
    """The same net three times."""
    torch.manual_seed(0)
    host = make()
    alone, ours = copy.deepcopy(host), copy.deepcopy(host)
    for each in (alone, ours):
        convert(each)
    for module in alone.modules():
        unwatch(module)
    return {"host": host, "neurons alone": alone, "ours": ours}


def measure(title: str, make: type[nn.Module], repeats: int) -> None:
    steps = {name: step_of(net) for name, net in sides_of(make).items()}
    first = {name: memory_report(step) for name, step in steps.items()}
    later = {name: memory_report(step) for name, step in steps.items()}
    seconds, host = take_turns(steps, repeats, clock=time.process_time), later["host"]
    for name, report in later.items():
        ratios = [a / b for a, b in zip(seconds[name], seconds["host"], strict=True)]
        cells = (
            title,
            name,
            f"{report.retained / KIB:.0f} KiB",
            f"{host.retained / report.retained:.1f}x",
            f"{report.peak / KIB:.0f} KiB",
            f"{host.peak / report.peak:.1f}x",
            f"{first[name].peak / KIB:.0f} KiB",
            f"{1000 * statistics.median(seconds[name]):.0f} ms",
            f"{statistics.median(ratios):.2f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print_head(COLUMNS, options.threads)
    for title, make in NETS.items():
        measure(title, make, options.repeats)


if __name__ == "__main__":
    main()

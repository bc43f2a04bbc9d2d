"""Measures a training step for every spiking neuron class of both hosts.

Run ``python benchmarks/neurons.py``. The net is convolutional, with batch norms, in a time loop of
32 steps on data that change at every step; host and converted net have the same weights. "path"
says how the neuron runs: by its equations, by its own step that backward runs again, or on the
host's path and why. Retained and peak memory are the host's over ours. The step's time is ours over
the host's, the median over adjacent steps, which alternate. The error is that of all gradients.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import snntorch
import torch
import torch.nn as nn
from spikingjelly.activation_based import functional, neuron
from torch import Tensor

from snn_revplugin import Conversion, convert, explain, memory_report
from snn_revplugin.cli.comparison import print_head, take_turns

COLUMNS = ("neuron", "path", "retained", "peak", "step", "error")
T, BATCH, CHANNELS = 32, 4, 8
HIDDEN = {"init_hidden": True}
# The arguments that a constructor needs; None where its neuron takes other inputs than these.
SNNTORCH: dict[str, dict[str, Any]] = {
    "Leaky": {"beta": 0.9},
    "Synaptic": {"alpha": 0.8, "beta": 0.9},
    "Alpha": {"alpha": 0.9, "beta": 0.8},
    "Lapicque": {"beta": 0.9},
    "RLeaky": {"beta": 0.9, "conv2d_channels": CHANNELS, "kernel_size": 3},
    "RSynaptic": {"alpha": 0.8, "beta": 0.9, "conv2d_channels": CHANNELS, "kernel_size": 3},
    "SConv2dLSTM": {"in_channels": CHANNELS, "out_channels": CHANNELS, "kernel_size": 3},
}
SPIKINGJELLY: dict[str, dict[str, Any]] = {
    "SimpleLIFNode": {"tau": 2.0, "decay_input": True},
    "LIAFNode": {"act": nn.ReLU(), "threshold_related": False},
    "GatedLIFNode": {"T": T},
    "MaskedPSN": {"k": 2, "T": T},
    "SlidingPSN": {"k": 2},
    "PSN": {"T": T},
    "DSRIFNode": {"T": T},
    "DSRLIFNode": {"T": T},
}


class OfSnntorch(nn.Module):
    """A convolutional net in a time loop."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)
        self.conv2, self.norm2 = (
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
            nn.BatchNorm2d(CHANNELS),
        )
        self.neuron1, self.neuron2 = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        for each in (self.neuron1, self.neuron2):
            self.clear(each)
        seen = []
        for frame in x:
            spikes = self.neuron1(self.norm1(self.conv1(frame)))
            seen.append(self.neuron2(self.norm2(self.conv2(spikes))).mean((2, 3)))
        return torch.stack(seen)

    def clear(self, each: nn.Module) -> None:
        each.reset_mem()


class OfSpikingJelly(OfSnntorch):
    """The same net, with SpikingJelly's neurons."""

    def clear(self, each: nn.Module) -> None:
        functional.reset_net(each)


def cases() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Every neuron class of the hosts that can be made and run in this net, and a maker of its
    net."""
    for name, options in SNNTORCH.items():
        kind = getattr(snntorch, name)
        yield f"snntorch.{name}", lambda k=kind, o=options: OfSnntorch(lambda: k(**o, **HIDDEN))
    for name, kind in list(vars(neuron).items()):
        of_host = inspect.isclass(kind) and kind.__module__.startswith("spikingjelly.")
        if of_host and issubclass(kind, nn.Module) and not name.endswith("BaseNode"):
            options = SPIKINGJELLY.get(name, {})
            yield name, lambda k=kind, o=options: OfSpikingJelly(lambda: k(**o))


def row(name: str, build: Callable[[], nn.Module], repeats: int) -> list[str] | None:
    """The cells of a neuron's row; None where the host itself cannot run it here."""
    torch.manual_seed(0)
    x, weights = 2 * torch.rand(T, BATCH, 2, 16, 16), torch.randn(T, BATCH, CHANNELS)
    try:
        host = build()
        host(x).sum().backward()
    except Exception:  # other arguments, other inputs, or no single time step
        return None
    host = build()
    ours = copy.deepcopy(host)
    report = convert(ours)
    if not report.swapped:
        return [name, next(iter(report.left.values()), "no spiking neuron"), *["-"] * 4]

    def step(net: nn.Module) -> Callable[[], None]:
        return lambda: (net(x) * weights).sum().backward()

    gradients = []
    for net in (host, ours):
        step(net)()
        grads = [each.grad for each in net.parameters() if each.grad is not None]
        gradients.append(torch.cat([each.flatten() for each in grads]))
    error = ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
    memory = [memory_report(step(net)) for net in (host, ours)]
    seconds = take_turns({"host": step(host), "ours": step(ours)}, repeats)
    ratio = statistics.median(a / b for a, b in zip(seconds["ours"], seconds["host"], strict=True))
    return [
        name,
        path_of(ours, report),
        f"{memory[0].retained / memory[1].retained:.1f}x",
        f"{memory[0].peak / memory[1].peak:.1f}x",
        f"{ratio:.2f}",
        f"{error:.0e}",
    ]


def path_of(net: nn.Module, report: Conversion) -> str:
    """How a converted net's neurons run."""
    reasons = [reason for each in explain(net).rows for reason in each.reasons]
    if reasons:
        return f"the host's path: {reasons[0]}"
    return "own step" if report.by_own_step else "equations"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("neurons", nargs="*", help="names; all by default")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    print_head(COLUMNS, options.threads)
    not_run = []
    for name, build in cases():
        if options.neurons and name not in options.neurons:
            continue
        cells = row(name, build, options.repeats)
        if cells is None:
            not_run.append(name)
        else:
            print(f"| {' | '.join(cells)} |", flush=True)
    if not_run:
        print(f"\nThe host does not run these in this net: {', '.join(not_run)}.")


if __name__ == "__main__":
    main()

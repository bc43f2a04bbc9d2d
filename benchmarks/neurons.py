"""Measures a training step for every spiking neuron class of both hosts.

Run ``python benchmarks/neurons.py``; with ``--write docs/any-neuron.md`` it puts the table into
that page. The net has two layers of neurons behind convolutions with batch norms (behind linear
layers where a neuron takes features), a read-out that averages over space (over groups of
features), 32 time steps, and data that change at every step; host and converted net have the same
weights. Neurons take single time steps in a loop; those that have none take the sequence.

"path" says how the neuron runs: by its equations, by its own step or its own call that backward
runs again, or on the host's path and why. Retained and peak memory are the host's over ours. The
step's time is ours over the host's, the median over adjacent steps, which alternate. The error is
that of all gradients.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import snntorch
import torch
import torch.nn as nn
from snntorch import _neurons as of_snntorch
from spikingjelly.activation_based import base, functional, layer, neuron, surrogate
from torch import Tensor

from snn_revplugin import Conversion, convert, explain, memory_report
from snn_revplugin.cli.comparison import print_head, take_turns, write_table

COLUMNS = ("neuron", "path", "retained", "peak", "step", "error")
BEGIN, END = "<!-- benchmarks/neurons.py: begin -->", "<!-- end -->"  # of the table in a page
T = 32
IMAGES, CHANNELS, SIZE = 4, 8, 16
SAMPLES, FEATURES = 32, 64
GROUPS = 8  # of features
HIDDEN = {"init_hidden": True}
STEPS, SEQUENCE = "s", "m"
# Base classes, which are no neurons of their own.
ABSTRACT = [
    "snntorch.SpikingNeuron",
    "snntorch.LIF",
    "BaseNode",
    "SimpleBaseNode",
    "NonSpikingBaseNode",
    "AdaptBaseNode",
    "MPBNBaseNode",
    "ILCBaseNode",
    "NoisyBaseNode",
    "NoisyILCBaseNode",
    "NoisyNonSpikingBaseNode",
]


@dataclass(frozen=True)
class Case:
    """A neuron class, and the net that it takes part in.

    Attributes:
        make: makes a neuron.
        mode: single time steps, or a sequence.
        conv: whether its inputs are images.
    """

    make: Callable[[], nn.Module]
    mode: str = STEPS
    conv: bool = True


def flex_core(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The step of a ``FlexSN``: a leaky neuron."""
    v = 0.5 * v + x
    spikes = surrogate.atan.apply(v - 1, 2.0)
    return spikes, v - spikes


def table() -> neuron.FewSpikeTable:
    """Coefficients of a ``FewSpikeNode``."""
    return neuron.FewSpikeTable(*[torch.tensor([1.0, 0.5, 0.25])] * 3)


def noisy(make: Callable[..., nn.Module], *size: int, **options: Any) -> Case:
    """The case of a noisy neuron, whose noise is drawn beforehand."""

    def with_noise() -> nn.Module:
        made = make(*size, T=T, **options)
        made.reset_noise(2)
        return made

    return Case(with_noise, SEQUENCE, conv=False)


def takes_features(make: Callable[[], nn.Module], mode: str = SEQUENCE) -> Case:
    """The case of a neuron that takes features."""
    return Case(make, mode, conv=False)


conv = {"conv2d_channels": CHANNELS, "kernel_size": 3} | HIDDEN
cells = {"in_channels": CHANNELS, "out_channels": CHANNELS, "kernel_size": 3} | HIDDEN
grid = FEATURES // GROUPS
# Whatever a constructor needs beside the defaults.
CASES: dict[str, Case] = {
    "snntorch.Leaky": Case(lambda: snntorch.Leaky(0.9, **HIDDEN)),
    "snntorch.Synaptic": Case(lambda: snntorch.Synaptic(0.8, 0.9, **HIDDEN)),
    "snntorch.Alpha": Case(lambda: snntorch.Alpha(0.9, 0.8, **HIDDEN)),
    "snntorch.Lapicque": Case(lambda: snntorch.Lapicque(beta=0.9, **HIDDEN)),
    "snntorch.RLeaky": Case(lambda: snntorch.RLeaky(0.9, **conv)),
    "snntorch.RSynaptic": Case(lambda: snntorch.RSynaptic(0.8, 0.9, **conv)),
    "snntorch.SConv2dLSTM": Case(lambda: snntorch.SConv2dLSTM(threshold=0.1, **cells)),
    "snntorch.SLSTM": takes_features(
        lambda: snntorch.SLSTM(FEATURES, FEATURES, threshold=0.1, **HIDDEN), STEPS
    ),
    "snntorch.DeltaLeaky": Case(lambda: snntorch.DeltaLeaky(0.5, beta=0.9, **HIDDEN)),
    "snntorch.StateLeaky": takes_features(lambda: snntorch.StateLeaky(0.9, FEATURES)),
    "snntorch.LinearLeaky": takes_features(lambda: snntorch.LinearLeaky(0.9, FEATURES, FEATURES)),
    "snntorch.LeakyParallel": takes_features(lambda: snntorch.LeakyParallel(FEATURES, FEATURES)),
    "snntorch.AssociativeLeaky": takes_features(
        lambda: snntorch._neurons.AssociativeLeaky(FEATURES, GROUPS, GROUPS, GROUPS**2)
    ),
    "SimpleLIFNode": Case(lambda: neuron.SimpleLIFNode(tau=2.0, decay_input=True)),
    "LIAFNode": Case(lambda: neuron.LIAFNode(nn.ReLU(), threshold_related=False)),
    "MPBNLIFNode": Case(lambda: neuron.MPBNLIFNode(out_channels=CHANNELS)),
    "STBIFNode": Case(lambda: neuron.STBIFNode(0.5, level=8)),
    "FlexSN": Case(lambda: neuron.FlexSN(flex_core, 1, step_mode=STEPS)),
    "FewSpikeNode": Case(lambda: neuron.FewSpikeNode(table())),
    "HGNode": Case(lambda: neuron.HGNode([table(), table()], [1.0])),
    "OutlierAwareThresholdNode": Case(
        lambda: neuron.OutlierAwareThresholdNode(table(), table(), 1.0)
    ),
    "GatedLIFNode": Case(lambda: neuron.GatedLIFNode(T), SEQUENCE),
    "PSN": Case(lambda: neuron.PSN(T), SEQUENCE),
    "MaskedPSN": Case(lambda: neuron.MaskedPSN(2, T, step_mode=SEQUENCE), SEQUENCE),
    "SlidingPSN": Case(lambda: neuron.SlidingPSN(2, step_mode=SEQUENCE), SEQUENCE),
    "DSRIFNode": Case(lambda: neuron.DSRIFNode(T, v_threshold=1.0), SEQUENCE),
    "DSRLIFNode": Case(lambda: neuron.DSRLIFNode(T, v_threshold=0.2), SEQUENCE),
    "NonSpikingIFNode": Case(neuron.NonSpikingIFNode, SEQUENCE),
    "NonSpikingLIFNode": Case(neuron.NonSpikingLIFNode, SEQUENCE),
    "ILCIFNode": takes_features(lambda: neuron.ILCIFNode(grid, GROUPS)),
    "ILCLIFNode": takes_features(lambda: neuron.ILCLIFNode(grid, GROUPS)),
    "ILCCUBALIFNode": takes_features(lambda: neuron.ILCCUBALIFNode(grid, GROUPS)),
    "NoisyCUBALIFNode": noisy(neuron.NoisyCUBALIFNode, FEATURES),
    "NoisyILCCUBALIFNode": noisy(neuron.NoisyILCCUBALIFNode, grid, GROUPS),
    "NoisyNonSpikingIFNode": noisy(neuron.NoisyNonSpikingIFNode, FEATURES),
    "LinearRecurrentContainer": takes_features(
        lambda: layer.LinearRecurrentContainer(neuron.LIFNode(), FEATURES, FEATURES), STEPS
    ),
    "ElementWiseRecurrentContainer": Case(
        lambda: layer.ElementWiseRecurrentContainer(neuron.IFNode(), torch.add)
    ),
}


def classes() -> Iterator[tuple[str, type[nn.Module]]]:
    """Every neuron class of both hosts."""
    for name, kind in vars(of_snntorch).items():
        if inspect.isclass(kind) and issubclass(kind, nn.Module):
            yield f"snntorch.{name}", kind
    for name, kind in vars(neuron).items():
        of_host = inspect.isclass(kind) and kind.__module__.startswith("spikingjelly.")
        if of_host and issubclass(kind, nn.Module):
            yield name, kind
    for kind in (layer.LinearRecurrentContainer, layer.ElementWiseRecurrentContainer):
        yield kind.__name__, kind


def cases() -> dict[str, Case]:
    """The case of every neuron class of both hosts; a class without one of its own needs no
    arguments."""
    return {name: CASES.get(name) or Case(kind) for name, kind in classes() if name not in ABSTRACT}


class Net(nn.Module):
    """Two layers of neurons."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.mode, self.conv = case.mode, case.conv
        self.below1, self.below2 = self._weights(case, first=True), self._weights(case, first=False)
        self.neuron1, self.neuron2 = case.make(), case.make()
        for each in (self.below1, self.below2, self.neuron1, self.neuron2):
            if isinstance(each, nn.Sequential | base.MemoryModule):
                functional.set_step_mode(each, case.mode)
            if isinstance(each, layer.LinearRecurrentContainer):
                each.sub_module.step_mode = STEPS

    def _weights(self, case: Case, first: bool) -> nn.Sequential:
        if not case.conv:
            return nn.Sequential(layer.Linear(FEATURES, FEATURES))
        ins = 2 if first else CHANNELS
        return nn.Sequential(layer.Conv2d(ins, CHANNELS, 3, padding=1), layer.BatchNorm2d(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        self.clear()
        if self.mode == SEQUENCE:
            return self.layers(x)
        return torch.stack([self.layers(frame) for frame in x])

    def layers(self, x: Tensor) -> Tensor:
        x = outputs_of(self.neuron1(self.below1(x)))
        x = outputs_of(self.neuron2(self.below2(x)))
        return (x.flatten(-2) if self.conv else x.unflatten(-1, (CHANNELS, -1))).mean(-1)

    def clear(self) -> None:
        for each in (self.neuron1, self.neuron2):
            if isinstance(each, snntorch.SpikingNeuron) and hasattr(each, "reset_mem"):
                each.reset_mem()
            if hasattr(each, "noise_step"):
                each.noise_step = -1
        functional.reset_net(self)


def outputs_of(result: Any) -> Tensor:
    """The outputs of what a neuron returns; the potentials of all steps, of a list of those."""
    if isinstance(result, list) and len(result) == T:
        return torch.stack(result)
    return result[0] if isinstance(result, list | tuple) else result


def step_of(net: nn.Module, case: Case) -> Callable[[], None]:
    """A training step, the same for all nets of a case."""
    generator = torch.Generator().manual_seed(1)
    shape = (IMAGES, 2, SIZE, SIZE) if case.conv else (SAMPLES, FEATURES)
    x = 2 * torch.rand(T, *shape, generator=generator)

    def step() -> None:
        out = net(x)
        (out * torch.linspace(-0.5, 1, out.numel()).view_as(out)).sum().backward()

    return step


def pair(case: Case) -> tuple[nn.Module, nn.Module, Conversion]:
    """The host's net, and the converted one with the same weights."""
    nets = []
    for _ in range(2):  # not a copy, which would lack the hooks of parameters
        torch.manual_seed(0)
        nets.append(Net(case))
    noises = [getattr(nets[0], each) for each in ("neuron1", "neuron2")]
    for theirs, ours in zip(noises, (nets[1].neuron1, nets[1].neuron2), strict=True):
        vars(ours).update({n: v for n, v in vars(theirs).items() if n.startswith("eps_")})
    nets[1].load_state_dict(nets[0].state_dict())
    return *nets, convert(nets[1])


def row(name: str, case: Case, repeats: int) -> list[str]:
    """The cells of a neuron's row."""
    host, ours, report = pair(case)
    steps = [step_of(net, case) for net in (host, ours)]
    try:
        for step in steps:
            step()
    except RuntimeError as error:
        return [name, f"the host's own call raises: {error}".rstrip("."), *["-"] * 4]
    path = path_of(ours, report)
    if path not in ("equations", "own step", "own call"):
        return [name, path, *["-"] * 4]
    gradients = [
        torch.cat([each.grad.flatten() for each in net.parameters() if each.grad is not None])
        for net in (host, ours)
    ]
    error = ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
    memory = [memory_report(step) for step in steps]
    seconds = take_turns(dict(zip(("host", "ours"), steps, strict=True)), repeats)
    ratio = statistics.median(a / b for a, b in zip(seconds["ours"], seconds["host"], strict=True))
    return [
        name,
        path,
        f"{memory[0].retained / memory[1].retained:.1f}x",
        f"{memory[0].peak / memory[1].peak:.1f}x",
        f"{ratio:.2f}",
        f"{error:.0e}",
    ]


def path_of(net: nn.Module, report: Conversion) -> str:
    """How the neurons of a converted net run that has been called."""
    for name in ("neuron1", "neuron2"):
        if name in report.left:
            return f"the host's: {report.left[name]}"
    rows = [each for each in explain(net).rows if each.name in ("neuron1", "neuron2")]
    reasons = [reason for each in rows for reason in each.reasons]
    if reasons:
        return f"the host's: {reasons[0]}"
    if "neuron1" not in report.by_own_step:
        return "equations"
    return "own call" if net.neuron1.record.latest_transition.host.whole else "own step"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page that has such a table")
    parser.add_argument("neurons", nargs="*", help="names; all by default")
    options = parser.parse_args()
    if options.write and options.neurons:
        parser.error("--write needs the whole table")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed) if options.write else contextlib.nullcontext():
        print_head(COLUMNS, options.threads)
        for name, case in cases().items():
            if not options.neurons or name in options.neurons:
                print(f"| {' | '.join(row(name, case, options.repeats))} |", flush=True)
    if options.write:
        write_table(options.write, BEGIN, END, printed.getvalue())


if __name__ == "__main__":
    main()

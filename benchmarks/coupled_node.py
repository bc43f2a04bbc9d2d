"""Measures what the coupled node stores, against SpikingJelly's single-step node.

Run ``python benchmarks/coupled_node.py``. Both nodes are float32 with a hard reset. They take one
call per time step, start from rest, and read inputs as a batch norm gives them.

The first table gives the node memory: what a node holds between forward and backward beyond its
outputs, in bytes of live tensors per neuron. With any node the outputs are the next layer's saved
input. The host's ``LIFNode`` holds 12 bytes per neuron and time step; it is the 'current SNN node'
of the paper, which states 58.65 times less for its own node.

The second table gives the most that a node holds while backward runs, beyond its outputs and the
gradients of its inputs. Backward scans the potentials forward a second time, one interval at a
time.

The third table gives the effect of rounding over T = 100, relative to the largest potential or
input: on the potentials and inputs that training reconstructs, and on the gradient at the inputs
against plain autograd. For comparison it gives the error of potentials from the inverse, run back
over all steps; training does not do that. ``K`` is the distance between the anchors that this would
need to lose no more than 4 bits: the smaller alpha, the more anchors. The last column is the ratio
that remains with such anchors of 4 bytes per neuron.
"""

from __future__ import annotations

import argparse
import platform
from typing import NamedTuple

import torch
import torch.nn as nn
from spikingjelly.activation_based import neuron
from torch import Tensor

from snn_revplugin.adapters.spikingjelly import CoupledLIFNode
from snn_revplugin.bptt.anchors import steps_between_anchors
from snn_revplugin.cli.comparison import versions
from snn_revplugin.neurons.coupled import Coupled
from snn_revplugin.report.memory import LiveBytes

PAPER = 58.65
SHAPE = (16, 64, 4, 4)
TIME_STEPS = (4, 8, 16, 32, 50, 51, 100, 200, 400)
ALPHAS = ((0.05, 2.0), (0.1, 2.0), (0.25, 2.0), (0.5, 2.0), (0.7, 2.0), (1.0, 2.0), (1.0, 1.0))
LOST_BITS = 4


class Memory(NamedTuple):
    """The memory of a node in bytes per neuron, for all time steps together."""

    kept: float  # between forward and backward
    peak: float  # the most, until backward has ended


class Rounding(NamedTuple):
    """Largest errors, relative to the largest potential or input; NaN where potentials overflow."""

    largest: float  # potential
    scanned: float  # potentials that training reconstructs
    inputs: float  # inputs that training reconstructs
    inverted: float  # potentials from the inverse, run back over all steps
    gradient: float  # at the inputs, against plain autograd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--time-steps", type=int, nargs="+", default=TIME_STEPS)
    options = parser.parse_args()
    print(
        ", ".join(f"{name} {version}" for name, version in versions().items() if version), end=", "
    )
    print(f"{platform.machine()}, float32 on cpu, {torch.Size(SHAPE).numel()} neurons\n")

    host = {
        length: node_memory(neuron.LIFNode(v_reset=0.0), length) for length in options.time_steps
    }
    ours = {
        each: {length: node_memory(node_of(*each), length) for length in options.time_steps}
        for each in ALPHAS
    }
    print(
        "Node memory, bytes per neuron between forward and backward; times less than the host's\n"
    )
    table("", *(f"T = {length}" for length in options.time_steps))
    row("host's LIFNode", *(f"{each.kept:.1f}" for each in host.values()))
    for each, found in ours.items():
        row(name_of(*each), *(ratio(host[length].kept, found[length].kept) for length in found))

    print("\nThe peak of the node's memory, backward included\n")
    table("", *(f"T = {length}" for length in options.time_steps))
    row("host's LIFNode", *(f"{each.peak:.1f}" for each in host.values()))
    for each, found in ours.items():
        row(name_of(*each), *(ratio(host[length].peak, found[length].peak) for length in found))

    print("\nRounding over T = 100\n")
    columns = (
        "potentials",
        "inputs",
        "gradient",
        "by the inverse alone",
        "K",
        "ratio that anchors would leave",
    )
    table("", "largest potential", *columns)
    for each in ALPHAS:
        found = rounding(node_of(*each), 100)
        errors = (
            f"{error:.1e}"
            for error in (found.scanned, found.inputs, found.gradient, found.inverted)
        )
        anchors = anchor_distance(*each)
        row(
            name_of(*each),
            f"{found.largest:.2g}",
            *errors,
            str(anchors),
            f"{12 * 100 / (100 / 8 + 4 * (100 // anchors + 1)):.1f}x",
        )

    for each in ALPHAS:
        print(
            f"\n{name_of(*each)}: {PAPER}x and more from T = {first_time_steps(*each)} on", end=""
        )
    print()


def node_of(alpha: float, tau: float) -> CoupledLIFNode:
    return CoupledLIFNode(tau=tau, alpha=alpha)


def node_memory(node: nn.Module, length: int) -> Memory:
    """What a node holds for ``length`` calls beyond its outputs. Its inputs are leaves whose
    gradients are allocated before."""
    torch.manual_seed(0)
    frames = [torch.randn(SHAPE, requires_grad=True) for _ in range(length)]
    for each in frames:
        each.grad = torch.zeros(SHAPE)
    neurons, gradient = torch.Size(SHAPE).numel(), torch.randn(SHAPE)
    with LiveBytes() as live:
        outputs = [node(each) for each in frames]
        torch.autograd.backward(outputs, [gradient] * length)
        beside = sum(each.nbytes for each in outputs)
    return Memory((live.retained() - beside) / neurons, (live.peak() - beside) / neurons)


@torch.no_grad()
def rounding(node: CoupledLIFNode, length: int) -> Rounding:
    """The errors of what is reconstructed over ``length`` steps."""
    torch.manual_seed(0)
    equations: Coupled = node._coupled()
    x, v = torch.randn(length, *SHAPE), torch.zeros(SHAPE)
    path, record = [v], []
    for each in x:
        y, v, fired = equations.step(each, v)
        path.append(v)
        record.append((y, fired))
    largest = max(each.abs().max().item() for each in path)

    scanned = inputs = inverted = 0.0
    halves = equations.halves(path[0])
    for (y, fired), right, each in zip(record, path[1:], x, strict=True):
        spikes = fired.to(y.dtype)
        halves = equations.step_again(equations.halves(y), equations.halves(spikes), halves)
        scanned = worst(scanned, torch.cat(halves, equations.split_dim), right)
        inputs = worst(inputs, equations.inputs(y, spikes), each)
    for (y, fired), right in zip(reversed(record), reversed(path[:-1]), strict=True):
        _, v = equations.inverse(y, v, fired)
        inverted = worst(inverted, v, right)
    return Rounding(
        largest,
        scanned / largest,
        inputs / x.abs().max().item(),
        inverted / largest,
        gradient_difference(node, x),
    )


def worst(error: float, found: Tensor, right: Tensor) -> float:
    difference = (found - right).abs().max().item()
    return difference if difference != difference else max(error, difference)


@torch.enable_grad()
def gradient_difference(node: CoupledLIFNode, x: Tensor) -> float:
    """The difference between the node's gradients at the inputs and those of plain autograd,
    relative to the largest."""
    found, weights = [], torch.randn_like(x)
    for node.reversible in (True, False):
        node.reset()
        given = x.clone().requires_grad_()
        (torch.stack([node(each) for each in given]) * weights).sum().backward()
        found.append(given.grad)
    return (found[0] - found[1]).abs().max().item() / found[1].abs().max().item()


def anchor_distance(alpha: float, tau: float) -> int:
    """The number of steps between two anchors if potentials were inverted, at least 1."""
    return max(
        1,
        steps_between_anchors(
            (min(1.0, 1 / Coupled(tau, alpha).growth_backward),), LOST_BITS, 10_000
        ),
    )


def first_time_steps(alpha: float, tau: float) -> int:
    """The smallest T at which the measured memory is the paper's factor below the host's."""
    length = 1
    while 12 * length < PAPER * node_memory(node_of(alpha, tau), length).kept:
        length += 1
    return length


def name_of(alpha: float, tau: float) -> str:
    return f"alpha {alpha:g}, tau {tau:g}"


def ratio(host: float, ours: float) -> str:
    return f"{ours:.1f} ({host / ours:.1f}x)"


def table(*columns: str) -> None:
    row(*columns)
    print(f"|{' --- |' * len(columns)}")


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""A neuron that resets to a value forgets what it had charged: it is not reversed but rebuilt
forward, exactly.

Single-step mode, the potential carried from step to step, over a hundred time steps: the way
beginners' examples train.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import snntorch
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import assert_close
from hosts import PURE
from pairs import every_pair
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import functional, neuron
from torch import Tensor

from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.adapters.spikingjelly import RevIFNode, RevLIFNode, RevParametricLIFNode
from snn_revplugin.report.memory import MemoryReport, memory_report
from snn_revplugin.settings import use_settings

TIME_STEPS = 100
Make = Callable[[], nn.Module]


def leaky(kind: type[snntorch.Leaky], **options: object) -> Make:
    return lambda: kind(
        0.9, 0.3, snn_surrogate.fast_sigmoid(), init_hidden=True, reset_mechanism="zero", **options
    )


def node(kind: type[nn.Module], **options: object) -> Make:
    return lambda: kind(v_threshold=0.1, **options)


NEURONS = {
    "Leaky": (leaky(snntorch.Leaky), leaky(RevLeaky)),
    "Leaky, reset at once": (
        leaky(snntorch.Leaky, reset_delay=False),
        leaky(RevLeaky, reset_delay=False),
    ),
    "IFNode": (node(neuron.IFNode), node(RevIFNode)),
    "LIFNode": (node(neuron.LIFNode), node(RevLIFNode)),
    "LIFNode, detached": (
        node(neuron.LIFNode, detach_reset=True),
        node(RevLIFNode, detach_reset=True),
    ),
    "ParametricLIFNode": (node(neuron.ParametricLIFNode), node(RevParametricLIFNode)),
}


class ConvNet(nn.Module):
    """conv-pool-neuron twice, then linear-neuron: the tutorials' network on small images."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.conv1, self.neuron1 = nn.Conv2d(1, 6, 3), make()
        self.conv2, self.neuron2 = nn.Conv2d(6, 16, 3), make()
        self.fc, self.neuron3 = nn.Linear(16 * 2 * 2, 10), make()

    def forward(self, x: Tensor) -> Tensor:
        below = self.neuron1(F.max_pool2d(self.conv1(x), 2))
        below = self.neuron2(F.max_pool2d(self.conv2(below), 2))
        return self.neuron3(self.fc(below.flatten(1)))


class Alone(nn.Module):
    """One neuron behind one linear layer."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.fc, self.neuron = nn.Linear(14, 256), make()

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron(self.fc(x.sum((1, 2))))


def train(net: nn.Module) -> tuple[Tensor, MemoryReport]:
    """A training step: how often each neuron of the last layer fired, and the memory that the step
    held."""
    if any(isinstance(each, neuron.BaseNode) for each in net.modules()):
        functional.reset_net(net)
    x = torch.rand(3, 1, 14, 14, generator=torch.Generator().manual_seed(1))
    seen = []

    def loss() -> Tensor:
        count = sum(
            net(x) * (1 + t / TIME_STEPS) for t in range(TIME_STEPS)
        )  # no two steps with the same gradient
        seen.append(count.detach())
        return count.square().sum()

    report = memory_report(loss)
    return seen[0], report


@pytest.mark.parametrize(
    ("name", "build", "match_host_order"),
    every_pair(product(NEURONS, (ConvNet, Alone), (False, True))),
)
def test_a_third_of_the_memory_and_the_same_gradients(
    name: str, build: type[nn.Module], match_host_order: bool
) -> None:
    results, gradients = [], []
    for make in NEURONS[name]:
        torch.manual_seed(0)
        net = build(make)
        with use_settings(match_host_order=match_host_order):
            results.append(train(net))
        gradients.append({name: each.grad for name, each in net.named_parameters()})
    (host_count, host), (count, ours) = results
    assert 0.02 < host_count.mean() / TIME_STEPS < 1.2  # alive: not silent, and not firing always
    assert torch.equal(count, host_count)
    assert 3 * ours.retained <= host.retained
    assert 3 * ours.peak <= host.peak
    assert gradients[1].keys() == gradients[0].keys()
    for name, gradient in gradients[0].items():
        if PURE and match_host_order:
            assert torch.equal(gradients[1][name], gradient), name
        else:  # TorchScript, of SpikingJelly 0.0.0.0.14, takes sums in another order
            assert_close(name, gradient, gradients[1][name])

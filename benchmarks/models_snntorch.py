"""The networks of snnTorch's tutorials, as rows for the table of ``benchmarks/models.py``.

They are the networks of ``examples/``, in the sizes of the tutorials' own data. Each entry of
``MODELS`` is a workload and its step mode.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from snn_revplugin.cli.workloads import Workload, loss_of_every_step, loss_of_mean

LOOP = "loop"  # the only step mode that snnTorch has
Neuron = type[nn.Module]


def options(**more: object) -> dict[str, object]:
    """The arguments of a neuron that stores its membrane potential itself."""
    from snntorch import surrogate

    return {"beta": 0.9, "spike_grad": surrogate.fast_sigmoid(slope=10), "init_hidden": True} | more


class InOneSequence(nn.Module):
    """Layers in one ``nn.Sequential`` that ends in a neuron: quick start, tutorials 6 and 7,
    population coding, autoencoder.

    Args:
        layers: the layers; the last one returns spikes and potential.
        potentials: whether the output is the potentials instead of the spikes.
    """

    def __init__(self, *layers: nn.Module, potentials: bool = False) -> None:
        super().__init__()
        self.layers, self.which = nn.Sequential(*layers), int(potentials)

    def forward(self, images: Tensor, time_steps: int) -> Tensor:
        """The last layer's spikes or potentials, ``[T, N, ...]``."""
        from snntorch import SpikingNeuron, utils

        # The host resets the neurons of every net that it knows, and their memory would count
        # here.
        SpikingNeuron.instances[:] = [
            each for each in self.layers if isinstance(each, SpikingNeuron)
        ]
        utils.reset(self.layers)
        return torch.stack([self.layers(images)[self.which] for _ in range(time_steps)])


def quickstart(neuron: Neuron) -> nn.Module:
    return InOneSequence(
        nn.Conv2d(1, 8, 5), nn.MaxPool2d(2), neuron(**options()),
        nn.Conv2d(8, 16, 5), nn.MaxPool2d(2), neuron(**options()),
        nn.Flatten(), nn.Linear(16 * 4 * 4, 10), neuron(**options(output=True)),
    )  # fmt: skip


def events(neuron: Neuron) -> nn.Module:
    return InOneSequence(
        nn.Conv2d(2, 12, 5), nn.MaxPool2d(2), neuron(**options()),
        nn.Conv2d(12, 32, 5), nn.MaxPool2d(2), neuron(**options()),
        nn.Flatten(), nn.Linear(32 * 5 * 5, 10), neuron(**options(output=True)),
    )  # fmt: skip


def population(neuron: Neuron) -> nn.Module:
    return InOneSequence(
        nn.Flatten(),
        nn.Linear(28 * 28, 128),
        neuron(**options()),
        nn.Linear(128, 500),
        neuron(**options(output=True)),
    )


def autoencoder(neuron: Neuron) -> nn.Module:
    return InOneSequence(
        nn.Conv2d(1, 32, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(32),
        neuron(**options()),
        nn.Conv2d(32, 64, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(64),
        neuron(**options()),
        nn.Flatten(),
        nn.Linear(64 * 8 * 8, 32),
        neuron(**options()),
        nn.Linear(32, 64 * 8 * 8),
        neuron(**options()),
        nn.Unflatten(1, (64, 8, 8)),
        nn.ConvTranspose2d(64, 32, 3, padding=1, stride=2, output_padding=1, bias=False),
        nn.BatchNorm2d(32),
        neuron(**options()),
        nn.ConvTranspose2d(32, 1, 3, padding=1, stride=2, output_padding=1),
        neuron(**options(output=True, reset_mechanism="none")),
        potentials=True,
    )


class FeedForward(nn.Module):
    """Tutorial 5: two linear layers; the loop passes the potentials from step to step."""

    def __init__(self, neuron: Neuron, hidden: int = 1000) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(28 * 28, hidden), neuron(beta=0.95)
        self.fc2, self.lif2 = nn.Linear(hidden, 10), neuron(beta=0.95)

    def forward(self, images: Tensor, time_steps: int) -> Tensor:
        """The last layer's potentials, ``[T, N, 10]``."""
        x, mem1, mem2, mems = images.flatten(1), self.lif1.reset_mem(), self.lif2.reset_mem(), []
        for _ in range(time_steps):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            _, mem2 = self.lif2(self.fc2(spk1), mem2)
            mems.append(mem2)
        return torch.stack(mems)


class Regression(nn.Module):
    """Regression 1: each neuron learns its own decay and has its own threshold; the read-out never
    resets."""

    def __init__(self, neuron: Neuron, features: int = 28 * 28, hidden: int = 128) -> None:
        super().__init__()
        from snntorch import surrogate

        def layer() -> nn.Module:
            each = {"beta": torch.rand(hidden), "threshold": torch.rand(hidden)}
            return neuron(**each, learn_beta=True, spike_grad=surrogate.fast_sigmoid(slope=10))

        self.fc1, self.lif1 = nn.Linear(features, hidden), layer()
        self.fc2, self.lif2 = nn.Linear(hidden, hidden), layer()
        self.fc3, self.read_out = (
            nn.Linear(hidden, 1),
            neuron(beta=torch.rand(1), learn_beta=True, reset_mechanism="none"),
        )

    def forward(self, images: Tensor, time_steps: int) -> Tensor:
        """The read-out's potentials, ``[T, N, 1]``."""
        x, mems = images.flatten(1), []
        mem1, mem2, mem3 = self.lif1.reset_mem(), self.lif2.reset_mem(), self.read_out.reset_mem()
        for _ in range(time_steps):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            _, mem3 = self.read_out(self.fc3(spk2), mem3)
            mems.append(mem3)
        return torch.stack(mems)


class ForwardForward(nn.Module):
    """Forward-forward: no gradient passes from one layer to the next; the output of a layer is the
    mean square of its firing rates."""

    def __init__(
        self, neuron: Neuron, features: int = 28 * 28, hidden: int = 500, depth: int = 2
    ) -> None:
        super().__init__()
        sizes = (features, *(hidden,) * depth)
        self.weights = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.lifs = nn.ModuleList(neuron(**options(init_hidden=False)) for _ in self.weights)

    def forward(self, images: Tensor, time_steps: int) -> Tensor:
        """The goodness of each layer, ``[layers, N]``."""
        x, goodness = images.flatten(1), []
        for fc, lif in zip(self.weights, self.lifs, strict=True):
            x, mem, rate = F.normalize(x, dim=1) * x.shape[1] ** 0.5, lif.reset_mem(), 0
            for _ in range(time_steps):
                spk, mem = lif(fc(x), mem)
                rate = rate + spk / time_steps
            goodness.append(rate.square().mean(1))
            x = rate.detach()
        return torch.stack(goodness)


def loss_of_goodness(goodness: Tensor, classes: Tensor) -> Tensor:
    """The loss asks for high firing rates for half of the inputs, and low ones for the others."""
    return F.softplus((goodness - 0.2) * torch.where(classes % 2 == 0, -10.0, 10.0)).mean()


def loss_of_last(potentials: Tensor, classes: Tensor) -> Tensor:
    """The squared error of the mean output at the last step, against one number per class."""
    return (potentials[-1].flatten(1).mean(1) - classes / 10).square().mean()


IMAGE = (1, 28, 28)
MODELS = [
    (Workload(name, name, "snntorch", make, loss, image, time_steps, batch=32), LOOP)
    for name, make, loss, image, time_steps in (
        ("quick start", quickstart, loss_of_mean, IMAGE, 25),
        ("tutorial 5", FeedForward, loss_of_every_step, IMAGE, 25),
        ("tutorial 7", events, loss_of_mean, (2, 34, 34), 50),
        ("population coding", population, loss_of_mean, IMAGE, 10),
        ("regression 1", Regression, loss_of_last, IMAGE, 50),
        ("autoencoder", autoencoder, loss_of_last, (1, 32, 32), 10),
        ("forward-forward", ForwardForward, loss_of_goodness, IMAGE, 25),
    )
]

"""A net of either host with two layers of neurons, which several test files train."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from compare import MakeNeuron, Observed, agree
from either_host import clear, potential_of
from hosts import PURE
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor

from snn_revplugin.adapters.snntorch import RevLeaky, RevSynaptic
from snn_revplugin.adapters.spikingjelly import RevLIFNode, RevParametricLIFNode

T = 6
BATCH = 140  # a time step of four neurons, of two bytes each, exceeds recompute_min_bytes


def step_spike(z: Tensor) -> Tensor:
    """A surrogate that can be pickled; the host's are closures, which cannot."""
    smooth = z.sigmoid()
    return (z > 0).to(z.dtype) + (smooth - smooth.detach())


KINDS: dict[str, tuple[tuple[type, type], dict]] = {
    "Leaky": (
        (snn.Leaky, RevLeaky),
        {"beta": 0.8, "init_hidden": True, "learn_beta": True, "spike_grad": step_spike},
    ),
    "Synaptic": (
        (snn.Synaptic, RevSynaptic),
        {
            "alpha": 0.7,
            "beta": 0.8,
            "init_hidden": True,
            "learn_alpha": True,
            "spike_grad": step_spike,
        },
    ),
    "LIF s": (
        (neuron.LIFNode, RevLIFNode),
        {"surrogate_function": surrogate.ATan(), "v_reset": None},
    ),
    "LIF m": (
        (neuron.LIFNode, RevLIFNode),
        {"surrogate_function": surrogate.ATan(), "step_mode": "m"},
    ),
    "PLIF m": ((neuron.ParametricLIFNode, RevParametricLIFNode), {"step_mode": "m"}),
}
OF_SNNTORCH = "Leaky", "Synaptic"
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


class TwoLayers(nn.Module):
    """Two layers of neurons with states of their own; a subclass adds the weight layers below each.

    Attributes:
        steps: SpikingJelly's step mode; "s" for snnTorch.
    """

    def __init__(self, make: MakeNeuron, options: dict) -> None:
        super().__init__()
        self.lif1, self.lif2 = make(**options), make(**options)
        self.steps = options.get("step_mode", "s")

    def potentials(self) -> tuple[Tensor, Tensor]:
        return potential_of(self.lif1), potential_of(self.lif2)

    def clear(self) -> None:
        clear(self.lif1, self.lif2)


class Net(TwoLayers):
    """linear - neurons - linear - neurons; ``[T, N, 5]`` to ``[T, N, 4]``."""

    def __init__(self, make: MakeNeuron, options: dict) -> None:
        super().__init__(make, options)
        self.fc1, self.fc2 = nn.Linear(5, 7), nn.Linear(7, 4)
        nn.init.normal_(self.fc1.weight)
        nn.init.normal_(self.fc2.weight)
        nn.init.constant_(self.fc2.bias, 0.4)

    def body(self, x: Tensor) -> Tensor:
        return self.lif2(self.fc2(self.lif1(self.fc1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if self.steps == "m" else torch.stack([self.body(frame) for frame in x])


def check(
    kind: str,
    program: Callable[[Net], Observed],
    path: str = "reversible",
    reason: str | None = None,
    **more,
) -> None:
    kinds, options = KINDS[kind]
    agree(lambda make: program(Net(make, options)), *kinds, path=path, reason=reason, **more)


def path_inside_hooks(kind: str) -> str:
    """What our neurons do inside of a user's saved-tensor hooks: snnTorch's save no more than ours
    would, so ours fall back; SpikingJelly's save more."""
    return "host" if kind in OF_SNNTORCH or not PURE else "hooked"

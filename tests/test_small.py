"""Layers so small that Python objects outweigh what they would save: kept as they are, and in less
time than the host's.

Many other tests have tensors as small and recompute them all the same: see ``recompute_everything``
in ``conftest.py``.
"""

from __future__ import annotations

import weakref

import pytest
import snntorch
import torch
import torch.nn as nn
from compare import MakeNeuron, Observed, agree
from either_host import step_of
from spikingjelly.activation_based import neuron
from torch import Tensor

from snn_revplugin import explain, memory_report
from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.adapters.spikingjelly import RevIFNode, RevLIFNode
from snn_revplugin.settings import use_settings

T = 12
NEURONS = {
    "Leaky": (snntorch.Leaky, RevLeaky, {"beta": 0.9, "threshold": 0.3, "learn_beta": True}),
    "Leaky, zero": (
        snntorch.Leaky,
        RevLeaky,
        {"beta": 0.9, "threshold": 0.3, "reset_mechanism": "zero"},
    ),
    "Leaky, at once": (
        snntorch.Leaky,
        RevLeaky,
        {"beta": 0.9, "threshold": 0.3, "reset_delay": False},
    ),
    "IFNode, soft": (neuron.IFNode, RevIFNode, {"v_threshold": 0.3, "v_reset": None}),
    "LIFNode": (neuron.LIFNode, RevLIFNode, {"v_threshold": 0.3}),
}


def run(layers: list[nn.Module], nodes: list[nn.Module], batches: list[Tensor]) -> Tensor:
    """A loss over the time steps of a net of layers and neurons, which sees one batch after the
    other at each."""
    loss, potentials = torch.zeros(()), {}
    for t in range(T):
        for number, x in enumerate(batches):
            for i, (layer, node) in enumerate(zip(layers, nodes, strict=True)):
                current = layer(x)
                x, potentials[number, i] = step_of(
                    node, current, potentials.get((number, i), torch.zeros_like(current))
                )
            loss = loss + ((1 + t) * x).square().sum() + potentials[number, i].sum()
    return loss


@pytest.mark.parametrize(("host", "ours", "options"), NEURONS.values(), ids=NEURONS)
def test_small_layers_are_kept_as_they_are(host: type, ours: type, options: dict) -> None:
    def program(make: MakeNeuron) -> Observed:
        layers, nodes = [nn.Linear(3, 5), nn.Linear(5, 4)], [make(**options), make(**options)]
        run(
            layers, nodes, [torch.rand(2, 3, generator=torch.Generator().manual_seed(1))]
        ).backward()
        return Observed().see_gradients(*layers, *nodes)

    for each in agree(program, host, ours, path="small"):
        (row,) = explain(each).rows
        assert row.small_calls == T - 1 and row.calls == T
        assert "too small" in str(row) and row.steps_between_anchors == 1


@pytest.mark.parametrize(("host", "ours", "options"), NEURONS.values(), ids=NEURONS)
def test_a_small_and_a_large_batch_in_turns(host: type, ours: type, options: dict) -> None:
    """Each size is judged by itself, through the same neurons."""

    def program(make: MakeNeuron) -> Observed:
        layers, nodes = [nn.Linear(3, 40), nn.Linear(40, 30)], [make(**options), make(**options)]
        images = torch.rand(60, 3, generator=torch.Generator().manual_seed(1))
        run(layers, nodes, [images[:1], images]).backward()
        return Observed().see_gradients(*layers, *nodes)

    for each in agree(program, host, ours, path="small"):
        (row,) = explain(each).rows
        assert row.small_calls == T - 1 and row.calls == 2 * T


def test_a_few_neurons_on_many_spikes_are_worth_it() -> None:
    """What is saved on the way counts: ten neurons are small, the spikes of the thousand below are
    not."""
    layers, nodes = (
        [nn.Linear(3, 1000), nn.Linear(1000, 10)],
        [RevLeaky(beta=0.9, threshold=0.3) for _ in range(2)],
    )
    run(layers, nodes, [torch.rand(1, 3)])
    assert [explain(each).rows[0].small_calls for each in nodes] == [0, 0]


class Rounded(torch.autograd.Function):
    """An operation outside of the table."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        return weight.round()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def test_a_few_neurons_behind_a_weight_that_each_step_computes_are_worth_it() -> None:
    """The first step replaces nothing, but the next ones share its weight."""
    layer, node = nn.Linear(64, 10), RevLeaky(beta=0.9, threshold=0.3)
    spikes = RevLeaky(beta=0.9)(torch.rand(1, 64, requires_grad=True), torch.zeros(1, 64))[0]
    potential, weights = node.reset_mem(), []
    for _ in range(T):
        weight = Rounded.apply(layer.weight)
        _, potential = node(spikes @ weight.t(), potential)
        weights.append(weakref.ref(weight.untyped_storage()))
        del weight
    assert explain(node).rows[0].small_calls == 0
    assert sum(each() is not None for each in weights) == 1


def test_a_small_net_keeps_no_more_than_the_hosts() -> None:
    retained = {}
    for kind in (snntorch.Leaky, RevLeaky):
        torch.manual_seed(0)
        layers, nodes = (
            [nn.Linear(3, 16), nn.Linear(16, 8)],
            [kind(beta=0.9, threshold=0.3) for _ in range(2)],
        )
        retained[kind] = memory_report(
            lambda layers=layers, nodes=nodes: run(layers, nodes, [torch.rand(2, 3)])
        ).retained
    assert retained[RevLeaky] <= retained[snntorch.Leaky]


def test_the_setting() -> None:
    layers, nodes = [nn.Linear(3, 5)], [RevLeaky(beta=0.9)]
    with use_settings(recompute_min_bytes=0):
        run(layers, nodes, [torch.rand(2, 3)])
    assert explain(nodes[0]).rows[0].small_calls == 0
    with (
        pytest.raises(ValueError, match="recompute_min_bytes must be at least 0, got -1"),
        use_settings(recompute_min_bytes=-1),
    ):
        pass

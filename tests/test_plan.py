"""The plan that a walk leaves for the next time step: it is followed where nothing has changed, and
only there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import snntorch
import torch
import torch.nn.functional as F
from compare import MakeNeuron, Observed, agree
from snntorch import surrogate
from torch import Tensor, nn

from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.replay.walk import Walk

pytestmark = pytest.mark.usefixtures("recompute_everything")

BATCH, FEATURES, STEPS = 4, 10, 9
CHOICES = {"beta": 0.9, "threshold": 0.4, "spike_grad": surrogate.fast_sigmoid(slope=5)}
Between = Callable[[nn.ModuleList, Tensor, int], Tensor]


def two_neurons(between: Between, make_layer: Callable[[], nn.Module]) -> Callable:
    """A program: linear, neuron, ``between`` of three modules, the spikes and the step, neuron."""

    def program(make: MakeNeuron) -> Observed:
        first, layers = nn.Linear(FEATURES, 12), nn.ModuleList(make_layer() for _ in range(3))
        below, above = make(**CHOICES), make(**CHOICES)
        torch.manual_seed(1)
        x_seq = (2 * torch.rand(STEPS, BATCH, FEATURES)).requires_grad_()
        mem_below = mem = None
        seen, loss = [], torch.zeros(())
        for t, x in enumerate(x_seq):
            current = first(x)
            spikes, mem_below = below(
                current, torch.zeros_like(current) if mem_below is None else mem_below
            )
            current = between(layers, spikes, t)
            spikes, mem = above(current, torch.zeros_like(current) if mem is None else mem)
            loss = loss + (spikes * torch.linspace(-1, 2, FEATURES)).sum() + mem.square().sum()
            seen.append(spikes)
        loss.backward()
        return Observed({"out": torch.stack(seen)}).see_gradients(first, layers, x=x_seq)

    return program


def write_into_data(layers: nn.ModuleList, spikes: Tensor, t: int) -> Tensor:
    layers[0].weight.data = layers[0].weight.data * 1.1
    return layers[0](spikes)


def edit_spikes(layers: nn.ModuleList, spikes: Tensor, t: int) -> Tensor:
    with torch.no_grad():
        spikes.mul_(1 + t % 2)
    return layers[0](spikes)


CASES: dict[str, Between] = {
    "the same": lambda layers, spikes, t: layers[0](spikes),
    "in turns": lambda layers, spikes, t: layers[t % 3](spikes),
    "all": lambda layers, spikes, t: sum(each(spikes) for each in layers),
    "one after the other": lambda layers, spikes, t: layers[1](
        layers[0](spikes).repeat(1, 2)[:, :12]
    ),
    "without a bias in turns": lambda layers, spikes, t: F.linear(
        spikes, layers[0].weight, layers[0].bias if t % 2 else None
    ),
    "scales that change": lambda layers, spikes, t: torch.addmm(
        layers[0].bias, spikes, layers[0].weight.t(), beta=t % 3, alpha=1 + t
    ),
    "a weight that does not require grad in turns": lambda layers, spikes, t: F.linear(
        spikes, layers[0].weight if t % 2 else layers[0].weight.detach(), layers[0].bias
    ),
    "other memory": write_into_data,
    "edited spikes": edit_spikes,
    "a slice": lambda layers, spikes, t: layers[0](spikes.roll(t, 1)),
    "another output": lambda layers, spikes, t: (
        layers[0](spikes) if t % 2 else layers[1](spikes * 2)
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_may_change_between_time_steps(case: str) -> None:
    program = two_neurons(CASES[case], lambda: nn.Linear(12, FEATURES))
    agree(program, snntorch.Leaky, RevLeaky)


def test_a_convolution_with_and_without_a_bias() -> None:
    def between(layers: nn.ModuleList, spikes: Tensor, t: int) -> Tensor:
        bias = layers[0].bias if t % 3 else None
        return F.conv1d(spikes.unflatten(1, (1, -1)), layers[0].weight, bias).flatten(1)

    agree(two_neurons(between, lambda: nn.Conv1d(1, 1, 3)), snntorch.Leaky, RevLeaky)


def test_a_plan_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first step, the layer on spikes is visited no more."""
    visited = []
    visit = Walk._visit

    def counted(self: Walk, place, operation):
        visited.append(type(place.node).__name__)
        return visit(self, place, operation)

    monkeypatch.setattr(Walk, "_visit", counted)
    two_neurons(CASES["the same"], lambda: nn.Linear(12, FEATURES))(RevLeaky)
    on_data = STEPS
    assert visited.count("AddmmBackward0") == on_data + 1


def test_a_weight_that_was_written_into_raises_as_in_the_host() -> None:
    def between(layers: nn.ModuleList, spikes: Tensor, t: int) -> Tensor:
        with torch.no_grad():
            layers[0].weight.mul_(1.01)
        return layers[0](spikes)

    program = two_neurons(between, lambda: nn.Linear(12, FEATURES))
    for kind in (snntorch.Leaky, RevLeaky):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            program(kind)

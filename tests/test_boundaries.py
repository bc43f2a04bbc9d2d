"""What the library cannot recompute, it keeps as little of as it can: a boundary's saved inputs are
recomputed, its output is kept as bits where it is whole numbers. What it is not sure of, it keeps
as it is."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import snntorch
import torch
from compare import assert_close
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import neuron as sj_neuron
from spikingjelly.activation_based import surrogate as sj_surrogate
from torch import Tensor, nn

import snn_revplugin
from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.report.memory import LiveBytes

pytestmark = pytest.mark.usefixtures("recompute_everything")

TIME_STEPS, SHAPE = 6, (8, 4, 8, 8)
LAYER = 8 * 4 * 8 * 8 * 4  # bytes of a layer's floats at one step


class Net(nn.Module):
    """Two neurons, and between them two convolutions with a function between those."""

    def __init__(self, between: Callable[[Tensor], Tensor], neuron: type = snntorch.Leaky) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.between = between
        self.scale = nn.Parameter(torch.linspace(0.7, 1.3, SHAPE[-1]))
        self.below = neuron(beta=0.8, threshold=0.6)
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.above = neuron(beta=0.9, threshold=0.3)

    def forward(self, x_seq: Tensor) -> tuple[Tensor, Tensor]:
        mem_below, mem_above, spikes, potentials = *(torch.zeros(SHAPE),) * 2, [], []
        for x in x_seq:
            spk, mem_below = self.below(x * self.scale, mem_below)
            spk, mem_above = self.above(self.second(self.between(self.first(spk))), mem_above)
            spikes.append(spk)
            potentials.append(mem_above)
        return torch.stack(spikes), torch.stack(potentials)


def a_step(net: nn.Module) -> tuple[Tensor, Tensor, int]:
    """Spikes, potentials, and the bytes that are held before backward."""
    torch.manual_seed(1)
    x_seq = torch.randn(TIME_STEPS, *SHAPE)
    with LiveBytes() as live:
        spikes, potentials = net(x_seq)
        loss = (spikes * torch.linspace(-1, 1, SHAPE[-1])).sum() + (potentials**2).sum()
        spikes, potentials = spikes.detach(), potentials.detach()
        retained = live.now()
    loss.backward()
    return spikes, potentials, retained


def trained_alike(between: Callable[[Tensor], Tensor]) -> tuple[Net, float]:
    """Our net after a step that was compared with the host's, and how many times less it held."""
    host = Net(between)
    ours = Net(deepcopy(between), RevLeaky)
    ours.load_state_dict(host.state_dict())
    (*expected, of_host), (*found, of_ours) = a_step(host), a_step(ours)
    assert 0 < expected[0].count_nonzero() < expected[0].numel()
    assert all(map(torch.equal, expected, found))
    for (name, a), b in zip(host.named_parameters(), ours.parameters(), strict=True):
        assert_close(name, a.grad, b.grad)
    return ours, of_host / of_ours


class WritesIntoSaved(torch.autograd.Function):
    """A user's function. Its backward reads its saved tensor two times, and writes into it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x * 3).round()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        (again,) = ctx.saved_tensors
        slope = again.sigmoid()
        saved.mul_(0)
        return grad * slope


def rounded_straight_through(x: Tensor) -> Tensor:
    return x + ((x * 2).round() - x).detach()


def binary_straight_through(x: Tensor) -> Tensor:
    return (x - x.detach()) + (x > 0).float()


@pytest.mark.parametrize(
    "between",
    [
        sj_surrogate.ATan(),
        sj_surrogate.Sigmoid(),
        snn_surrogate.fast_sigmoid(),
        WritesIntoSaved.apply,
        rounded_straight_through,
        binary_straight_through,
    ],
    ids=["ATan", "Sigmoid", "fast sigmoid", "a user's", "rounding", "binary"],
)
def test_whole_numbers_are_kept_as_bits(between: Callable[[Tensor], Tensor]) -> None:
    """A surrogate in mid-graph, a quantised activation: its input is recomputed as well."""
    net, ratio = trained_alike(between)
    assert ratio > 2.5
    kept = net.above.record.statistics.kept_bytes
    assert 0 < sum(kept.values()) <= TIME_STEPS * LAYER / 6  # five bits an element at most


def test_a_surrogate_in_mid_graph_is_no_boundary() -> None:
    net, _ = trained_alike(sj_surrogate.ATan())
    statistics = net.above.record.statistics
    assert not statistics.boundaries
    (name,) = (each for each in statistics.operations if each.startswith("bits of "))
    assert statistics.kept_bytes[name.removeprefix("bits of ")] == TIME_STEPS * LAYER / 32
    assert "(an autograd Function) (kept as bits)" in str(snn_revplugin.explain(net))


def test_the_input_of_an_unknown_operation_is_recomputed() -> None:
    net, ratio = trained_alike(torch.sinc)
    statistics = net.above.record.statistics
    assert set(statistics.boundaries) == {"SincBackward0"}
    assert dict(statistics.kept_bytes) == {"SincBackward0": TIME_STEPS * LAYER}  # its output
    assert ratio > 2


def test_noise_is_kept_and_counted() -> None:
    net, ratio = trained_alike(partial(noisy, torch.Generator().manual_seed(3)))
    statistics = net.above.record.statistics
    assert set(statistics.boundaries) == {"AddBackward0"}
    assert dict(statistics.kept_bytes) == {"AddBackward0": TIME_STEPS * LAYER}
    assert ratio > 1.5


def noisy(generator: torch.Generator, x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=generator)


class Alternating(nn.Module):
    """A layer that adds its frozen bias at the first steps and something else later."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.conv.bias.requires_grad_(False)
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        bias = self.conv.bias if self.step <= 3 else torch.full((4,), 0.3)
        return torch.conv2d(x, self.conv.weight, bias, padding=1)


def test_a_frozen_bias_that_is_not_used_is_noticed() -> None:
    net, _ = trained_alike(Alternating())
    statistics = net.above.record.statistics
    assert statistics.boundaries == {"ConvolutionBackward0": 3}


class StepsOfNumbers(nn.Module):
    """Adds a number that differs from step to step, and in the end none."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        one = torch.zeros_like(x)
        one[-1, -1, -1, -1] = 1
        return x + 0.1 * self.step if self.step < 5 else x + one


def test_a_number_is_found_anew_at_each_step() -> None:
    net, _ = trained_alike(StepsOfNumbers())
    statistics = net.above.record.statistics
    assert statistics.boundaries == {"AddBackward0": 2}
    assert statistics.operations["AddBackward0"] == 4


class SewBlock(nn.Module):
    """SEW-ResNet's block as its authors wrote it: what joins is written into the spikes."""

    def __init__(self, join: str) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.lif = sj_neuron.LIFNode(v_threshold=0.3, step_mode="m", detach_reset=True)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        out = self.lif(out)
        if self.join == "ADD":
            out += x
        elif self.join == "AND":
            out *= x
        elif self.join == "edited":
            with torch.no_grad():
                out[:, :, 0] = 1
            out += x
        return out


@pytest.mark.parametrize("join", ["ADD", "AND", "edited"])
def test_written_into_spikes(join: str) -> None:
    """Sums and products; and an edit that the graph does not show, after which a sum still is whole
    numbers."""
    torch.manual_seed(0)
    host = nn.Sequential(*(SewBlock(join) for _ in range(5)))
    ours = deepcopy(host)
    snn_revplugin.convert(ours)
    retained = []
    for net in (host, ours):
        x = torch.rand(TIME_STEPS, *SHAPE, generator=torch.Generator().manual_seed(1)).round()
        with LiveBytes() as live:
            loss = (net(x.requires_grad_()) * torch.linspace(-1, 1, SHAPE[-1])).sum()
            retained.append(live.now())
        loss.backward()
    for (name, a), b in zip(host.named_parameters(), ours.parameters(), strict=True):
        assert_close(name, a.grad, b.grad)
    assert retained[0] > 7 * retained[1]
    assert not any(block.lif.record.statistics.boundaries for block in ours)

"""Weights that are made of parameters anew at every time step: once for all steps, or computed
again, and never wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import MakeNeuron, Observed, agree, assert_alive
from snntorch import Leaky
from snntorch import surrogate as snn_surrogate
from torch import Tensor
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.report.memory import LiveBytes

pytestmark = pytest.mark.usefixtures("recompute_everything")

FEATURES, BATCH, STEPS = 24, 3, 8


class Rounded(torch.autograd.Function):
    """Quantisation with a straight-through gradient: an operation that is not in the table."""

    @staticmethod
    def forward(ctx, weight: Tensor, scale: float) -> Tensor:
        return torch.round(weight * scale) / scale

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Quantised(nn.Linear):
    """A linear layer with a rounded weight. The scale may differ from step to step."""

    def __init__(self, features: int, scales: tuple[float, ...] = (16.0,)) -> None:
        super().__init__(features, features)
        self.scales, self.calls = scales, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.linear(
            x, Rounded.apply(self.weight, self.scales[self.calls % len(self.scales)]), self.bias
        )


class Computed(nn.Linear):
    """A linear layer whose weight is a function of its parameter."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(FEATURES, FEATURES)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.function(self.weight), self.bias)


def quantised(weight: Tensor) -> Tensor:
    """To integers of 4 bits and back, straight-through, with a scale that follows the weight, as
    quantisation-aware training does it."""
    scale = weight.abs().max() / 7
    scaled = (weight / scale).clamp(-8, 7)
    return (scaled + (scaled.round() - scaled).detach()) * scale


def linear() -> nn.Linear:
    return nn.Linear(FEATURES, FEATURES)


def leaky(make: MakeNeuron) -> nn.Module:
    return make(0.9, 0.4, snn_surrogate.fast_sigmoid(5))


def between_two_neurons(build: Callable[[], nn.Module]) -> Callable[[MakeNeuron], Observed]:
    """A program: a linear layer, a neuron, the layer that is built, a neuron."""

    def program(make: MakeNeuron) -> Observed:
        first, layer, below, above = linear(), build(), leaky(make), leaky(make)
        mems, out = [below.reset_mem(), above.reset_mem()], []
        for x in torch.randn(STEPS, BATCH, FEATURES):
            spk, mems[0] = below(first(x), mems[0])
            spk, mems[1] = above(layer(spk), mems[1])
            out.append(spk)
        out = torch.stack(out)
        assert_alive(out)
        (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
        return Observed({"out": out} | dict(layer.named_buffers())).see_gradients(first, layer)

    return program


LAYERS = {
    "rounded": (lambda: Quantised(FEATURES), set()),
    "rounded in another way at each step": (
        lambda: Quantised(FEATURES, tuple(map(float, range(1, STEPS + 1)))),
        {"RoundedBackward"},
    ),
    "rounded in two ways in turn": (lambda: Quantised(FEATURES, (2.0, 3.0)), set()),
    "two layers, rounded": (lambda: nn.Sequential(Quantised(FEATURES), Quantised(FEATURES)), set()),
    "weight norm": (lambda: weight_norm(linear()), set()),
    "over its largest magnitude": (lambda: Computed(lambda w: w / w.abs().max()), set()),
    "over its largest element": (lambda: Computed(lambda w: w / (w.max() - w.min())), set()),
    "quantised": (lambda: Computed(quantised), set()),
    "orthogonal": (lambda: orthogonal(linear()), set()),
    "spectral norm, which changes at each step": (lambda: spectral_norm(linear()), set()),
    "an old weight norm": (lambda: weight_norm(linear(), dim=None), set()),
}


@pytest.mark.parametrize(("build", "boundaries"), LAYERS.values(), ids=LAYERS)
def test_the_hosts_numbers(build: Callable[[], nn.Module], boundaries: set[str]) -> None:
    _, above = agree(between_two_neurons(build), Leaky, RevLeaky)
    assert set(above.record.statistics.boundaries) == boundaries


def live_weights(build: Callable[[], nn.Module]) -> float:
    """How many weights' worth of memory a forward pass leaves alive."""
    torch.manual_seed(0)
    layer, below, above = build(), RevLeaky(0.9), RevLeaky(0.9)
    x = torch.randn(1, FEATURES, requires_grad=True)
    with LiveBytes() as live:
        mems = [below.reset_mem(), above.reset_mem()]
        for _ in range(STEPS):
            spk, mems[0] = below(x, mems[0])
            spk, mems[1] = above(layer(spk), mems[1])
        del spk
    return live.now() / (FEATURES * FEATURES * 4)


@pytest.mark.parametrize(
    "name",
    ["rounded", "weight norm", "over its largest magnitude", "quantised", "orthogonal"],
)
def test_one_weight_serves_all_time_steps(name: str) -> None:
    """The host keeps one a step, and what made it. Orthogonal weights keep what their own
    operations saved."""
    build, _ = LAYERS[name]
    allowance = 5 * STEPS if name == "orthogonal" else 0
    assert live_weights(build) < 2.5 + allowance


def test_an_unknown_operation_on_data_is_told() -> None:
    """It made the current, so the potential is kept at every step, and explain says why."""
    scale = nn.Parameter(torch.ones(FEATURES))
    leaky = RevLeaky(0.9)
    mem = leaky.reset_mem()
    for x in torch.randn(STEPS, BATCH, FEATURES):
        _, mem = leaky(torch.sinc(scale * x), mem)
    mem.sum().backward()
    assert set(leaky.record.statistics.boundaries) == {"SincBackward0"}


def test_a_weight_that_is_written_into_is_an_error() -> None:
    """The tensor that all steps share is watched."""
    weight = nn.Parameter(torch.randn(FEATURES, FEATURES))
    below, above = RevLeaky(0.9), RevLeaky(0.9)
    x, mems, made = (
        torch.randn(BATCH, FEATURES, requires_grad=True),
        [below.reset_mem(), above.reset_mem()],
        [],
    )
    for _ in range(3):
        spk, mems[0] = below(x, mems[0])
        made.append(Rounded.apply(weight, 4.0))
        spk, mems[1] = above(spk @ made[-1], mems[1])
    with torch.no_grad():
        made[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mems[1].sum().backward()

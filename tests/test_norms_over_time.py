"""Batch norms that know of time: BNTT of both hosts, tdBN and TEBN of SpikingJelly. Between two
neurons, host against ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import snntorch
import torch
import torch.nn as nn
from compare import MakeNeuron, Observed, agree, assert_alive
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import layer, neuron
from torch import Tensor

from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.adapters.spikingjelly import RevLIFNode
from snn_revplugin.report.memory import memory_report

pytestmark = pytest.mark.usefixtures("recompute_everything")

TIME_STEPS, CHANNELS = 6, 8
IMAGES, LINES = (4, 3, 8, 8), (5, 12)


def weighted(out: Tensor) -> Tensor:
    return (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum()


def weight_layer(shape: tuple[int, ...], out: int) -> nn.Module:
    channels = shape[1]
    return (
        nn.Conv2d(channels, out, 3, padding=1, bias=False)
        if len(shape) == 4
        else nn.Linear(channels, out, bias=False)
    )


def randomise(norm: nn.Module) -> nn.Module:
    """Weights that are not the ones they start from."""
    for each in norm.parameters():
        nn.init.uniform_(each, 0.5, 1.5)
    return norm


SNNTORCH = {
    "BatchNormTT1d": (LINES, lambda: snntorch.BatchNormTT1d(CHANNELS, TIME_STEPS)),
    "BatchNormTT2d": (IMAGES, lambda: snntorch.BatchNormTT2d(CHANNELS, TIME_STEPS)),
    "BatchNormTT2d without affine": (
        IMAGES,
        lambda: snntorch.BatchNormTT2d(CHANNELS, TIME_STEPS, affine=False),
    ),
}


def time_loop(
    shape: tuple[int, ...], build: Callable[[], nn.ModuleList], pool: bool = False
) -> Callable[[MakeNeuron], Observed]:
    """A program: weight layer, norm and neuron, twice, in a loop over time; each step has a norm of
    its own."""

    def program(make: MakeNeuron) -> Observed:
        layers = nn.ModuleList(
            [weight_layer(shape, CHANNELS), weight_layer((1, CHANNELS, *shape[2:]), CHANNELS)]
        )
        norms = nn.ModuleList([randomise(build()) for _ in layers])
        between = nn.MaxPool2d(2) if pool else nn.Identity()
        lifs = [make(0.8, 0.5, snn_surrogate.fast_sigmoid(5)) for _ in layers]
        mems, x, out = [lif.reset_mem() for lif in lifs], torch.randn(shape), []
        for t in range(TIME_STEPS):
            spk, mems[0] = lifs[0](norms[0][t](layers[0](x)), mems[0])
            spk, mems[1] = lifs[1](between(norms[1][t](layers[1](spk))), mems[1])
            out.append(spk)
        out = torch.stack(out)
        assert_alive(out)
        weighted(out).backward()
        return Observed({"out": out} | dict(norms.named_buffers())).see_gradients(layers, norms)

    return program


SPIKINGJELLY = {
    "tdBN 1d": (
        LINES,
        "m",
        lambda step_mode: layer.ThresholdDependentBatchNorm1d(1.0, 0.5, CHANNELS),
    ),
    "tdBN 2d": (
        IMAGES,
        "m",
        lambda step_mode: layer.ThresholdDependentBatchNorm2d(1.0, 0.5, CHANNELS),
    ),
    "TEBN 1d": (
        LINES,
        "m",
        lambda step_mode: layer.TemporalEffectiveBatchNorm1d(TIME_STEPS, CHANNELS),
    ),
    "TEBN 2d": (
        IMAGES,
        "m",
        lambda step_mode: layer.TemporalEffectiveBatchNorm2d(TIME_STEPS, CHANNELS),
    ),
    "BNTT 1d, 's'": (
        LINES,
        "s",
        lambda step_mode: layer.BatchNormThroughTime1d(TIME_STEPS, CHANNELS, step_mode=step_mode),
    ),
    "BNTT 2d, 's'": (
        IMAGES,
        "s",
        lambda step_mode: layer.BatchNormThroughTime2d(TIME_STEPS, CHANNELS, step_mode=step_mode),
    ),
    "BNTT 1d, 'm'": (
        LINES,
        "m",
        lambda step_mode: layer.BatchNormThroughTime1d(TIME_STEPS, CHANNELS, step_mode=step_mode),
    ),
    "BNTT 2d, 'm'": (
        IMAGES,
        "m",
        lambda step_mode: layer.BatchNormThroughTime2d(TIME_STEPS, CHANNELS, step_mode=step_mode),
    ),
}


def layers_in(
    step_mode: str, shape: tuple[int, ...], build: Callable[[str], nn.Module]
) -> Callable[[MakeNeuron], Observed]:
    """A program: weight layer, norm and neuron, twice, in one of SpikingJelly's step modes."""

    def weights(channels: int) -> nn.Module:
        if len(shape) == 4:
            return layer.Conv2d(channels, CHANNELS, 3, padding=1, bias=False, step_mode=step_mode)
        return layer.Linear(channels, CHANNELS, bias=False, step_mode=step_mode)

    def program(make: MakeNeuron) -> Observed:
        net = nn.Sequential(
            weights(shape[1]),
            randomise(build(step_mode)),
            make(v_threshold=0.5, step_mode=step_mode),
            weights(CHANNELS),
            randomise(build(step_mode)),
            make(v_threshold=0.5, step_mode=step_mode),
        )
        x_seq = torch.randn(TIME_STEPS, *shape)
        out = net(x_seq) if step_mode == "m" else torch.stack([net(x) for x in x_seq])
        assert_alive(out)
        weighted(out).backward()
        return Observed({"out": out} | dict(net.named_buffers())).see_gradients(net)

    return program


PROGRAMS = {
    **{name: (snntorch.Leaky, RevLeaky, time_loop(*row)) for name, row in SNNTORCH.items()},
    "BatchNormTT2d, then pooled": (
        snntorch.Leaky,
        RevLeaky,
        time_loop(*SNNTORCH["BatchNormTT2d"], pool=True),
    ),
    **{
        name: (neuron.LIFNode, RevLIFNode, layers_in(step_mode, shape, build))
        for name, (shape, step_mode, build) in SPIKINGJELLY.items()
    },
}


@pytest.mark.parametrize(("host", "ours", "program"), PROGRAMS.values(), ids=PROGRAMS)
def test_a_norm_over_time_is_computed_again(
    host: type[nn.Module], ours: type[nn.Module], program: Callable
) -> None:
    for each in agree(program, host, ours):
        assert not each.record.statistics.boundaries
        assert any("BatchNorm" in name for name in each.record.statistics.operations)


@pytest.mark.parametrize(("host", "ours", "program"), PROGRAMS.values(), ids=PROGRAMS)
def test_and_less_is_kept_for_it(
    host: type[nn.Module], ours: type[nn.Module], program: Callable
) -> None:
    def retained(kind: type[nn.Module]) -> int:
        torch.manual_seed(0)
        return memory_report(lambda: program(kind)).retained

    assert retained(ours) < 0.6 * retained(
        host
    )  # the norms' own parameters and the output are in both


def test_a_frozen_bias_is_told_from_none() -> None:
    """The module of the weight tells it; the numbers are the host's."""

    def program(make: MakeNeuron) -> Observed:
        net = nn.Sequential(
            layer.Linear(6, CHANNELS),
            make(v_threshold=0.5),
            layer.Linear(CHANNELS, CHANNELS, bias=False),
            randomise(layer.BatchNorm1d(CHANNELS)),
            make(v_threshold=0.5),
        )
        net[3].bias.requires_grad_(False)
        out = torch.stack([net(x) for x in torch.randn(TIME_STEPS, 5, 6)])
        assert_alive(out)
        weighted(out).backward()
        return Observed({"out": out} | dict(net.named_buffers())).see_gradients(net)

    _, above = agree(program, neuron.LIFNode, RevLIFNode)
    assert not above.record.statistics.boundaries
    assert "NativeBatchNormBackward0" in above.record.statistics.operations

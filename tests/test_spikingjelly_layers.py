"""SpikingJelly's own layers and containers between two neurons: one row each, held against the
host's own neuron."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from compare import MakeNeuron, Observed, agree, assert_alive
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from snn_revplugin.adapters.spikingjelly import RevLIFNode

pytestmark = pytest.mark.usefixtures("recompute_everything")

TIME_STEPS, BATCH = 4, 3


@dataclass(frozen=True)
class Row:
    """One layer.

    Args:
        name: as in the test's id.
        shape: of one time step's spikes, without the batch.
        build: makes the layer; it is given what makes a neuron in step mode 's'.
        modes: the step modes that it has.
        boundaries: the names of the graph nodes that are not recomputed: constants, and what
            joins with them.
        threshold: of the neuron above it.
    """

    name: str
    shape: tuple[int, ...]
    build: Callable[[MakeNeuron], nn.Module]
    modes: str = "sm"
    boundaries: str = ""
    threshold: float = 0.2


LINE, IMAGE, VOLUME, FEATURES, TOKENS = (4, 12), (4, 8, 8), (2, 4, 4, 4), (16,), (8, 9)
CONSTANTS = "AddBackward0 SubBackward0 RsubBackward1"
ROWS = (
    Row("Conv1d", LINE, lambda make: layer.Conv1d(4, 5, 3)),
    Row("Conv2d", IMAGE, lambda make: layer.Conv2d(4, 5, 3, padding=1, bias=False)),
    Row("Conv3d", VOLUME, lambda make: layer.Conv3d(2, 3, 3, padding=1), threshold=0.05),
    Row("WSConv2d", IMAGE, lambda make: layer.WSConv2d(4, 5, 3)),
    Row("Linear", FEATURES, lambda make: layer.Linear(16, 9)),
    Row("WSLinear", FEATURES, lambda make: layer.WSLinear(16, 9)),
    Row("BatchNorm1d", LINE, lambda make: layer.BatchNorm1d(4)),
    Row("BatchNorm2d", IMAGE, lambda make: layer.BatchNorm2d(4)),
    Row("BatchNorm3d", VOLUME, lambda make: layer.BatchNorm3d(2)),
    Row("GroupNorm", IMAGE, lambda make: layer.GroupNorm(2, 4)),
    Row("MaxPool1d", LINE, lambda make: layer.MaxPool1d(2)),
    Row("MaxPool2d", IMAGE, lambda make: layer.MaxPool2d(2)),
    Row("MaxPool3d", VOLUME, lambda make: layer.MaxPool3d(2)),
    Row("AvgPool1d", LINE, lambda make: layer.AvgPool1d(2)),
    Row("AvgPool2d", IMAGE, lambda make: layer.AvgPool2d(2)),
    Row("AvgPool3d", VOLUME, lambda make: layer.AvgPool3d(2)),
    Row("AdaptiveAvgPool1d", LINE, lambda make: layer.AdaptiveAvgPool1d(5)),
    Row("AdaptiveAvgPool2d", IMAGE, lambda make: layer.AdaptiveAvgPool2d(3)),
    Row("AdaptiveAvgPool3d", VOLUME, lambda make: layer.AdaptiveAvgPool3d(2)),
    Row("Flatten", IMAGE, lambda make: layer.Flatten()),
    Row("VotingLayer", FEATURES, lambda make: layer.VotingLayer(4)),
    Row("Dropout", FEATURES, lambda make: layer.Dropout(0.3)),
    Row("Dropout2d", IMAGE, lambda make: layer.Dropout2d(0.3)),
    Row("SynapseFilter", FEATURES, lambda make: layer.SynapseFilter(tau=4.0), boundaries=CONSTANTS),
    Row(
        "SynapseFilter, learnable",
        FEATURES,
        lambda make: layer.SynapseFilter(tau=4.0, learnable=True),
        boundaries=CONSTANTS,
    ),
    Row(
        "Delay",
        FEATURES,
        lambda make: layer.Delay(1, step_mode="m"),
        "m",
        boundaries="StackBackward0",
    ),
    Row("NeuNorm", IMAGE, lambda make: layer.NeuNorm(4, 8, 8), boundaries="AddBackward0"),
    Row("TemporalBinSum", FEATURES, lambda make: layer.TemporalBinSum(2, always_convert=True), "m"),
    Row(
        "TemporalWiseAttention", IMAGE, lambda make: layer.TemporalWiseAttention(TIME_STEPS, 2), "m"
    ),
    Row(
        "MultiDimensionalAttention",
        IMAGE,
        lambda make: layer.MultiDimensionalAttention(TIME_STEPS, 4, 2, 2),
        "m",
        threshold=0.02,
    ),
    Row(
        "SpikingSelfAttention",
        TOKENS,
        lambda make: layer.SpikingSelfAttention(8, 2, make, v_threshold=0.3),
        "m",
    ),
    Row(
        "TokenQKAttention",
        TOKENS,
        lambda make: layer.TokenQKAttention(8, 2, make, v_threshold=0.3),
        "m",
    ),
    Row(
        "ChannelQKAttention",
        TOKENS,
        lambda make: layer.ChannelQKAttention(8, 2, make, v_threshold=0.3),
        "m",
    ),
    Row(
        "SpikeDrivenSelfAttention",
        (8, 3, 3),
        lambda make: layer.SpikeDrivenSelfAttention(8, 2, make, v_threshold=0.3),
        "m",
    ),
    Row(
        "SeqToANNContainer",
        IMAGE,
        lambda make: layer.SeqToANNContainer(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)),
        "m",
    ),
    Row(
        "MultiStepContainer",
        FEATURES,
        lambda make: layer.MultiStepContainer(nn.Linear(16, 9), make(v_threshold=0.1)),
        "m",
    ),
    Row(
        "TLastSeqToANNContainer",
        (16, TIME_STEPS),
        lambda make: layer.TLastSeqToANNContainer(nn.Linear(16, 9)),
        "m",
    ),
    Row(
        "StepModeContainer",
        FEATURES,
        lambda make: layer.StepModeContainer(True, "m", nn.Linear(16, 9), make(v_threshold=0.1)),
    ),
    Row(
        "ElementWiseRecurrentContainer",
        FEATURES,
        lambda make: layer.ElementWiseRecurrentContainer(
            make(v_threshold=0.3), lambda y, x: x + 0.5 * y
        ),
    ),
    Row(
        "LinearRecurrentContainer",
        FEATURES,
        lambda make: layer.LinearRecurrentContainer(make(v_threshold=0.1), 16, 16),
    ),
)
CASES = [pytest.param(row, mode, id=f"{row.name}-{mode}") for row in ROWS for mode in row.modes]


@pytest.mark.parametrize(("row", "mode"), CASES)
def test_trains_as_the_host(row: Row, mode: str) -> None:
    def program(make: MakeNeuron) -> Observed:
        def made(**options) -> nn.Module:
            return make(**{"surrogate_function": surrogate.ATan(), "detach_reset": True} | options)

        net = nn.Sequential(made(v_threshold=0.5), row.build(made), made(v_threshold=row.threshold))
        for each in (net[0], net[2]):
            each.step_mode = mode
        if hasattr(net[1], "step_mode") and len(row.modes) == 2:
            net[1].step_mode = mode
        x_seq = (2 * torch.randn(TIME_STEPS, BATCH, *row.shape)).requires_grad_()
        functional.reset_net(net)
        spikes = net(x_seq) if mode == "m" else torch.stack([net(x) for x in x_seq])
        assert_alive(spikes)
        (spikes * torch.randn_like(spikes)).sum().backward()
        return Observed({"spikes": spikes.detach()} | dict(net.named_buffers())).see_gradients(
            x_seq=x_seq, **weights_of(net)
        )

    neurons = agree(program, neuron.LIFNode, RevLIFNode)
    found = {each for one in neurons for each in one.record.statistics.boundaries}
    assert found == set(row.boundaries.split())


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    """All parameters but the biases in front of a norm, whose gradients are nothing but
    rounding."""
    return {
        name.replace(".", "_"): each
        for name, each in net.named_parameters()
        if not name.endswith("proj_conv.bias")
    }

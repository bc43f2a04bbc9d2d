"""Mixed precision saves what float32 saves: under autocast and where parameters have another dtype
than the currents, neurons are reversible, and no 16-bit copy of a weight is kept.

``test_training_setups.py`` trains under autocast with a scaled loss, ``test_tools.py`` with each
kind of neuron.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from compare import TOLERANCES, Observed, agree, assert_agree
from either_host import clear
from hosts import PURE, only_pure
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet
from torch import Tensor

from snn_revplugin import convert, explain, use_settings
from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.adapters.spikingjelly import RevParametricLIFNode
from snn_revplugin.cli.comparison import Setup
from snn_revplugin.cli.workloads import HOST, OURS, Workload
from snn_revplugin.report.memory import LiveBytes

SMALL_MODELS = []  # of SpikingJelly's; the others take half a minute
if PURE:
    from test_spikingjelly_models import MODELS, Model, built, images_of, loss_of, outputs_of

    SMALL_MODELS = [each for each in MODELS if "resnet" not in each.name and "vgg" not in each.name]

TUTORIALS = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "models_snntorch.py"))[
    "MODELS"
]
T = 6
HALF, BFLOAT, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
# of the currents, of the parameters
MIXTURES = [(HALF, SINGLE), (BFLOAT, SINGLE), (HALF, HALF), (HALF, DOUBLE), (DOUBLE, SINGLE)]


def weighted(outputs: Tensor) -> Tensor:
    return (outputs.float() * torch.linspace(-1, 2, outputs.numel()).view(outputs.shape)).sum()


@only_pure
@pytest.mark.parametrize("dtypes", MIXTURES, ids=str)
@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("v_reset", [None, 0.0])
@pytest.mark.parametrize("mode", ["s", "m"])
def test_learned_time_constant(
    mode: str, v_reset: float | None, decay_input: bool, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """PLIF's ``w`` stays float32 beside the half-precision currents of autocast."""
    current, parameter = dtypes

    def program(make: Callable[..., nn.Module]) -> Observed:
        node = make(init_tau=3.0, v_reset=v_reset, decay_input=decay_input, step_mode=mode)
        node.to(parameter)
        torch.manual_seed(1)
        x = (2 * torch.randn(T, 4, 6)).to(current).requires_grad_()
        spikes = node(x * 1) if mode == "m" else torch.stack([node(each * 1) for each in x])
        weighted(spikes).backward()
        return Observed({"spikes": spikes, "v": node.v}).see_gradients(node, x=x)

    with use_settings(recompute_min_bytes=0):
        tolerance = max(TOLERANCES[each] for each in dtypes)
        agree(program, neuron.ParametricLIFNode, RevParametricLIFNode, tolerance=tolerance)


@pytest.mark.parametrize("dtypes", MIXTURES, ids=str)
@pytest.mark.parametrize("reset", ["subtract", "zero"])
@pytest.mark.parametrize("shape", [(), (6,)])
def test_learned_decay_and_threshold(
    shape: tuple[int, ...], reset: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    current, parameter = dtypes

    def program(make: Callable[..., nn.Module]) -> Observed:
        options = {"beta": torch.full(shape, 0.8), "threshold": torch.full(shape, 1.0)}
        node = make(**options, learn_beta=True, learn_threshold=True, reset_mechanism=reset)
        node.to(parameter)
        torch.manual_seed(1)
        x = (2 * torch.randn(T, 4, 6)).to(current).requires_grad_()
        spikes, mem = [], torch.zeros(4, 6)
        for each in x:
            fired, mem = node(each * 1, mem)
            spikes.append(fired)
        weighted(torch.stack(spikes)).backward()
        return Observed({"spikes": torch.stack(spikes), "mem": mem}).see_gradients(node, x=x)

    with use_settings(recompute_min_bytes=0):
        agree(program, snn.Leaky, RevLeaky, tolerance=max(TOLERANCES[each] for each in dtypes))


# ------------------------------------------------------------------------------------- memory


def sew_resnet18(kind: type[nn.Module], mode: str) -> nn.Module:
    options = {"surrogate_function": surrogate.ATan(), "detach_reset": True}
    net = sew_resnet.sew_resnet18(cnf="ADD", spiking_neuron=kind, num_classes=10, **options)
    functional.set_step_mode(net, mode)
    return net


def convolutions(kind: type[nn.Module], mode: str) -> nn.Module:
    def node() -> nn.Module:
        if issubclass(kind, snn.SpikingNeuron):
            options = {"learn_beta": True, "learn_threshold": True, "init_hidden": True}
            return kind(beta=0.9, **options)
        return kind(surrogate_function=surrogate.ATan(), detach_reset=True)

    net = nn.Sequential(
        layer.Conv2d(3, 16, 3, padding=1, bias=False), layer.BatchNorm2d(16), node(),
        layer.Conv2d(16, 32, 3, padding=1, bias=False), layer.BatchNorm2d(32), node(),
        layer.MaxPool2d(2), layer.Flatten(), layer.Linear(32 * 8 * 8, 64), node(),
        layer.Linear(64, 10), node(),
    )  # fmt: skip
    functional.set_step_mode(net, mode)
    return net


def retained(
    net: nn.Module, x: Tensor, mode: str, around: Callable[[], AbstractContextManager]
) -> int:
    """The bytes that a forward leaves for backward; ``around`` is entered in each call."""
    clear(*(each for each in net.modules() if isinstance(each, neuron.BaseNode | snn.Leaky)))
    with LiveBytes() as live:
        outputs = []
        for each in x if mode == "s" else [x]:
            with around():
                outputs.append(net(each))
        loss = sum(each.float().square().mean() for each in outputs)
        del outputs
        assert loss.requires_grad
        return live.now()


NETS = {
    "SEW-ResNet18": (sew_resnet18, neuron.ParametricLIFNode, "m"),
    "PLIF": (convolutions, neuron.ParametricLIFNode, "s"),
    "Leaky": (convolutions, snn.Leaky, "s"),
}


@only_pure
@pytest.mark.parametrize("name", NETS)
def test_autocast_saves_what_float32_saves(name: str) -> None:
    """A script that enters autocast in its time loop casts every weight at every step. The copies
    are recomputed, so what the host retains grows and ours does not."""
    build, kind, mode = NETS[name]
    x = torch.rand(T, 2, 3, 16, 16)
    ratios, ours = [], []
    for around in (nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)):
        both = []
        for swap in (False, True):
            torch.manual_seed(0)
            net = build(kind, mode)
            if swap:
                convert(net)
            both.append(retained(net, x, mode, around))
        ratios.append(both[0] / both[1])
        ours.append(both[1])
        report = str(explain(net))
        assert "host's own path" not in report and "computed weights" not in report
    assert ratios[1] >= 0.8 * ratios[0]
    # autocast's own copies of the images have no graph by which they could be recomputed
    assert ours[1] <= ours[0] + x.numel() * BFLOAT.itemsize
    assert "constant operands" in report


def test_a_weight_that_is_cast_again_must_not_change() -> None:
    net = convolutions(snn.Leaky, "s")
    convert(net)
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(torch.rand(2, 3, 16, 16)).float().sum()
    with torch.no_grad():
        net[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation: a parameter"):
        loss.backward()


def bytes_retained(run: Callable[[], Tensor], dtype: torch.dtype) -> int:
    """The bytes that a forward leaves for backward, all of it under autocast to a dtype; with
    float32 without."""
    with LiveBytes() as live:
        with nullcontext() if dtype is SINGLE else torch.autocast("cpu", dtype):
            loss = run()
        assert loss.requires_grad
        return live.now()


@only_pure
@pytest.mark.parametrize("model", [pytest.param(each, id=each.name) for each in SMALL_MODELS])
def test_a_model_of_spikingjelly_saves_what_it_saves_in_float32(model: Model) -> None:
    mode, images, ratios = model.modes[0], images_of(model.image), []
    half = (BFLOAT, HALF)[SMALL_MODELS.index(model) % 2]
    for dtype in (SINGLE, half):
        both = []
        for swap in (False, True):
            net = built(model, model.neurons[0] if mode else None, mode)
            if swap:
                convert(net)
            both.append(
                bytes_retained(lambda net=net: loss_of(outputs_of(net, mode, images)), dtype)
            )
        ratios.append(both[0] / both[1])
    assert ratios[1] >= 0.8 * ratios[0]


@pytest.mark.parametrize("workload", [pytest.param(each, id=each.name) for each, _ in TUTORIALS])
def test_a_tutorials_network_keeps_what_it_keeps_in_float32(workload: Workload) -> None:
    """snnTorch's potentials stay float32, so ours keep the same bytes under autocast, while the
    host's currents halve; and one 16-bit copy of the images for all time steps."""
    setup = Setup.usual(workload, time_steps=8, batch=4)
    batch, held = setup.data(), {}
    for dtype in (SINGLE, BFLOAT):
        for whose in (HOST, OURS):
            net = setup.net(whose)
            held[dtype, whose] = bytes_retained(lambda net=net: setup.loss(net, batch), dtype)
    copy = batch.images.numel() * BFLOAT.itemsize
    assert held[BFLOAT, OURS] <= held[SINGLE, OURS] + 1.1 * copy
    assert held[BFLOAT, OURS] < held[BFLOAT, HOST]


@pytest.mark.parametrize("changes", [False, True], ids=["the same image", "frames"])
def test_copies_of_the_same_image_are_one(changes: bool) -> None:
    """Autocast makes one at every time step; those of frames that differ all stay."""
    x = torch.rand(T, 2, 3, 16, 16)
    x = x if changes else x[:1].expand_as(x)
    seen = []
    for swap in (False, True):
        torch.manual_seed(0)
        net = convolutions(snn.Leaky, "s")
        if swap:
            convert(net)
        with torch.autocast("cpu", BFLOAT):
            spikes = torch.stack([net(each) for each in x])
        weighted(spikes).backward()
        seen.append(Observed({"spikes": spikes}).see_gradients(net))
        kept = sum(row.kept_bytes.get("constant operands", 0) for row in explain(net).rows)
    assert_agree(*seen, tolerance=TOLERANCES[BFLOAT])
    assert kept == (T if changes else 1) * x[0].numel() * BFLOAT.itemsize

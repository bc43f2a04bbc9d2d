"""snnTorch's own tools on a net with our neurons: what they give is what they give with the
host's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import snntorch as snn
import torch
import torch.nn as nn
from compare import MakeNeuron, Observed, agree, assert_agree, assert_path, nir_content
from nets import BATCH
from snntorch import functional as SF
from snntorch import surrogate, utils
from snntorch.functional import probe, stdp_learner
from torch import Tensor

from snn_revplugin import check_reversible, convert, explain, restore
from snn_revplugin.adapters.snntorch import CoupledLeaky, RevLeaky

matplotlib.use("Agg")
T = 6
KINDS = snn.Leaky, RevLeaky


class Net(nn.Sequential):
    """linear - neurons - linear - neurons that keep their state; parameters of each neuron's own,
    as NIR wants them."""

    def __init__(self, make: MakeNeuron, **options: Any) -> None:
        super().__init__(
            nn.Linear(5, 8),
            make(
                beta=torch.full((8,), 0.9),
                threshold=torch.full((8,), 0.6),
                init_hidden=True,
                **options,
            ),
            nn.Linear(8, 4),
            make(
                beta=torch.full((4,), 0.8),
                threshold=torch.full((4,), 0.5),
                init_hidden=True,
                output=True,
                **options,
            ),
        )
        for linear in (self[0], self[2]):
            nn.init.normal_(linear.weight)

    def record(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[T, N, 5]`` to the last layer's spikes and membranes, ``[T, N, 4]`` both."""
        utils.reset(self)
        spikes, membranes = zip(*(self(frame) for frame in x), strict=True)
        return torch.stack(spikes), torch.stack(membranes)


def draw() -> Tensor:
    return torch.randn(T, BATCH, 5) * 2


# ---------------------------------------------------------------------------------------------- NIR


@pytest.fixture
def nir_tools() -> Iterator[tuple[Callable, Callable]]:
    """The exporter and the importer; both print what they do, and nirtorch calls its own way of
    tracing deprecated."""
    from snntorch.export_nir import export_to_nir
    from snntorch.import_nir import import_from_nir

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield export_to_nir, import_from_nir


@pytest.mark.parametrize(
    "options",
    [{}, {"learn_beta": True, "learn_threshold": True, "reset_mechanism": "zero"}],
    ids=str,
)
def test_nir_export(options: dict, nir_tools: tuple[Callable, Callable]) -> None:
    graphs = []
    for kind in KINDS:
        torch.manual_seed(0)
        graphs.append(
            nir_content(nir_tools[0](Net(kind, **options), torch.randn(1, 5), ignore_dims=[0]))
        )
    assert graphs[0] == graphs[1]
    assert [kind for kind, _ in graphs[1][0].values()] == [
        "Input",
        "Affine",
        "LIF",
        "Affine",
        "LIF",
        "Output",
    ]


def test_nir_import_is_converted(nir_tools: tuple[Callable, Callable]) -> None:
    """A net exported with our neurons, imported with the host's, converted, and trained."""
    export_to_nir, import_from_nir = nir_tools
    torch.manual_seed(0)
    graph = export_to_nir(Net(RevLeaky), torch.randn(1, 5), ignore_dims=[0])
    seen = []
    for converted in (False, True):
        net = import_from_nir(graph)
        if converted:
            assert len(convert(net).swapped) == 2
        torch.manual_seed(1)
        spikes = torch.stack([net(frame)[0] for frame in draw()])
        assert spikes.any()
        (spikes * torch.randn(spikes.shape)).sum().backward()
        seen.append(Observed({"spikes": spikes}).see_gradients(net))
    assert_agree(*seen)
    assert_path([each for each in net.modules() if isinstance(each, RevLeaky)], "reversible")


def test_nir_refuses_the_coupled_node(nir_tools: tuple[Callable, Callable]) -> None:
    net = nn.Sequential(nn.Linear(5, 4), CoupledLeaky(init_hidden=True))
    with pytest.raises(TypeError, match="NIR has no node for CoupledLeaky"):
        nir_tools[0](net, torch.randn(1, 5), ignore_dims=[0])


# ----------------------------------------------------------------------------- monitors, plasticity


def test_probes() -> None:
    def program(make: MakeNeuron) -> Observed:
        net = Net(make)
        seen = {
            "output": probe.OutputMonitor(net[1], snn.Leaky),
            "input": probe.InputMonitor(net, snn.Leaky),
            "mem": probe.AttributeMonitor("mem", False, net, snn.Leaky, lambda mem: mem.clone()),
        }
        back = {
            "in": probe.GradInputMonitor(net, snn.Leaky),
            "out": probe.GradOutputMonitor(net[1], snn.Leaky),
        }
        spikes, membranes = net.record(draw())
        (
            spikes * torch.randn(spikes.shape) + membranes * torch.randn(spikes.shape)
        ).sum().backward()
        observed = Observed().see_gradients(net)
        for name, each in (seen | back).items():
            assert each.records
            to = observed.exact if name in seen else observed.gradients
            to |= {f"{name} {i}": record for i, record in enumerate(each.records)}
            each.remove_hooks()
        return observed

    agree(program, *KINDS)


def test_plasticity() -> None:
    """snnTorch's STDP reads the spikes by its monitors."""

    def program(make: MakeNeuron) -> Observed:
        fc, lif = nn.Linear(6, 4, bias=False), make(beta=0.9, threshold=0.2, init_hidden=True)
        learner = stdp_learner.STDPLearner(fc, lif, 2.0, 2.0)
        spikes = []
        for _ in range(T):
            spikes.append(lif(fc((torch.rand(BATCH, 6) > 0.5).float())).detach())
            learner.step()
        assert fc.weight.grad.any()
        return Observed({"spikes": torch.stack(spikes), "dw": fc.weight.grad.clone()})

    agree(program, *KINDS)


# ------------------------------------------------------------------------------------ losses, plots


LOSSES: dict[str, Callable[[], Callable]] = {
    "ce_rate": SF.ce_rate_loss,
    "ce_count": SF.ce_count_loss,
    "ce_count, population": lambda: SF.ce_count_loss(population_code=True, num_classes=2),
    "mse_count": lambda: SF.mse_count_loss(correct_rate=0.8, incorrect_rate=0.2),
    "ce_max_membrane": SF.ce_max_membrane_loss,
    "mse_membrane": lambda: SF.mse_membrane_loss(on_target=1.2, off_target=0.2),
    "mse_temporal": lambda: SF.mse_temporal_loss(on_target=1, off_target=4),
    "ce_temporal": SF.ce_temporal_loss,
    "l1_rate_sparsity": SF.l1_rate_sparsity,
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    def program(make: MakeNeuron) -> Observed:
        net = Net(make, spike_grad=surrogate.atan())
        spikes, membranes = net.record(draw())
        recorded = membranes if "membrane" in name else spikes
        targets = torch.arange(BATCH) % 2
        loss = LOSSES[name]()(*((recorded,) if name == "l1_rate_sparsity" else (recorded, targets)))
        loss.backward()
        accuracies = SF.accuracy_rate(spikes, targets), SF.accuracy_temporal(spikes, targets)
        return Observed({"loss": loss, "accuracies": torch.tensor(accuracies)}).see_gradients(net)

    agree(program, *KINDS)


def test_plots(tmp_path: Path) -> None:
    """Spikes and membranes are drawn as they come out of a training step."""
    import matplotlib.pyplot as plt
    from snntorch import spikeplot

    def program(make: MakeNeuron) -> Observed:
        spikes, membranes = Net(make).record(draw())
        assert spikes.any()
        (spikes.sum() + membranes.sum()).backward()
        drawn, one = {}, spikes[:, 0].detach()
        figure, axes = plt.subplots(figsize=(1, 1))
        drawn["raster"] = spikeplot.raster(one, axes).get_offsets()
        axes.clear()
        spikeplot.animator(one.view(T, 2, 2), figure, axes).save(
            tmp_path / "spikes.gif", writer="pillow"
        )
        drawn["animator"] = np.fromfile(tmp_path / "spikes.gif", np.uint8)
        plt.close(figure)
        figure = plt.figure()
        spikeplot.traces(membranes[:, 0], spk=spikes[:, 0], dim=(2, 2))
        drawn["traces"] = [axes.lines[0].get_ydata() for axes in figure.axes]
        plt.close(figure)
        return Observed(
            {name: torch.from_numpy(np.array(points)) for name, points in drawn.items()}
        )

    agree(program, *KINDS)


# ------------------------------------------------------------------------- modules and the register


def test_what_a_net_shows_of_itself() -> None:
    shown = []
    for kind in KINDS:
        net, visited = Net(kind, learn_beta=True), []
        net.apply(lambda module, visited=visited: visited.append(type(module).__name__))
        net.record(draw())
        state = {name: (each.shape, each.dtype) for name, each in net.double().state_dict().items()}
        shown.append(str((repr(net), visited, net[1].mem.dtype, state, net[1].extra_repr())))
    assert shown[1].replace("RevLeaky", "Leaky") == shown[0]


def test_the_hosts_register_holds_each_neuron_once_and_nothing_else() -> None:
    """snnTorch never forgets a neuron: tools that try one, copies, and swaps must leave nothing in
    there."""
    known = snn.SpikingNeuron.instances
    before = len(known)
    net = Net(snn.Leaky)
    assert len(known) == before + 2
    for _ in range(2):
        convert(net)
        net.record(draw().requires_grad_())[0].sum().backward()
        explain(net)
        restore(net)
    convert(net)
    utils.reset(net)
    copy.deepcopy(net)
    check_reversible(net[1], shape=(3, 8))
    assert known[before:] == [net[1], net[3]]

"""Every neuron class of both hosts: the documented table has a row for each, and those that have no
single time step, or modules inside, train as the host's do."""

from __future__ import annotations

import copy
import re
import runpy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import snntorch
import torch
import torch.nn as nn
from collector import no_garbage_collector
from compare import Observed, agree, assert_agree
from hosts import only_pure
from spikingjelly.activation_based import base, functional, layer, neuron, surrogate
from torch import Tensor

from snn_revplugin import convert, explain, memory_report, restore, reversible
from snn_revplugin.report.memory import MemoryReport

ROOT = Path(__file__).parents[1]
pytestmark = [only_pure, pytest.mark.usefixtures("recompute_everything")]


def benchmark() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "neurons.py"))


def test_the_table_in_the_docs_has_every_class() -> None:
    """`python benchmarks/neurons.py --write docs/any-neuron.md` makes it."""
    found = benchmark()
    page = (ROOT / "docs" / "any-neuron.md").read_text()
    _, _, rest = page.partition(found["BEGIN"])
    table, _, _ = rest.partition(found["END"])
    rows = re.findall(r"^\| (\S+) \| ([^|]+) \|", table, re.M)
    named = [name for name, _ in rows if name not in ("neuron", "---")]
    assert named == list(found["cases"]())
    assert len(named) > 50
    abstract = set(found["ABSTRACT"])
    assert abstract < {name for name, _ in found["classes"]()}, "a base class is gone"


# Those whose whole call is taken, those with modules inside, and those with a forward of their own.
TRAINED = [
    "PSN",
    "MaskedPSN",
    "SlidingPSN",
    "GatedLIFNode",
    "DSRIFNode",
    "FlexSN",
    "FewSpikeNode",
    "MPBNLIFNode",
    "NoisyCUBALIFNode",
    "NoisyILCCUBALIFNode",
    "LinearRecurrentContainer",
    "ElementWiseRecurrentContainer",
    "snntorch.DeltaLeaky",
    "snntorch.StateLeaky",
    "snntorch.LinearLeaky",
    "snntorch.LeakyParallel",
    "snntorch.AssociativeLeaky",
]


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_as_the_hosts(name: str) -> None:
    found = benchmark()
    case = found["cases"]()[name]
    host, ours, report = found["pair"](case)
    assert {"neuron1", "neuron2"} <= set(report.by_own_step)
    seen = []
    for net in (host, ours):
        found["step_of"](net, case)()
        buffers = {n: each for n, each in net.named_buffers() if not each.requires_grad}
        seen.append(Observed(buffers).see_gradients(net))
    assert_agree(*seen)
    assert found["path_of"](ours, report) in ("own step", "own call")
    restore(ours)
    assert all(type(a) is type(b) for a, b in zip(host.modules(), ours.modules(), strict=True))


def sequence_net(options: dict[str, Any], kind_mode: str = "m") -> Callable[..., Observed]:
    """conv - neurons - conv - neurons on a sequence, trained in two parts without a reset."""

    def program(make: Callable[..., nn.Module]) -> Observed:
        np.random.seed(0)  # from which GatedLIFNode has its parameters
        net = nn.Sequential(
            layer.Conv2d(2, 4, 3, padding=1),
            make(**options),
            layer.Conv2d(4, 4, 3, padding=1),
            make(**options),
        )
        functional.set_step_mode(net, kind_mode)
        x = (torch.randn(2, 6, 3, 2, 5, 5) * 3).requires_grad_()
        first = net(x[0])
        functional.detach_net(net[:2])  # the states of the other layer go on with their graph
        second = net(x[1])
        (
            first.sum() + (second * torch.linspace(0, 1, second.numel()).view_as(second)).sum()
        ).backward()
        memories = {
            f"{i}.{name}": value
            for i in (1, 3)
            for name, value in getattr(net[i], "_memories", {}).items()
            if isinstance(value, Tensor)
        }
        return Observed({"first": first, "second": second, **memories}).see_gradients(net, x=x)

    return program


@pytest.mark.parametrize("kind", [neuron.GatedLIFNode, neuron.LIAFNode, neuron.MPBNLIFNode])
def test_a_whole_call_goes_on_from_the_states_of_the_last(kind: type[nn.Module]) -> None:
    options = {
        neuron.GatedLIFNode: {"T": 6},
        neuron.LIAFNode: {"act": nn.ReLU(), "threshold_related": False},
        neuron.MPBNLIFNode: {"out_channels": 4},
    }[kind]
    agree(sequence_net(options), kind, reversible(kind))


def test_a_whole_call_is_differentiated_twice_and_again() -> None:
    """A graph that is retained, a gradient that is differentiated again, a float64 net."""

    def program(make: Callable[..., nn.Module]) -> Observed:
        node, x = make(T=6).double(), torch.randn(6, 4, 5, dtype=torch.float64).requires_grad_()
        out = node(x * 2)
        out[2].sum().backward(retain_graph=True)
        out[5].sum().backward(retain_graph=True)
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return Observed({"out": out}).see_gradients(node, x=x)

    agree(program, neuron.PSN, reversible(neuron.PSN))


def test_a_whole_call_keeps_bits_and_takes_its_rows_one_part_at_a_time() -> None:
    def run(ours: bool) -> MemoryReport:
        torch.manual_seed(0)
        net = nn.Sequential(
            layer.Conv2d(2, 8, 3, padding=1), neuron.PSN(16), layer.Conv2d(8, 8, 3), neuron.PSN(16)
        )
        functional.set_step_mode(net, "m")
        if ours:
            convert(net)
        x = torch.randn(16, 16, 2, 16, 16)
        net(x).sum().backward()  # the first call is tried
        return memory_report(lambda: net(x).mean().backward())

    host, ours = run(False), run(True)
    assert host.retained / ours.retained > 15
    assert host.peak / ours.peak > 2.3


@pytest.mark.parametrize("backward", [True, False])
def test_memory_returns_without_the_garbage_collector(backward: bool) -> None:
    net = nn.Sequential(layer.Conv2d(2, 4, 3, step_mode="m"), neuron.PSN(5))
    convert(net)
    with no_garbage_collector():
        out = net(torch.randn(5, 2, 2, 6, 6))
        held = weakref.ref(out.grad_fn.call)
        if backward:
            out.sum().backward()
        del out
        assert held() is None


class Block(nn.Module):
    """A net around a recurrent container, whose inner neuron has equations of its own."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.fc = layer.Linear(5, 6, step_mode=mode)
        inner = nn.Sequential(neuron.LIFNode(), nn.Linear(6, 4), neuron.IFNode())
        self.cell = layer.LinearRecurrentContainer(inner, 6, 4, step_mode=mode)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return self.cell(x) if self.cell.step_mode == "m" else torch.stack([*map(self.cell, x)])


@pytest.mark.parametrize("mode", ["s", "m"])
def test_a_container_holds_the_states_of_the_neurons_inside(mode: str) -> None:
    host = Block(mode)
    ours = copy.deepcopy(host)
    report = convert(ours)
    assert report.by_own_step == ["cell"] and len(report.swapped) == 3
    seen, x = [], torch.rand(14, 3, 5, requires_grad=True)
    for net in (host, ours):
        out = net(x * 4)
        out.sum().backward()
        states = {
            f"{name}.{n}": value
            for name, each in net.named_modules()
            for n, value in getattr(each, "_memories", {}).items()
        }
        seen.append(Observed({"out": out, **states}).see_gradients(net))
        functional.reset_net(net)
    assert_agree(*seen)
    row = next(each for each in explain(ours).rows if each.name == "cell")
    assert not row.reasons


def test_a_delta_neuron_gives_its_states_out() -> None:
    def program(make: Callable[..., nn.Module]) -> Observed:
        node, state, total = make(0.4, beta=0.8, learn_beta=True), (None, None), 0.0
        fc = nn.Linear(4, 6)
        for frame in torch.rand(15, 3, 4) * 4:
            spikes, state = node(fc(frame), state)
            total = total + spikes.sum() + 0.1 * state[1].sum()
        (total + state[0].sum()).backward()
        return Observed({"mem": state[0], "prev": state[1]}).see_gradients(node, fc)

    agree(program, snntorch.DeltaLeaky, reversible(snntorch.DeltaLeaky))


def test_what_a_call_gives_out_beside_its_spikes_has_the_hosts_gradient() -> None:
    def program(make: Callable[..., nn.Module]) -> Observed:
        node, x = make(0.8, 6, learn_beta=True), torch.rand(9, 3, 6, requires_grad=True)
        spikes, mem = node(x * 2)
        total = spikes.sum() + mem.square().mean() + node.spk[3].sum()
        assert node.spk is spikes
        del spikes  # from now on the attribute stands for bits
        (total + (node.spk * torch.linspace(0, 1, 6)).sum()).backward()
        return Observed({"spikes": node.spk, "mem": mem}).see_gradients(node, x=x)

    (node,) = agree(program, snntorch.StateLeaky, reversible(snntorch.StateLeaky))
    node(torch.rand(2, 3, 6, requires_grad=True))[0].mul_(2)
    with pytest.raises(RuntimeError, match=r"'spk': the outputs .* were written into in place"):
        _ = node.spk
    with pytest.raises(AttributeError, match="spikes"):
        _ = node.spikes


class ScaledByCount(torch.autograd.Function):
    """The gradient of a quantiser with a learned step size: scaled by the number of elements."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / gradient.numel() ** 0.5


class OverTime(base.MemoryModule):
    """A call on a sequence that mixes time steps, and what else it is told to."""

    def __init__(self, also: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step_mode, self.also = "m", also
        self.bias = nn.Parameter(torch.tensor(0.3))

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        h = self.also(x_seq.cumsum(0)) - self.bias
        return surrogate.atan.apply(h, 2.0)


@pytest.mark.parametrize(
    ("also", "rows_lie_along"),
    [
        (lambda h: h, 1),
        (lambda h: h / h.abs().amax(1, keepdim=True), 2),
        (lambda h: h / h.abs().amax(), None),
        (ScaledByCount.apply, None),
    ],
    ids=["mixes no rows", "mixes the batch", "mixes all", "mixes all, in the gradient alone"],
)
def test_rows_that_a_call_mixes_are_taken_together(
    also: Callable[[Tensor], Tensor], rows_lie_along: int | None
) -> None:
    def program(make: Callable[..., nn.Module]) -> Observed:
        node, fc = make(also), nn.Linear(5, 128)
        out = node(fc(torch.randn(30, 16, 5)))
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        return Observed({"out": out}).see_gradients(node, fc)

    (node,) = agree(program, OverTime, reversible(OverTime))
    rows = node.record.latest_transition.traits.rows
    assert (rows and rows.inputs[0]) == rows_lie_along
    assert rows is None or len(list(rows.parts(torch.empty(30, 16, 128)))) > 1


def test_few_different_outputs_are_bits() -> None:
    """Spikes as high as a learned threshold."""

    def program(make: Callable[..., nn.Module]) -> Observed:
        node, fc = make(T=9, v_threshold=0.7), nn.Linear(5, 16)
        out = nn.functional.linear(node(fc(torch.randn(9, 4, 5))), fc.weight.t())
        out.square().sum().backward()
        return Observed({"out": out}).see_gradients(node, fc)

    (node,) = agree(program, neuron.DSRIFNode, reversible(neuron.DSRIFNode))
    statistics = node.record.statistics
    assert statistics.spike_bytes == 9 * 4 * 16 // 8 + 2 * 4  # and the table


class LeavesPotential(neuron.SimpleBaseNode):
    """A user may read ``charged`` in a loss: it has a gradient, and it is no state."""

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = 0.5 * self.v + x
        self.charged = self.v * 1.0


def test_a_tensor_with_a_gradient_that_a_step_leaves_takes_the_hosts_path() -> None:
    def program(make: Callable[..., nn.Module]) -> Observed:
        node, total, fc = make(), 0.0, nn.Linear(4, 5)
        for frame in torch.rand(4, 3, 4) * 3:
            total = total + node(fc(frame)).sum() + node.charged.sum()
        total.backward()
        return Observed({"v": node.v}).see_gradients(fc)

    reason = "leaves 'charged', which has a gradient"
    agree(program, LeavesPotential, reversible(LeavesPotential), path="host", reason=reason)


def test_a_surrogate_that_is_replaced_between_two_calls() -> None:
    def program(make: Callable[..., nn.Module]) -> Observed:
        node, x = make(), torch.rand(2, 3, 5, requires_grad=True)
        first = node(x[0] * 3)
        node.surrogate_function = surrogate.ATan(7.0)
        (first.sum() + node(x[1] * 3).sum()).backward()
        return Observed({"v": node.v}, {"x": x.grad})

    agree(program, neuron.QIFNode, reversible(neuron.QIFNode))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: neuron.SlidingPSN(2), "a state is neither a tensor nor a number"),
        (neuron.NonSpikingIFNode, "its step returns an object of list as its outputs"),
        (lambda: neuron.ILCIFNode(2, 3), "its step writes into its input"),
    ],
)
def test_what_stays_on_the_hosts_path(make: Callable[[], nn.Module], reason: str) -> None:
    node = make()
    convert(node)
    x = nn.Linear(6, 6)(torch.rand(5, 3, 6))
    node(x)
    assert list(explain(node).rows[0].reasons) == [reason]


def test_an_online_learner_is_left_with_the_reason() -> None:
    assert "learns online" in convert(neuron.OTTTLIFNode()).left[""]

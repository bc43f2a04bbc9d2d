"""RevSimpleIFNode and RevSimpleLIFNode against SpikingJelly 2's SimpleIFNode and SimpleLIFNode."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn as nn
from compare import MakeNeuron, Observed, agree, assert_alive, assert_close
from nets import BATCH
from pairs import every_pair
from spikingjelly.activation_based import base, functional, neuron, surrogate
from torch import Tensor

import snn_revplugin
from snn_revplugin.adapters.spikingjelly import RevSimpleIFNode, RevSimpleLIFNode

T = 12
IF, LIF = (neuron.SimpleIFNode, RevSimpleIFNode), (neuron.SimpleLIFNode, RevSimpleLIFNode)
LEAKS: dict[str, dict[str, Any]] = {
    "IF": {},
    "LIF": {"tau": 1.5, "decay_input": True, "v_threshold": 0.5},
    "LIF, whole input": {"tau": 2.5, "decay_input": False},
}
SURROGATES = {
    "ATan": surrogate.ATan(),
    "Sigmoid": surrogate.Sigmoid(),
    "SoftSign": surrogate.SoftSign(),
}


def train(
    make: MakeNeuron, options: dict[str, Any], start: Any = None, dtype: torch.dtype = torch.float32
) -> Observed:
    """linear - neurons - linear - neurons; gradients at spikes and potentials of single steps too.

    Args:
        start: the potential of the first layer.
    """
    net = nn.Sequential(nn.Linear(5, 6), make(**options), nn.Linear(6, 4), make(**options))
    for layer in (net[0], net[2]):
        nn.init.normal_(layer.weight)
    net.to(dtype)
    if start is not None:
        net[1].v = start
    x = (torch.rand(T, BATCH, 5) * 3).to(dtype).requires_grad_()
    middle = []
    if net[1].step_mode == "m":
        out = net(x)
    else:
        outputs = []
        for frame in x:
            spikes = net[1](net[0](frame))
            middle += [spikes, net[1].v]
            outputs.append(net[3](net[2](spikes)))
        out = torch.stack(outputs)
    for each in middle:
        each.retain_grad()
    assert_alive(out.detach())
    ((out * torch.randn(out.shape)).sum() + net[1].v.square().sum() + net[3].v.sum()).backward()
    observed = Observed({"out": out, "v1": net[1].v, "v3": net[3].v}).see_gradients(net, x=x)
    observed.gradients |= {f"at {i}": each.grad for i, each in enumerate(middle)}
    if isinstance(start, Tensor):
        observed.gradients["start"] = start.grad
    return observed


ROWS = [
    row
    for row in product(
        LEAKS, "sm", (None, 0.0, -0.2), (False, True), SURROGATES, (torch.float32, torch.float64)
    )
    if row[0] == "IF" or row[2] is not None  # the host's LIF takes no soft reset
]


@pytest.mark.parametrize(
    ("leak", "mode", "v_reset", "detach", "name", "dtype"), every_pair(ROWS, together=3)
)
def test_every_three_options_together(
    leak: str, mode: str, v_reset: float | None, detach: bool, name: str, dtype: torch.dtype
) -> None:
    options = {
        "v_reset": v_reset,
        "detach_reset": detach,
        "surrogate_function": SURROGATES[name],
        "step_mode": mode,
        **LEAKS[leak],
    }
    agree(lambda make: train(make, options, dtype=dtype), *(IF if leak == "IF" else LIF))


@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize("leak", LEAKS)
def test_a_potential_to_start_from(leak: str, mode: str) -> None:
    def program(make: MakeNeuron) -> Observed:
        start = torch.rand(BATCH, 6, requires_grad=True)
        return train(make, LEAKS[leak] | {"step_mode": mode}, start)

    agree(program, *(IF if leak == "IF" else LIF))


@pytest.mark.parametrize("start", [0.4, "row"])
@pytest.mark.parametrize("mode", ["s", "m"])
def test_other_potentials_to_start_from_take_the_hosts_path(mode: str, start: Any) -> None:
    def program(make: MakeNeuron) -> Observed:
        given = torch.rand(1, 6) if start == "row" else start
        return train(make, LEAKS["LIF"] | {"v_reset": 0.1, "step_mode": mode}, given)

    agree(program, *LIF, path="any", reason=None)


def test_the_equations_have_no_soft_reset_with_a_leak() -> None:
    for kind in LIF:
        node = kind(2.0, True, v_reset=None)
        with pytest.raises(TypeError):
            node(torch.ones(2, 3, requires_grad=True))


def test_gradients_that_are_differentiated_again() -> None:
    seen = []
    for kind in LIF:
        torch.manual_seed(0)
        x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
        node, weigh = kind(2.0, True, surrogate_function=surrogate.ATan()), nn.Linear(4, 6).double()
        total = sum(node(weigh(frame) * 2).mul(node.v).sum() for frame in x)
        (grad,) = torch.autograd.grad(total, x, create_graph=True)
        grad.square().sum().backward()
        seen.append((grad, weigh.weight.grad))
    assert_close("first", seen[0][0], seen[1][0])
    assert_close("second", seen[0][1], seen[1][1], 1e-9)


class Faster(neuron.SimpleLIFNode):
    """A user's neuron with a charge of its own."""

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + (x - self.v) / self.tau * 1.5


def test_convert_restore_and_functional_forward(recompute_everything: None) -> None:
    net = nn.Sequential(
        nn.Linear(5, 6),
        neuron.SimpleIFNode(),
        neuron.SimpleLIFNode(2.0, True),
        Faster(2.0, True),
    )
    keys = list(net.state_dict())
    report = snn_revplugin.convert(net)
    assert report.by_own_step == ["3"] and not report.left
    assert [type(net[1]), type(net[2])] == [RevSimpleIFNode, RevSimpleLIFNode]
    x = torch.rand(BATCH, 5) * 3
    states = (torch.zeros(BATCH, 6),)
    pure = base.to_functional_forward(net[2])
    for each in (net[1], net[2]):
        assert list(each._memories) == ["v"]
    out = net(x)
    functional.detach_net(net)
    functional.reset_net(net)
    assert net[1].v == 0.0 and list(net.state_dict()) == keys
    (spikes,), _ = pure((torch.ones(BATCH, 6, requires_grad=True) * 3,), states)
    assert spikes.shape == out.shape
    rows = snn_revplugin.explain(net).rows
    assert all("1 bit per spike" in str(row) and not row.reasons for row in rows[:2])
    snn_revplugin.restore(net)
    assert type(net[1]) is neuron.SimpleIFNode
    assert repr(RevSimpleIFNode()) == repr(neuron.SimpleIFNode()).replace("Simple", "RevSimple")


@pytest.mark.filterwarnings("ignore")
def test_the_compiler_compiles_the_hosts_path() -> None:
    node = RevSimpleIFNode(step_mode="m")
    compiled = torch.compile(node, backend="eager", fullgraph=True)
    x = torch.randn(3, 2, 4, requires_grad=True)
    host = neuron.SimpleIFNode(step_mode="m")
    assert torch.equal(compiled(x), host(x))
    assert "no operator" in str(snn_revplugin.explain(node))

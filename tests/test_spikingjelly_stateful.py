"""What is peculiar to SpikingJelly 0.0.0.0.14: backends, eval(), states of any shape, spikes that
reset the potential."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from compare import MakeNeuron, Observed, agree
from spikingjelly.activation_based import functional, layer, neuron, surrogate

from snn_revplugin import convert
from snn_revplugin.adapters.spikingjelly import (
    CoupledLIFNode,
    RevIFNode,
    RevLIFNode,
    RevParametricLIFNode,
)

NODES = {
    "IF": (neuron.IFNode, RevIFNode),
    "LIF": (neuron.LIFNode, RevLIFNode),
    "PLIF": (neuron.ParametricLIFNode, RevParametricLIFNode),
}
pytestmark = pytest.mark.usefixtures("recompute_everything")
EVERY_NODE = pytest.mark.parametrize("node", NODES)
EVERY_MODE = pytest.mark.parametrize("mode", ["s", "m"])


def _run(lif: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return lif(x) if lif.step_mode == "m" else torch.stack([lif(frame) for frame in x])


@EVERY_NODE
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("v_reset", [0.0, -0.2, None])
def test_the_gradient_at_the_spikes_has_what_comes_through_the_reset(
    v_reset: float | None, detach_reset: bool, node: str
) -> None:
    def program(make: MakeNeuron) -> Observed:
        lif = make(v_reset=v_reset, detach_reset=detach_reset, v_threshold=0.8)
        x, given, observed = torch.randn(12, 3, 5, requires_grad=True), [], Observed()
        for t, frame in enumerate(x * 2):
            given.append(lif(frame))
            if t % 3 == 1:
                given[-1].register_hook(lambda grad: grad * 0.5)
            given[-1].retain_grad()
        (torch.stack(given) * torch.randn(12, 3, 5)).sum().backward()
        observed.exact = {"spikes": torch.stack(given), "v": lif.v}
        observed.gradients = {f"spikes {t}": each.grad for t, each in enumerate(given)}
        return observed.see_gradients(lif, x=x)

    agree(program, *NODES[node])


@EVERY_NODE
@EVERY_MODE
def test_eval_is_the_hosts(mode: str, node: str) -> None:
    """The scripted arithmetic of IF and LIF in eval() gives spikes without a gradient; potentials
    have one."""

    def program(make: MakeNeuron) -> Observed:
        net = nn.Sequential(
            layer.Linear(4, 6, step_mode=mode), make(step_mode=mode, v_threshold=0.4)
        )
        net.eval()
        x = torch.rand(5, 3, 4, requires_grad=True)
        spikes = _run(net[1], net[0](x * 2))
        (spikes.sum() + net[1].v.square().sum()).backward()
        return Observed({"spikes": spikes, "v": net[1].v}).see_gradients(net, x=x)

    path, reason = ("reversible", None) if node == "PLIF" else ("host", "eval()")
    agree(program, *NODES[node], path=path, reason=reason)


@EVERY_NODE
@EVERY_MODE
@pytest.mark.parametrize(
    ("state", "reason"),
    [(torch.rand(1, 5), "shape"), (torch.rand(3, 5, dtype=torch.float64), "dtype")],
    ids=["shape", "dtype"],
)
def test_a_state_is_taken_as_it_is(state: torch.Tensor, reason: str, mode: str, node: str) -> None:
    """It is broadcast and promoted, not made anew: the first step is the host's, and those after it
    as they come."""

    def program(make: MakeNeuron) -> Observed:
        lif = make(step_mode=mode, v_threshold=0.8)
        lif.v = state
        x = torch.randn(4, 3, 5, requires_grad=True)
        spikes = _run(lif, x * 2)
        (spikes.sum() + lif.v.sum()).backward()
        return Observed({"spikes": spikes, "v": lif.v}).see_gradients(lif, x=x)

    agree(program, *NODES[node], path="both" if reason == "shape" else "host", reason=reason)


@EVERY_NODE
def test_backends_are_the_hosts(node: str) -> None:
    """'torch' is taken, what is not installed or unknown is refused in the host's words, and so it
    stays with 'torch'."""
    host, ours = (nn.Sequential(kind(step_mode="m", backend="torch")) for kind in NODES[node])
    for backend in ("torch", "lava"):
        for net in (host, ours):
            functional.set_backend(net, backend, instance=NODES[node][0])
            assert net[0].backend == "torch"
    assert ours[0].supported_backends == host[0].supported_backends
    for backend in ("cupy", "abacus"):
        errors = []
        for net in (host, ours):
            with pytest.raises((ImportError, NotImplementedError)) as caught:
                net[0].backend = backend
            errors.append((caught.type, str(caught.value).replace("Rev", "")))
        assert errors[0] == errors[1]


@EVERY_NODE
def test_another_backend_takes_the_hosts_path(node: str) -> None:
    """A net saved where CuPy was installed has it set; without CuPy the host fails in its own way,
    and ours in the same."""
    errors = []
    for kind in NODES[node]:
        lif = kind(step_mode="m")
        lif._backend = "cupy"
        with pytest.raises(Exception) as caught:
            lif(torch.rand(4, 2, 3, requires_grad=True))
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]
    assert any("backend='cupy'" in each for each in lif.record.statistics.reasons)


def test_arguments_by_position() -> None:
    """``backend`` stands before ``store_v_seq``, and LIF's tau and decay_input before all."""
    for kinds, arguments in (
        (NODES["IF"], (0.7, None, surrogate.ATan(), True, "m", "torch", True)),
        (NODES["LIF"], (1.5, False, 0.7, None, surrogate.ATan(), True, "m", "torch", True)),
        (NODES["PLIF"], (1.5, False, 0.7, None, surrogate.ATan(), True, "m", "torch", True)),
    ):
        host, ours = (kind(*arguments) for kind in kinds)
        assert repr(ours) == repr(host).replace(type(host).__name__, type(ours).__name__)
        assert ours.store_v_seq and ours.detach_reset


def test_a_coupled_node_keeps_its_state() -> None:
    """One call, and one call a time step, with and without the potentials of all steps."""
    x, seen = torch.randn(5, 2, 4), []
    for mode, store in (("s", False), ("m", False), ("m", True)):
        node = CoupledLIFNode(step_mode=mode, store_v_seq=store)
        out = _run(node, x.clone().requires_grad_())
        seen.append((out, node.v))
        if store:
            assert torch.equal(node.v_seq[-1], node.v)
        functional.reset_net(node)
        assert node.v == 0.0
    for out, v in seen[1:]:
        assert torch.equal(out, seen[0][0]) and torch.equal(v, seen[0][1])


def test_neurons_with_another_charge_go_by_their_own_step() -> None:
    class Hasty(neuron.LIFNode):
        def neuronal_charge(self, x: torch.Tensor) -> None:
            self.v = self.v + 2 * x

    net = nn.Sequential(neuron.LIFNode(), Hasty(), neuron.QIFNode())
    report = convert(net, generic=False)
    assert list(report.swapped) == ["0"] and set(report.left) == {"1", "2"}
    assert "neuronal_charge" in report.left["1"]
    assert convert(net).by_own_step == ["1", "2"]

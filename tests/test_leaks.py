"""Memory after a training step returns to its start, without the garbage collector, whatever became
of the step."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from collector import after_launches, no_garbage_collector
from either_host import potential_of
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor

from snn_revplugin.adapters.snntorch import CoupledLeaky, RevLeaky, RevSynaptic
from snn_revplugin.adapters.spikingjelly import (
    CoupledLIFNode,
    RevIFNode,
    RevLIFNode,
    RevParametricLIFNode,
)
from snn_revplugin.report.memory import LiveBytes

pytestmark = pytest.mark.usefixtures("recompute_everything")

T = 6


class Fault(Exception):
    """Raised in the middle of something."""


KINDS: dict[str, Callable[[], nn.Module]] = {
    "Leaky": lambda: RevLeaky(beta=0.9, init_hidden=True, learn_beta=True, learn_threshold=True),
    "Leaky, zero": lambda: RevLeaky(beta=0.9, init_hidden=True, reset_mechanism="zero"),
    "Leaky, graded, at once": lambda: RevLeaky(
        beta=0.9, init_hidden=True, graded_spikes_factor=0.7, reset_delay=False
    ),
    "Leaky, user's surrogate": lambda: RevLeaky(
        beta=0.9,
        init_hidden=True,
        spike_grad=snn_surrogate.custom_surrogate(lambda z, grad, spikes: grad / (1 + z * z)),
    ),
    "Leaky, host's path": lambda: RevLeaky(beta=0.9, init_hidden=True, reversible=False),
    "Synaptic": lambda: RevSynaptic(0.8, 0.9, init_hidden=True, learn_alpha=True),
    "Synaptic, zero, at once": lambda: RevSynaptic(
        0.8, 0.9, init_hidden=True, reset_mechanism="zero", reset_delay=False
    ),
    "IF s": lambda: RevIFNode(v_reset=None),
    "LIF s": lambda: RevLIFNode(detach_reset=True, surrogate_function=surrogate.ATan()),
    "LIF m": lambda: RevLIFNode(step_mode="m", store_v_seq=True),
    "PLIF m": lambda: RevParametricLIFNode(step_mode="m"),
    "coupled Leaky": lambda: CoupledLeaky(init_hidden=True),
    "coupled LIF s": lambda: CoupledLIFNode(v_reset=None),
    "coupled LIF m": lambda: CoupledLIFNode(step_mode="m"),
}


class Net(nn.Module):
    """Convolution, batch norm, pooling, a residual sum, dropout and a linear layer between three
    layers of neurons."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm, self.lif1 = nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4), make()
        self.conv2, self.pool, self.lif2 = nn.Conv1d(4, 4, 3, padding=1), nn.MaxPool1d(2), make()
        self.drop, self.fc, self.lif3 = nn.Dropout(0.2), nn.Linear(16, 6), make()
        self.mode = getattr(self.lif1, "step_mode", "s")
        self.fault: Callable[[], None] = lambda: None

    def apart(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if self.mode == "m" else layer(x)

    def step(self, x: Tensor) -> Tensor:
        s1 = self.lif1(self.apart(lambda x: self.norm(self.conv1(x)), x))
        s2 = self.lif2(self.apart(lambda x: self.pool(self.conv2(x) + x), s1))
        self.fault()
        return self.lif3(self.fc(self.drop(s2.flatten(-2))))

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x) if self.mode == "m" else torch.stack([self.step(frame) for frame in x])

    def neurons(self) -> list[nn.Module]:
        return [self.lif1, self.lif2, self.lif3]

    def clear(self) -> None:
        if isinstance(self.lif1, snn.SpikingNeuron):
            for each in self.neurons():
                for name in {"syn", "mem"} & {*each._buffers}:
                    setattr(each, name, torch.zeros(0))
                each.reset = None
        else:
            functional.reset_net(self)


def whole_step(net: Net, x: Tensor) -> None:
    net(x).sum().backward()


def no_backward(net: Net, x: Tensor) -> None:
    net(x)


def inside_hooks(net: Net, x: Tensor) -> None:
    # Copies: a node that saves its own output, as one of snnTorch's surrogates does, would hold
    # itself by way of the hooks.
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        y = net(x)
    y.sum().backward()


def loss_on_one_step(net: Net, x: Tensor) -> None:
    net(x)[T // 2].sum().backward()


def retained_graph(net: Net, x: Tensor) -> None:
    y = net(x)
    y.sum().backward(retain_graph=True)
    y[3].sum().backward(retain_graph=True)


def chosen_inputs(net: Net, x: Tensor) -> None:
    torch.autograd.grad(net(x).sum(), [net.conv2.weight])


def membranes_kept_by_the_user(net: Net, x: Tensor) -> None:
    y = net(x)
    kept = [potential_of(each) for each in net.neurons()]
    (y.sum() + sum(each.sum() for each in kept)).backward()


def two_sequences_with_the_state_detached(net: Net, x: Tensor) -> None:
    for _ in range(2):
        net(x).sum().backward()
        if isinstance(net.lif1, snn.SpikingNeuron):
            type(net.lif1).detach_hidden()
        else:
            functional.detach_net(net)


def exception_in_forward(net: Net, x: Tensor) -> None:
    steps = []

    def fault() -> None:
        steps.append(1)
        if len(steps) == (1 if net.mode == "m" else 5):
            raise Fault

    net.fault = fault
    try:
        net(x)
    except Fault:
        pass
    else:
        raise AssertionError("no fault was met")
    finally:
        net.fault = lambda: None


def exception_in_backward(net: Net, x: Tensor) -> None:
    def fault(grad: Tensor) -> None:
        raise Fault

    handle = net.conv1.weight.register_hook(fault)
    try:
        net(x).sum().backward()
    except Fault:
        pass
    else:
        raise AssertionError("no fault was met")
    finally:
        handle.remove()


def exception_half_way_down(net: Net, x: Tensor) -> None:
    def fault(grad: Tensor) -> None:
        raise Fault

    spikes = []
    handle = net.lif2.register_forward_hook(lambda module, args, output: spikes.append(output))
    y = net(x)
    handle.remove()
    spikes[len(spikes) // 2].register_hook(fault)
    try:
        y.sum().backward()
    except Fault:
        pass
    else:
        raise AssertionError("no fault was met")


STEPS = (
    whole_step,
    no_backward,
    inside_hooks,
    loss_on_one_step,
    retained_graph,
    chosen_inputs,
    membranes_kept_by_the_user,
    two_sequences_with_the_state_detached,
    exception_in_forward,
    exception_in_backward,
    exception_half_way_down,
)


@pytest.fixture(autouse=True, scope="module")
def _nothing_there_already() -> Iterator[None]:
    """What was there before these tests need not be looked at, nor what a first step imports."""
    with LiveBytes():
        for make in KINDS.values():
            whole_step(Net(make), torch.randn(T, 3, 2, 8))
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def no_collector() -> Iterator[None]:
    with no_garbage_collector():
        yield


def objects_of_ours() -> Counter[str]:
    modules = [module for name, module in sys.modules.items() if name.startswith("snn_revplugin")]
    ours = {each for module in modules for each in vars(module).values() if isinstance(each, type)}
    ours = {each for each in ours if each.__module__.startswith("snn_revplugin")}
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in ours)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@pytest.mark.usefixtures("no_collector")
def test_memory_returns_to_its_start(step: Callable[[Net, Tensor], None], kind: str) -> None:
    net = Net(KINDS[kind])
    with LiveBytes() as live:
        readings = []
        for _ in range(3):
            step(net, torch.randn(T, 3, 2, 8, requires_grad=True))
            net.zero_grad()
            net.clear()
            after_launches()
            readings.append((live.now(), objects_of_ours()))
    # The first step leaves behind what is made once: equations, ledgers, the answer about a
    # surrogate.
    assert readings[2] == readings[1]
    assert readings[2][0] <= readings[0][0]


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "Leaky": lambda: snn.Leaky(beta=0.9, init_hidden=True, learn_beta=True, learn_threshold=True),
    "Leaky, zero": lambda: snn.Leaky(beta=0.9, init_hidden=True, reset_mechanism="zero"),
    "Synaptic": lambda: snn.Synaptic(0.8, 0.9, init_hidden=True, learn_alpha=True),
    "IF s": lambda: neuron.IFNode(v_reset=None),
    "LIF s": lambda: neuron.LIFNode(detach_reset=True, surrogate_function=surrogate.ATan()),
    "LIF m": lambda: neuron.LIFNode(step_mode="m", store_v_seq=True),
    "PLIF m": lambda: neuron.ParametricLIFNode(step_mode="m"),
    "coupled Leaky": lambda: CoupledLeaky(init_hidden=True, reversible=False),
    "coupled LIF s": lambda: CoupledLIFNode(v_reset=None, reversible=False),
    "coupled LIF m": lambda: CoupledLIFNode(step_mode="m", reversible=False),
}


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.usefixtures("no_collector")
def test_the_state_that_is_left_after_backward_holds_no_more_than_the_hosts(kind: str) -> None:
    """The last membrane hangs on the graph's last node, which must not hold the sequence in
    turn."""
    left = []
    for make in (HOSTS[kind], KINDS[kind]):
        torch.manual_seed(0)
        net, x = Net(make), torch.randn(T, 3, 2, 8)
        with LiveBytes() as live:
            whole_step(net, x)
            net.zero_grad()
            after_launches()
            left.append(live.now())
    assert left[1] <= left[0]


@pytest.mark.parametrize("kind", HOSTS)
def test_less_is_held_after_forward_than_by_the_host(kind: str) -> None:
    held = []
    for make in (HOSTS[kind], KINDS[kind]):
        torch.manual_seed(0)
        net, x = Net(make), torch.randn(8 * T, 3, 2, 8)
        with LiveBytes() as live:
            y = net(x)
            after_launches()
            held.append(live.now())
            del y
    times = (
        2 if kind.startswith("coupled") else 3
    )  # a coupled neuron's outputs are no bits but numbers
    assert held[1] < held[0] / times

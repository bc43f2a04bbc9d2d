"""Neurons that run by their own step: the host's spikes, states and gradients, in less memory."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from collector import no_garbage_collector
from compare import Observed, agree, assert_agree
from hosts import only_pure
from nets import step_spike
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import base, functional, layer, neuron, surrogate
from torch import Tensor

from snn_revplugin import (
    convert,
    explain,
    memory_report,
    register_neuron,
    restore,
    reversible,
    use_settings,
)
from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.bptt.chain import link_of
from snn_revplugin.swap import table

STEPS, BATCH, WIDTH = 15, 3, 6
SHARP = snn_surrogate.fast_sigmoid(slope=5)
# A base class of neurons by their charge; in SpikingJelly 0.0.0.0.14 the only one.
SimpleBaseNode = getattr(neuron, "SimpleBaseNode", neuron.BaseNode)

pytestmark = pytest.mark.usefixtures("recompute_everything")


def own_step(kind: type[nn.Module]) -> type[nn.Module]:
    """Our class for a neuron class, by its own step even where its equations are known."""
    swap = next(each for each in table._any_swaps if issubclass(kind, each.host))
    return table.reversible_class(kind, swap)


# ----------------------------------------------------------------------------------------- snnTorch


def states_of(each: nn.Module) -> list[Tensor]:
    """The states that a snnTorch neuron holds, in the order of its arguments."""
    names = ("spk", "syn", "syn_exc", "syn_inh", "mem")
    return [each._buffers[name] for name in names if name in each._buffers]


def snntorch_loop(options: dict[str, Any], hidden: bool) -> Callable[..., Observed]:
    """linear - neurons - linear - neurons in a time loop."""

    def program(make: Callable[..., nn.Module]) -> Observed:
        below = nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH)
        for each in below:
            nn.init.normal_(each.weight)
        neurons = [make(**options, init_hidden=hidden) for _ in below]
        x = (torch.rand(STEPS, BATCH, 5) * 3).requires_grad_()
        states, seen = [each.reset_mem() for each in neurons], []
        states = [each if isinstance(each, tuple) else (each,) for each in states]
        for frame in x:
            for i, (weigh, each) in enumerate(zip(below, neurons, strict=True)):
                if hidden:
                    frame = each(weigh(frame))
                else:
                    result = each(weigh(frame), *states[i])
                    frame, states[i] = result[0], result[-len(states[i]) :]
            seen.append(torch.stack([frame, states_of(neurons[1])[-1]]))
        out = torch.stack(seen)
        (out * torch.linspace(0.5, 1, out.numel()).view_as(out)).sum().backward()
        kept = {f"state {i}": each for i, each in enumerate(states_of(neurons[0]))}
        return Observed({"out": out, **kept}).see_gradients(*below, *neurons, x=x)

    return program


SYNAPTIC = {"alpha": 0.8, "beta": 0.7, "spike_grad": SHARP}
LEARNED = {"learn_alpha": True, "learn_beta": True, "learn_threshold": True}
OF_SNNTORCH = {
    "Synaptic": (snn.Synaptic, SYNAPTIC),
    "Synaptic, learned": (snn.Synaptic, SYNAPTIC | LEARNED),
    "Synaptic, zero": (snn.Synaptic, SYNAPTIC | LEARNED | {"reset_mechanism": "zero"}),
    "Synaptic, none": (snn.Synaptic, SYNAPTIC | {"reset_mechanism": "none"}),
    "Synaptic, at once": (snn.Synaptic, SYNAPTIC | LEARNED | {"reset_delay": False}),
    "Synaptic, quantised": (
        snn.Synaptic,
        SYNAPTIC | {"state_quant": lambda v: v + (torch.round(v * 8) / 8 - v).detach()},
    ),
    "Alpha": (snn.Alpha, SYNAPTIC | {"alpha": 0.8, "beta": 0.6}),
    "Lapicque": (snn.Lapicque, {"beta": 0.8, "learn_threshold": True, "spike_grad": SHARP}),
    "RLeaky": (snn.RLeaky, {"beta": 0.8, "linear_features": WIDTH, "spike_grad": SHARP}),
    "RLeaky, one to one": (
        snn.RLeaky,
        {"beta": 0.8, "all_to_all": False, "learn_beta": True, "spike_grad": SHARP},
    ),
    "RSynaptic": (snn.RSynaptic, SYNAPTIC | LEARNED | {"linear_features": WIDTH}),
    "SLSTM": (snn.SLSTM, {"input_size": WIDTH, "hidden_size": WIDTH, "threshold": 0.1}),
}


@pytest.mark.parametrize("hidden", [False, True], ids=["passed", "init_hidden"])
@pytest.mark.parametrize("name", OF_SNNTORCH)
def test_neurons_of_snntorch(name: str, hidden: bool) -> None:
    kind, options = OF_SNNTORCH[name]
    for each in agree(snntorch_loop(options, hidden), kind, own_step(kind)):
        assert each.record.statistics.anchor_interval == 12


def test_a_convolutional_cell_of_snntorch() -> None:
    def program(make: Callable[..., nn.Module]) -> Observed:
        cell, conv = make(3, 4, 3, max_pool=2, threshold=0.1), nn.Conv2d(2, 3, 3, padding=1)
        syn, mem = cell.reset_mem()
        seen = []
        for frame in torch.randn(STEPS, BATCH, 2, 6, 6):
            spikes, syn, mem = cell(conv(frame), syn, mem)
            seen.append(spikes)
        out = torch.stack(seen)
        (out.sum() + mem.sum()).backward()
        return Observed({"out": out, "mem": mem}).see_gradients(cell, conv)

    agree(program, snn.SConv2dLSTM, own_step(snn.SConv2dLSTM))


def test_a_gradient_at_a_potential_in_mid_graph() -> None:
    def program(make: Callable[..., nn.Module]) -> Observed:
        cell = make(**SYNAPTIC)
        x = torch.rand(4, BATCH, WIDTH, requires_grad=True)
        syn, mem = cell.reset_mem()
        hooked, total = [], 0.0
        for t, frame in enumerate(x):
            spikes, syn, mem = cell(2 * frame, syn, mem)
            if t == 1:
                mem.retain_grad()
                mem.register_hook(lambda gradient: hooked.append(gradient) or 2 * gradient)
                middle = mem
            total = total + (spikes * (t + 1)).sum()
        total.backward()
        gradients = {"mem": middle.grad, "hook": hooked[0], "x": x.grad}
        return Observed(gradients=gradients)

    agree(program, snn.Synaptic, own_step(snn.Synaptic))


# ------------------------------------------------------------------------------------- SpikingJelly


def spikingjelly_net(options: dict[str, Any], mode: str) -> Callable[..., Observed]:
    """conv - norm - neurons - conv - norm - neurons."""

    def program(make: Callable[..., nn.Module]) -> Observed:
        net = nn.Sequential(
            layer.Conv2d(2, 4, 3, padding=1),
            layer.BatchNorm2d(4),
            make(**options),
            layer.Conv2d(4, 4, 3, padding=1),
            layer.BatchNorm2d(4),
            make(**options),
        )
        functional.set_step_mode(net, mode)
        x = (torch.randn(STEPS, BATCH, 2, 5, 5) * 2).requires_grad_()
        out = net(x) if mode == "m" else torch.stack([net(frame) for frame in x])
        weights = torch.linspace(0.5, 1, out.numel()).view_as(out)
        (out * weights).sum().backward()
        memories = {
            f"{i}.{name}": value
            for i in (2, 5)
            for name, value in net[i]._memories.items()
            if isinstance(value, Tensor)
        }
        buffers = {f"buffer {name}": value for name, value in net.named_buffers()}
        return Observed({"out": out, **memories, **buffers}).see_gradients(net, x=x)

    return program


PLAIN = (
    "SimpleIFNode, HalfThresholdIFNode, ActivationAwareIFNode, IzhikevichNode, QIFNode, EIFNode,"
    " RAFNode, TernaryIFNode, TernaryLIFNode, KLIFNode, ComplementaryLIFNode, CUBALIFNode"
)
OF_SPIKINGJELLY = {name: {} for name in PLAIN.split(", ")} | {
    "SimpleLIFNode": {"tau": 2.0, "decay_input": True},
    "LIAFNode": {"act": torch.nn.ReLU(), "threshold_related": False},
}


@only_pure
@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize("name", OF_SPIKINGJELLY)
def test_neurons_of_spikingjelly(name: str, mode: str) -> None:
    kind = getattr(neuron, name)
    agree(spikingjelly_net(OF_SPIKINGJELLY[name], mode), kind, own_step(kind))


@only_pure
def test_small_numbers_are_packed() -> None:
    net = nn.Sequential(nn.Linear(5, 64), neuron.TernaryIFNode())
    convert(net)
    net(torch.randn(BATCH, 5) * 4)
    (row,) = explain(net).rows
    assert 1 <= row.bits_per_spike <= 2
    assert row.backend == "the module's own step"


# ----------------------------------------------------------------------------------- users' neurons


class AdaptiveLIF(base.MemoryModule):
    """A leaky neuron whose threshold rises with each spike."""

    def __init__(self) -> None:
        super().__init__()
        self.register_memory("v", 0.0)
        self.register_memory("a", 0.0)
        self.rise = nn.Parameter(torch.tensor(0.3))
        self.surrogate = surrogate.ATan()

    def single_step_forward(self, x: Tensor) -> Tensor:
        v = self.v + (x - self.v) / 2
        spikes = self.surrogate(v - 1 - self.a)
        self.v, self.a = v * (1 - spikes.detach()), 0.9 * self.a + self.rise * spikes
        return spikes


class LearnedLeak(SimpleBaseNode):
    """A leaky neuron that learns its leak."""

    def __init__(self) -> None:
        super().__init__()
        self.leak = nn.Parameter(torch.tensor(0.5))

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.leak.sigmoid() * self.v + x


class InPlace(SimpleBaseNode):
    """A neuron that writes into its potential."""

    def neuronal_charge(self, x: Tensor) -> None:
        self.v += x


class Normed(base.MemoryModule):
    """A neuron with a batch norm of its potential inside."""

    def __init__(self) -> None:
        super().__init__()
        self.register_memory("v", 0.0)
        self.norm, self.surrogate = nn.BatchNorm2d(4), surrogate.ATan()

    def single_step_forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.v * 0.5 + x)
        spikes = self.surrogate(h - 1)
        self.v = h - spikes
        return spikes


ON_SPIKINGJELLY = [(AdaptiveLIF, "s"), (Normed, "s")] + [
    (kind, mode) for kind in (LearnedLeak, InPlace) for mode in ("s", "m")
]


@pytest.mark.parametrize(("kind", "mode"), ON_SPIKINGJELLY)
def test_users_neurons_on_spikingjelly(kind: type[nn.Module], mode: str) -> None:
    agree(spikingjelly_net({}, mode), kind, own_step(kind))


class ScaledLeaky(snn.Leaky):
    def forward(self, x: Tensor, mem: Tensor | None = None) -> Any:
        return super().forward(1.2 * x, mem)


class AroundLeaky(snn.Leaky):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class SoftFire(snn.Leaky):
    def fire(self, mem: Tensor) -> Tensor:
        return super().fire(mem - 0.1)


@pytest.mark.parametrize("hidden", [False, True], ids=["passed", "init_hidden"])
@pytest.mark.parametrize("kind", [ScaledLeaky, AroundLeaky, SoftFire])
def test_users_neurons_on_snntorch(kind: type[nn.Module], hidden: bool) -> None:
    options = {"beta": 0.8, "learn_beta": True, "learn_threshold": True, "spike_grad": SHARP}
    agree(snntorch_loop(options, hidden), kind, own_step(kind))


class Traces(ScaledLeaky):
    def forward(self, x: Tensor, mem: Tensor | None = None) -> Any:
        spikes, mem = super().forward(x - 0.3 * getattr(self, "trace", torch.zeros(())), mem)
        self.trace = spikes.detach()
        return spikes, mem


class Prints(ScaledLeaky):
    def forward(self, x: Tensor, mem: Tensor | None = None) -> Any:
        print("a step")
        return super().forward(x, mem)


class Lists(ScaledLeaky):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen = ()

    def forward(self, x: Tensor, mem: Tensor | None = None) -> Any:
        self.seen = (*self.seen, len(x))
        return super().forward(x, mem)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Lists, "changes the attribute 'seen'"),
        (Traces, "reads what an earlier step wrote"),
        (Prints, "its step prints"),
    ],
)
def test_a_step_that_cannot_be_run_again_takes_the_hosts_path(
    kind: type[nn.Module], reason: str, capsys: pytest.CaptureFixture
) -> None:
    options = {"beta": 0.8, "spike_grad": SHARP}
    agree(snntorch_loop(options, False), kind, own_step(kind), path="host", reason=reason)
    assert len(capsys.readouterr().out.splitlines()) in (0, 2 * 2 * STEPS)


class PrintsInTraining(ScaledLeaky):
    def forward(self, x: Tensor, mem: Tensor | None = None) -> Any:
        if self.training:
            print("a step")
        return super().forward(x, mem)


def test_a_step_is_tried_once_in_each_training_mode() -> None:
    cell = own_step(PrintsInTraining)(beta=0.8, spike_grad=SHARP)
    for training, steps in ((True, 0), (False, 2), (True, 2)):
        cell.train(training)
        mem = cell.reset_mem()
        for _ in range(2):
            _, mem = cell(torch.rand(BATCH, WIDTH, requires_grad=True), mem)
        assert cell.record.statistics.steps == steps
    assert list(cell.record.statistics.reasons) == ["its step prints"]


class Online(SimpleBaseNode):
    """Learns online: its steps are not connected."""

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = 0.5 * self.v + x

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        outputs = []
        for x in x_seq:
            outputs.append(self.single_step_forward(x))
            self.v = self.v.detach()
        return torch.stack(outputs)


def test_a_sequence_whose_steps_the_host_does_not_connect() -> None:
    """It is taken as a whole."""
    agree(spikingjelly_net({}, "m"), Online, own_step(Online))


# ------------------------------------------------------------------------ random numbers, counters


class Noisy(ScaledLeaky):
    def forward(self, x: Tensor, mem: Tensor | None = None) -> Any:
        return super().forward(x + torch.randn_like(x), mem)


class DropsOut(ScaledLeaky):
    def forward(self, x: Tensor, mem: Tensor | None = None) -> Any:
        return super().forward(nn.functional.dropout(x, 0.5, self.training), mem)


class OwnGenerator(ScaledLeaky):
    """Draws from a generator of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor, mem: Tensor | None = None) -> Any:
        return super().forward(x + torch.rand(x.shape, generator=self.generator), mem)


class DrawsAtTimes(ScaledLeaky):
    """Draws from the third step on: not when it is tried."""

    def forward(self, x: Tensor, mem: Tensor | None = None) -> Any:
        if mem is not None and mem.numel() and mem.abs().max() > 1:
            x = x + torch.randn_like(x)
        return super().forward(x, mem)


class Counts(ScaledLeaky):
    """A neuron whose gain depends on the number of its steps."""

    calls, phase = 0, "odd"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls, self.phase = 0, "even"

    def forward(self, x: Tensor, mem: Tensor | None = None) -> Any:
        gain = 1 + 0.1 * self.calls + (self.phase == "odd")
        self.calls, self.phase = self.calls + 1, "odd" if self.phase == "even" else "even"
        return super().forward(gain * x, mem)


@pytest.mark.parametrize("kind", [Noisy, DropsOut, OwnGenerator, DrawsAtTimes, Counts])
def test_a_step_that_draws_or_counts(kind: type[nn.Module]) -> None:
    """Layers draw in turns, so where the generator stood is kept at every step."""
    options = {"beta": 0.8, "learn_beta": True, "learn_threshold": True, "spike_grad": SHARP}
    train = snntorch_loop(options, False)

    def program(make: Callable[..., nn.Module]) -> Observed:
        seen, made = train(lambda **more: neurons.append(make(**more)) or neurons[-1]), neurons
        seen.exact["generator"] = torch.get_rng_state()
        for i, each in enumerate(made):
            seen.exact[f"{i} calls"] = torch.tensor(getattr(each, "calls", 0))
            if kind is OwnGenerator:
                seen.exact[f"{i} own"] = each.generator.get_state()
        neurons.clear()
        return seen

    neurons: list[nn.Module] = []
    agree(program, kind, own_step(kind))


class NoisyNode(SimpleBaseNode):
    """A neuron with noise in its charge."""

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = 0.5 * self.v + x * (1 + 0.5 * torch.randn_like(x))


@pytest.mark.parametrize("mode", ["s", "m"])
def test_a_noisy_node(mode: str) -> None:
    agree(spikingjelly_net({}, mode), NoisyNode, own_step(NoisyNode))


def test_where_the_generator_stood_is_kept_once_a_stretch() -> None:
    node = own_step(NoisyNode)(step_mode="m")
    node(torch.rand(30, 4, 5, requires_grad=True))
    link, kept = link_of((node.v,)), []
    while link.before is not None:
        kept.insert(0, link.surroundings.start is not None)
        link = link.before
    assert [i for i, each in enumerate(kept) if each] == [0, 12, 24]


def test_noise_with_a_partial_loss_a_retained_graph_and_a_second_derivative() -> None:
    def program(make: Callable[..., nn.Module]) -> Observed:
        node, x = make(), torch.rand(2 * STEPS, 2, 5, requires_grad=True)
        seen = [node(frame * 3) for frame in x]
        seen[20].sum().backward(retain_graph=True)
        (seen[25].sum() + seen[7].sum()).backward(retain_graph=True)
        torch.rand(5)  # the generator moves on between two passes
        (gradient,) = torch.autograd.grad(seen[14].sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return Observed({"out": torch.stack(seen)}, {"x": x.grad})

    agree(program, NoisyNode, own_step(NoisyNode))


# ------------------------------------------------------------------------------------- a bad step


class Bad(nn.Module):
    """A plain cell whose step is not a neuron's."""

    def step(self, x: Tensor, v: Tensor) -> Any: ...

    def forward(self, x: Tensor, v: Tensor) -> Any:
        return self.step(x, 0.8 * v + x)


class ReturnsList(Bad):
    def step(self, x: Tensor, v: Tensor) -> Any:
        return [step_spike(v - 1), v]


class ReturnsNothing(Bad):
    def step(self, x: Tensor, v: Tensor) -> Any:
        return None


class ReturnsBooleans(Bad):
    def step(self, x: Tensor, v: Tensor) -> Any:
        return v > 1, v


class ReturnsText(Bad):
    def step(self, x: Tensor, v: Tensor) -> Any:
        return "spikes", v


class ForgetsState(Bad):
    def step(self, x: Tensor, v: Tensor) -> Any:
        return (step_spike(v - 1),)


class MoreStates(Bad):
    def step(self, x: Tensor, v: Tensor) -> Any:
        return step_spike(v - 1), v, v


class StateIsNumber(Bad):
    def step(self, x: Tensor, v: Tensor) -> Any:
        return step_spike(v - 1), 0.0


class WritesInput(Bad):
    def step(self, x: Tensor, v: Tensor) -> Any:
        return step_spike(v + x.mul_(1.1)), v


BAD = {
    ReturnsList: "its forward returns list, but it must return a tuple of its outputs and 1 state",
    ReturnsNothing: "its forward returns NoneType, but",
    ReturnsBooleans: r"returns a tensor of torch\.bool as its outputs, but a step must return one",
    ReturnsText: "returns an object of str as its outputs, but",
    ForgetsState: "its forward returns a tuple of 1, but",
    MoreStates: "its forward returns a tuple of 3, but",
    StateIsNumber: "leaves an object of float as state 0, but every state must be",
    WritesInput: r"writes into its input, but .* write x = f\(x\) in place of x\.f_\(\)",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_registered_neuron_with_a_bad_step_is_an_error(kind: type[nn.Module]) -> None:
    """It names the class, what came, what was expected and what to do; nothing is lost."""
    register_neuron(kind, states=("v",))
    cell, fc, v = kind(), nn.Linear(3, 4), torch.zeros(2, 4)
    convert(cell)
    x = fc(torch.rand(2, 3))
    before = x.detach().clone()
    with pytest.raises(TypeError, match=f"^{kind.__name__}: .*{BAD[kind]}.*To train it as it is"):
        cell(x, v)
    assert torch.equal(x, before) and not v.any()
    cell.reversible = False
    expected, ours = kind()(before.clone(), v), cell(x, v)
    assert type(expected) is type(ours)
    restore(cell)
    assert type(cell) is kind and vars(cell).keys() == vars(kind()).keys()


class WritesNodesInput(SimpleBaseNode):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + x.mul_(1.1)


class TwoOutputs(LearnedLeak):
    def single_step_forward(self, x: Tensor) -> Any:
        return super().single_step_forward(x), self.v


class GrowsStates(SimpleBaseNode):
    def neuronal_charge(self, x: Tensor) -> None:
        if "late" not in self._memories:
            self.register_memory("late", 0.0)
        self.v = self.v + x


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (WritesNodesInput, "its step writes into its input"),
        (TwoOutputs, "its step returns an object of tuple as its outputs"),
        (GrowsStates, "its step turns 1 states into 2"),
    ],
)
def test_a_bad_step_of_a_host_class(kind: type[nn.Module], reason: str) -> None:
    """An error if the class was declared, else the host's path: ``convert`` only met it."""

    def program(make: Callable[..., nn.Module]) -> Observed:
        torch.manual_seed(0)
        fc, node, total = nn.Linear(3, 4), make(), 0.0
        for frame in torch.rand(5, 2, 3):
            out = node(fc(frame) * 1.5)
            total = total + (out[0] if isinstance(out, tuple) else out).sum()
        total.backward()
        return Observed({"v": node.v, "total": total}).see_gradients(fc)

    def converted() -> nn.Module:
        nodes.append(kind())
        assert convert(nodes[-1]).by_own_step
        return nodes[-1]

    nodes: list[nn.Module] = []
    with pytest.raises(TypeError, match=f"{kind.__name__}: {reason}"):
        program(reversible(kind))
    assert_agree(program(kind), program(converted))
    assert list(nodes[0].record.statistics.reasons) == [reason]


# ----------------------------------------------------------------------------- training as users do


class OwnSynaptic(snn.Synaptic):
    """A neuron that runs by its own step, as it overrides its host's dynamics."""

    def forward(self, input_: Tensor, syn: Tensor | None = None, mem: Tensor | None = None) -> Any:
        return super().forward(input_, syn, mem)


class SynapticNet(nn.Module):
    def __init__(self, make: Callable[..., nn.Module] = OwnSynaptic) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 32)
        self.cell = make(0.8, 0.7, learn_beta=True, spike_grad=step_spike)

    def forward(self, x: Tensor, states: tuple | None = None) -> tuple[Tensor, tuple]:
        states, seen = states or self.cell.reset_mem(), []
        for frame in x:
            spikes, *states = self.cell(self.fc(frame), *states)
            seen.append(spikes)
        return torch.stack(seen), tuple(states)


def pair(make: Callable[..., nn.Module] = OwnSynaptic) -> list[SynapticNet]:
    """A net of the host's and a converted one with the same weights."""
    host = SynapticNet(make)
    ours = copy.deepcopy(host)
    convert(ours)
    return [host, ours]


def frames(steps: int = STEPS) -> Tensor:
    return torch.rand(steps, BATCH, 5, generator=torch.Generator().manual_seed(1)) * 3


def compare(use: Callable[[SynapticNet], Observed]) -> None:
    """Of a neuron by its own step, and of the same one by its equations."""
    for make in (OwnSynaptic, snn.Synaptic):
        assert_agree(*(use(net) for net in pair(make)))


def test_truncated_backpropagation() -> None:
    def use(net: SynapticNet) -> Observed:
        optimizer, states, seen = torch.optim.SGD(net.parameters(), 0.1), None, {}
        for part in range(3):
            out, states = net(frames(), states)
            optimizer.zero_grad()
            out.sum().backward()
            optimizer.step()
            states = tuple(each.detach() for each in states)
            seen[f"{part}"] = out
        return Observed({"0": seen["0"]}).see_gradients(net)

    compare(use)


def test_a_graph_that_is_retained_and_a_loss_on_some_steps() -> None:
    def use(net: SynapticNet) -> Observed:
        out, states = net(frames())
        out[3].sum().backward(retain_graph=True)
        (out[5:9].sum() + states[1].sum()).backward()
        return Observed({"out": out}).see_gradients(net)

    compare(use)


def test_a_gradient_that_is_differentiated_again() -> None:
    def use(net: SynapticNet) -> Observed:
        x = frames(5).requires_grad_()
        out, states = net(x)
        (gradient,) = torch.autograd.grad(out.sum() + states[1].sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return Observed({"out": out}).see_gradients(net)

    compare(use)


def test_an_attribute_that_changes_between_two_steps() -> None:
    def use(net: SynapticNet) -> Observed:
        states, seen = net.cell.reset_mem(), []
        for t, frame in enumerate(frames()):
            with torch.no_grad():
                net.cell.threshold.add_(0.02)
            if t == 7:
                net.cell.alpha.data.fill_(0.5)
            spikes, *states = net.cell(net.fc(frame), *states)
            seen.append(spikes)
        out = torch.stack(seen)
        out.sum().backward()
        return Observed({"out": out}).see_gradients(net)

    compare(use)


def test_autocast() -> None:
    def use(net: SynapticNet) -> Observed:
        with torch.autocast("cpu", torch.bfloat16):
            out, states = net(frames())
        (out.sum() + states[1].float().sum()).backward()
        return Observed({"out": out, "mem": states[1]}).see_gradients(net)

    compare(use)


def test_no_grad_and_evaluation_in_the_middle() -> None:
    def use(net: SynapticNet) -> Observed:
        out, states = net(frames())
        net.eval()
        with torch.no_grad():
            evaluated, _ = net(frames())
        net.train()
        more, _ = net(frames(), states)
        (out.sum() + more.sum()).backward()
        return Observed({"out": out, "evaluated": evaluated, "more": more}).see_gradients(net)

    compare(use)


def test_a_frozen_layer_and_frozen_parameters() -> None:
    def use(net: SynapticNet) -> Observed:
        net.fc.requires_grad_(False)
        out, _ = net(frames())
        out.sum().backward()
        net.cell.requires_grad_(False)
        silent, _ = net(frames())
        assert not silent.requires_grad
        return Observed({"out": out}).see_gradients(net)

    compare(use)


@pytest.mark.parametrize("steps", [1, 12, 13])
def test_lengths_around_an_interval(steps: int) -> None:
    def use(net: SynapticNet) -> Observed:
        out, _ = net(frames(steps))
        out.sum().backward()
        return Observed({"out": out}).see_gradients(net)

    compare(use)


# ------------------------------------------------------------------------------------------- memory


class Tutorial(nn.Module):
    """snnTorch's convolutional tutorial net, smaller."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = (
            nn.Conv2d(1, 8, 5),
            nn.Conv2d(8, 16, 5),
            nn.Linear(256, 10),
        )
        self.neurons = nn.ModuleList(make() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for each in self.neurons:
            each.reset_mem()
        seen = []
        for _ in range(32):
            a = self.neurons[0](torch.max_pool2d(self.conv1(x), 2))
            b = self.neurons[1](torch.max_pool2d(self.conv2(a), 2))
            seen.append(self.neurons[2](self.fc(b.flatten(1))))
        return torch.stack(seen)


HIDDEN = {"init_hidden": True, "spike_grad": SHARP}
SMALLER = {
    "Synaptic": (lambda: OwnSynaptic(0.8, 0.7, **HIDDEN), 24, 4.5),
    "Alpha": (lambda: snn.Alpha(0.8, 0.6, **HIDDEN), 20, 3.5),
    "RLeaky": (lambda: snn.RLeaky(0.8, all_to_all=False, **HIDDEN), 24, 4.5),
}


@pytest.mark.parametrize("name", SMALLER)
def test_a_training_step_holds_so_many_times_less(name: str) -> None:
    make, retained, peak = SMALLER[name]
    x, reports = torch.rand(4, 1, 28, 28), []
    for converted in (False, True):
        net = Tutorial(make)
        if converted:
            convert(net)
        step = lambda net=net: net(x).sum().backward()  # noqa: E731
        step()
        reports.append(memory_report(step))
    host, ours = reports
    assert host.retained / ours.retained >= retained
    assert host.peak / ours.peak >= peak


@pytest.mark.parametrize("backward", [True, False])
def test_memory_returns_without_the_garbage_collector(backward: bool) -> None:
    net = Tutorial(SMALLER["Synaptic"][0])
    convert(net)
    with no_garbage_collector():
        out = net(torch.rand(2, 1, 28, 28))
        held = weakref.ref(net.neurons[0].record.latest_transition._copy)
        if backward:
            out.sum().backward()
        for each in net.neurons:
            each.reset_mem()
        del out
        net.neurons[0].record.remember(None)
        assert held() is None


# ------------------------------------------------------------------------------ convert and restore


class BothKinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.known = snn.Leaky(0.9, spike_grad=step_spike)
        self.other = snn.Alpha(0.9, 0.8, spike_grad=step_spike)


def test_convert_says_which_neurons_go_by_their_own_step() -> None:
    net = BothKinds()
    report = convert(net)
    assert report.swapped == {
        "known": ("Leaky", "RevLeaky"),
        "other": ("Alpha", "RevAlpha"),
    }
    assert report.by_own_step == ["other"] and not report.left
    assert "other: Alpha -> RevAlpha, by its own step" in str(report)
    restore(net)
    assert type(net.other) is snn.Alpha and type(net.known) is snn.Leaky


def test_convert_can_be_restrained() -> None:
    net = BothKinds()
    report = convert(net, generic=False)
    assert list(report.swapped) == ["known"]
    assert report.left == {"other": "Alpha has no reversible counterpart"}
    restore(net)
    report = convert(net, only=snn.Alpha)
    assert list(report.swapped) == ["other"]
    assert "only=" in report.left["known"]


def test_copies_and_pickles() -> None:
    net = SynapticNet()
    keys = list(net.state_dict())
    convert(net)
    assert list(net.state_dict()) == keys
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    twins = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    expected, _ = net(frames())
    for each in (*twins, torch.load(file, weights_only=False)):
        assert type(each.cell) is type(net.cell)
        out, _ = each(frames())
        assert torch.equal(out, expected)
        assert each.cell.record.statistics.steps == STEPS


@reversible
class Decorated(SimpleBaseNode):
    """A user's neuron."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = 0.5 * self.v + self.gain * x


def test_a_decorated_class() -> None:
    assert Decorated.__name__ == "Decorated" and Decorated.__doc__ == "A user's neuron."
    made = pickle.loads(pickle.dumps(Decorated(gain=2.0)))
    made(torch.rand(2, 3, requires_grad=True)).sum().backward()
    assert type(made) is Decorated and made.record.statistics.steps == 1


def test_a_decorated_class_with_known_equations() -> None:
    assert issubclass(reversible(type("Named", (snn.Leaky,), {})), RevLeaky)


class Cell(nn.Module):
    """A hand-written leaky neuron with a learned decay: of no host."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(0.8))

    def forward(self, x: Tensor, v: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v = self.decay * v + x
        spikes = step_spike(v - 1 - a)
        return spikes, v - spikes.detach(), 0.9 * a + 0.2 * spikes


class CellNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.cell = nn.Linear(5, 32), Cell()

    def forward(self, x: Tensor) -> Tensor:
        v = a = torch.zeros(BATCH, 32)
        seen = []
        for frame in x:
            spikes, v, a = self.cell(self.fc(frame), v, a)
            seen.append(spikes + 0.1 * v)
        return torch.stack(seen)


def test_a_plain_module() -> None:
    register_neuron(Cell, states=("v", "a"))
    host = CellNet()
    ours = copy.deepcopy(host)
    assert convert(ours).by_own_step == ["cell"]
    seen = []
    for net in (host, ours):
        x = frames().requires_grad_()
        out = net(x)
        (out * torch.linspace(0.5, 1, out.numel()).view_as(out)).sum().backward()
        seen.append(Observed({"out": out}).see_gradients(net, x=x))
    assert_agree(*seen)
    assert ours.cell.record.statistics.steps == STEPS
    assert not ours.cell.record.statistics.reasons
    copies = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))
    assert all(type(each.cell) is type(ours.cell) for each in copies)
    restore(ours)
    assert type(ours.cell) is Cell


def test_a_plain_module_is_registered_with_its_states() -> None:
    with pytest.raises(ValueError, match=r"states must name .*\('v', 'a'\), got \('v',\)"):
        register_neuron(Cell, states=("v",))
    with pytest.raises(TypeError, match=r"kind must be a subclass of torch\.nn\.Module"):
        register_neuron(step_spike, states=("v",))


def test_a_class_of_no_host_is_an_error() -> None:
    with pytest.raises(TypeError, match="kind: Linear is no neuron class"):
        reversible(nn.Linear)


def test_a_module_may_be_deleted_before_backward() -> None:
    nets, gradients = pair(), []
    while nets:
        net = nets.pop(0)
        weight, (out, _) = net.fc.weight, net(frames())
        del net
        out.sum().backward()
        gradients.append(weight.grad)
    assert_agree(*(Observed(gradients={"weight": each}) for each in gradients))


def test_the_interval_is_a_setting_and_the_backend_none() -> None:
    with use_settings(rebuild_interval=3, backend="triton"):
        net = SynapticNet()
        convert(net)
        net(frames())[0].sum().backward()
        assert net.cell.record.statistics.anchor_interval == 3

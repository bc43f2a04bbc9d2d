"""convert and restore: in place, undone exactly, and what is left alone is said."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import snntorch as snn
import torch
import torch.nn as nn
import torch.nn.utils.parametrize as parametrize
from compare import Observed, assert_agree, assert_path
from nets import BATCH
from snntorch import utils
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor

from snn_revplugin import convert, restore
from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.adapters.spikingjelly import RevIFNode, RevLIFNode, RevParametricLIFNode
from snn_revplugin.settings import use_settings


def step_spike(z: Tensor) -> Tensor:
    """A surrogate that can be pickled."""
    smooth = z.sigmoid()
    return (z > 0).to(z.dtype) + (smooth - smooth.detach())


class NamedLeaky(snn.Leaky):
    """A user's neuron that changes none of the dynamics."""

    def __init__(self, label: str, beta: float = 0.8) -> None:
        super().__init__(beta=beta, init_hidden=True, learn_beta=True, spike_grad=step_spike)
        self.label = label

    def reset_mem(self) -> Tensor:
        self.resets = getattr(self, "resets", 0) + 1
        return super().reset_mem()

    def extra_repr(self) -> str:
        return f"label={self.label}"


class NoisyLeaky(snn.Leaky):
    """A user's neuron with dynamics of its own."""

    def fire(self, mem: Tensor) -> Tensor:
        return super().fire(mem + 0.1)


class LoudLIF(neuron.LIFNode):
    """A user's neuron that changes none of the dynamics."""

    def __init__(self, volume: float) -> None:
        super().__init__(tau=1.5, surrogate_function=surrogate.ATan(), step_mode="s")
        self.volume = volume

    def reset(self) -> None:
        super().reset()
        self.resets = getattr(self, "resets", 0) + 1


class OtherLIF(neuron.LIFNode):
    """A user's neuron with dynamics of its own."""

    def single_step_forward(self, x):
        return super().single_step_forward(x * 0.5)


class SnnTorchNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(5, 6),
            snn.Leaky(
                beta=0.9,
                init_hidden=True,
                learn_beta=True,
                learn_threshold=True,
                spike_grad=step_spike,
            ),
            nn.Linear(6, 6),
            NamedLeaky("inner"),
        )
        self.shared = snn.Leaky(beta=0.7, init_hidden=True, output=True, spike_grad=step_spike)
        self.alias = self.shared

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.cat(self.shared(self.body(frame)), -1) for frame in x])

    def clear(self) -> None:
        for each in (self.body[1], self.body[3], self.shared):
            each.reset_mem()


class SpikingJellyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            layer.Linear(5, 6),
            neuron.ParametricLIFNode(v_reset=None),
            layer.Linear(6, 6),
            LoudLIF(0.3),
            neuron.IFNode(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(frame * 3) for frame in x])

    def clear(self) -> None:
        functional.reset_net(self)


NETS = {"snntorch": SnnTorchNet, "spikingjelly": SpikingJellyNet}
EVERY_HOST = pytest.mark.parametrize("host", NETS)
SWAPPED = {
    "snntorch": {
        "body.1": ("Leaky", "RevLeaky"),
        "body.3": ("NamedLeaky", "RevNamedLeaky"),
        "shared": ("Leaky", "RevLeaky"),
    },
    "spikingjelly": {
        "body.1": ("ParametricLIFNode", "RevParametricLIFNode"),
        "body.3": ("LoudLIF", "RevLoudLIF"),
        "body.4": ("IFNode", "RevIFNode"),
    },
}
OURS = (RevLeaky, RevIFNode, RevLIFNode, RevParametricLIFNode)


def neurons_of(net: nn.Module) -> list[nn.Module]:
    return [m for m in net.modules() if isinstance(m, snn.SpikingNeuron | neuron.BaseNode)]


def both(
    host: str, program: Callable[[nn.Module, Callable[[nn.Module], object]], Observed]
) -> list[nn.Module]:
    """A program on a host's net, and on one that it converts by the function it is given; returns
    the latter's neurons."""
    seen, nets = [], []
    for swap in (lambda net: None, convert):
        torch.manual_seed(0)
        nets.append(NETS[host]())
        seen.append(program(nets[-1], swap))
    assert_agree(*seen)
    return neurons_of(nets[1])


def train(net: nn.Module, name: str = "") -> Observed:
    net.zero_grad()
    x = torch.randn(6, BATCH, 5, requires_grad=True)
    y = net(x)
    (y * torch.randn(y.shape)).sum().backward()
    gradients = {name + key: p.grad.clone() for key, p in net.named_parameters()}
    return Observed({name + "y": y}, gradients | {name + "x": x.grad})


@EVERY_HOST
def test_a_converted_net_trains_as_the_hosts(host: str) -> None:
    def program(net: nn.Module, swap: Callable) -> Observed:
        swap(net)
        return train(net)

    assert_path(both(host, program), "reversible")


@EVERY_HOST
def test_the_report(host: str) -> None:
    net = NETS[host]()
    report = convert(net)
    assert report.swapped == SWAPPED[host]
    assert report.left == {}
    text = str(report)
    assert text.splitlines()[0] == "3 neurons swapped, 0 left"
    assert "  body.3: " + " -> ".join(SWAPPED[host]["body.3"]) in text
    back = restore(net)
    assert back.swapped == {
        name: (after, before) for name, (before, after) in SWAPPED[host].items()
    }


@EVERY_HOST
def test_a_neuron_stays_the_object_that_it_was(host: str) -> None:
    net = NETS[host]()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for each in neurons_of(net):
        each.eval()
        each.register_forward_hook(lambda module, args, output: None)
        each.register_full_backward_hook(lambda module, grads, outputs: None)
    before = [
        (each, dict(each.__dict__), list(each.parameters()), dict(each.named_buffers()))
        for each in neurons_of(net)
    ]
    keys, values = list(net.state_dict()), [each.clone() for each in net.state_dict().values()]
    registered = list(snn.SpikingNeuron.instances)
    convert(net)
    assert list(net.state_dict()) == keys
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), values, strict=True))
    assert [id(each) for each in snn.SpikingNeuron.instances] == [id(each) for each in registered]
    for each, (was, attributes, parameters, buffers) in zip(neurons_of(net), before, strict=True):
        assert each is was
        assert isinstance(each, OURS)
        assert not each.training
        assert len(each._forward_hooks) == 1
        assert len(each._backward_hooks) == 1
        assert all(each.__dict__[name] is value for name, value in attributes.items())
        assert all(a is b for a, b in zip(each.parameters(), parameters, strict=True))
        assert all(getattr(each, name) is value for name, value in buffers.items())
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in net.parameters()}


@EVERY_HOST
@pytest.mark.parametrize("used", [False, True])
def test_restore_undoes_convert_exactly(host: str, used: bool) -> None:
    net = NETS[host]()
    if used:
        net(torch.randn(2, BATCH, 5))
    before = [(type(each), set(each.__dict__), repr(each)) for each in neurons_of(net)]
    convert(net)
    train(net)
    restore(net)
    after = [(type(each), set(each.__dict__), repr(each)) for each in neurons_of(net)]
    if used:
        assert after == before
    else:  # snnTorch sets ``reset`` at the first call
        assert [(kind, names - {"reset"}, text) for kind, names, text in after] == before
    for each in neurons_of(net):
        if isinstance(each, snn.Leaky):
            assert each.reset.shape == each.mem.shape


@EVERY_HOST
def test_there_and_back_between_training_steps(host: str) -> None:
    def program(net: nn.Module, swap: Callable) -> Observed:
        observed, optimizer = Observed(), torch.optim.SGD(net.parameters(), lr=0.05)
        for i in range(4):
            net.clear()
            if i % 2:
                swap(net)
            else:
                restore(net)
            seen = train(net, f"{i} ")
            optimizer.step()
            observed.gradients |= seen.gradients
        return observed

    both(host, program)


@EVERY_HOST
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_converted_in_mid_sequence(host: str, when: str) -> None:
    """The state that is carried is carried on, with its history."""

    def program(net: nn.Module, swap: Callable) -> Observed:
        x = torch.randn(8, 3, 5, requires_grad=True)
        if when == "backward":
            y = net(x)
            swap(net)
        else:
            first = net(x[:5])
            swap(net)
            y = torch.cat([first, net(x[5:])])
        (y * torch.randn(y.shape)).sum().backward()
        observed = Observed({"y": y}).see_gradients(net, x=x)
        for i, each in enumerate(neurons_of(net)):
            observed.exact[f"state {i}"] = each.mem if isinstance(each, snn.Leaky) else each.v
            if isinstance(each, snn.Leaky):
                observed.exact[f"reset {i}"] = each.reset
        return observed

    both(host, program)


@EVERY_HOST
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_restored_in_mid_sequence(host: str, when: str) -> None:
    def program(net: nn.Module, swap: Callable) -> Observed:
        swap(net)
        x = torch.randn(8, 3, 5, requires_grad=True)
        if when == "backward":
            y = net(x)
            restore(net)
        else:
            first = net(x[:5])
            restore(net)
            y = torch.cat([first, net(x[5:])])
        (y * torch.randn(y.shape)).sum().backward()
        return Observed({"y": y}).see_gradients(net, x=x)

    both(host, program)


@EVERY_HOST
def test_twice_is_as_once(host: str) -> None:
    net = NETS[host]()
    convert(net)
    kinds = [type(each) for each in neurons_of(net)]
    again = convert(net)
    assert again.swapped == {}
    assert again.left == dict.fromkeys(SWAPPED[host], "it is reversible already")
    assert [type(each) for each in neurons_of(net)] == kinds
    restore(net)
    assert restore(net).swapped == {}


@pytest.mark.parametrize(
    "net", [nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Dropout()), nn.ModuleList()], ids=str
)
def test_a_net_without_neurons(net: nn.Module) -> None:
    report = convert(net)
    assert (report.swapped, report.left) == ({}, {})
    assert str(report) == "0 neurons swapped, 0 left"
    assert restore(net).swapped == {}


@pytest.mark.parametrize(
    "thing",
    [None, "net", [nn.Linear(1, 1)], snn.Leaky, torch.zeros(1)],
    ids=lambda thing: type(thing).__name__,
)
@pytest.mark.parametrize("function", [convert, restore])
def test_what_is_no_module(function: Callable, thing: object) -> None:
    with pytest.raises(
        TypeError, match=r"net must be a torch\.nn\.Module, got " + type(thing).__name__
    ):
        function(thing)


@pytest.mark.parametrize(
    "make", [lambda: snn.Leaky(beta=0.9), neuron.LIFNode], ids=["snntorch", "spikingjelly"]
)
def test_a_neuron_by_itself(make: Callable[[], nn.Module]) -> None:
    lif = make()
    name = type(lif).__name__
    report = convert(lif)
    assert report.swapped == {"": (name, "Rev" + name)}
    assert f"(the module itself): {name} -> Rev{name}" in str(report)
    assert isinstance(lif, OURS)
    restore(lif)
    assert type(lif).__name__ == name


def test_neurons_made_as_ours_become_the_hosts() -> None:
    net = nn.Sequential(
        RevLeaky(beta=0.9), RevLIFNode(reversible=False), RevIFNode(), RevParametricLIFNode()
    )
    assert len(restore(net).swapped) == 4
    assert [type(each) for each in net] == [
        snn.Leaky,
        neuron.LIFNode,
        neuron.IFNode,
        neuron.ParametricLIFNode,
    ]
    assert "reversible" not in net[1].__dict__


def test_dynamics_of_the_users_own_go_by_their_own_step() -> None:
    replaced, replaced_too = snn.Leaky(beta=0.9), neuron.LIFNode()
    replaced.fire = lambda mem: (mem > 0.5).float()
    replaced_too.multi_step_forward = lambda x_seq: x_seq
    net = nn.ModuleDict(
        {
            "a": NoisyLeaky(beta=0.9),
            "b": OtherLIF(),
            "c": replaced,
            "d": replaced_too,
            "e": snn.Leaky(beta=0.5),
        }
    )
    kinds = [type(each) for each in net.values()]
    report = convert(net, generic=False)
    assert report.swapped == {"e": ("Leaky", "RevLeaky")}
    assert report.left == {
        "a": "NoisyLeaky overrides fire of Leaky",
        "b": "OtherLIF overrides single_step_forward of LIFNode",
        "c": "Leaky overrides fire of Leaky",
        "d": "LIFNode overrides multi_step_forward of LIFNode",
    }
    assert [type(each) for each in net.values()][:4] == kinds[:4]
    assert "  a: left, NoisyLeaky overrides fire of Leaky" in str(report)
    report = convert(net)
    assert report.by_own_step == ["a", "b"]
    assert report.left["c"] == "Leaky overrides fire of Leaky"  # on this instance alone


def test_other_neurons_are_left_and_named() -> None:
    net = nn.ModuleDict(
        {
            "alpha": snn.Alpha(alpha=0.9, beta=0.8),
            "recurrent": snn.RLeaky(beta=0.9, all_to_all=False),
            "both": snn.RSynaptic(alpha=0.9, beta=0.8, all_to_all=False),
            "qif": neuron.QIFNode(),
            "eif": neuron.EIFNode(),
        }
    )
    report = convert(net, generic=False)
    assert report.swapped == {}
    assert report.left == {
        name: f"{type(each).__name__} has no reversible counterpart" for name, each in net.items()
    }
    assert convert(net).by_own_step == list(net)


def test_one_class_for_each_of_the_users() -> None:
    a, b = NamedLeaky("a"), NamedLeaky("b")
    convert(a), convert(b)
    assert type(a) is type(b)
    assert isinstance(a, NamedLeaky)
    assert isinstance(a, RevLeaky)
    assert repr(a) == "RevNamedLeaky(label=a)"
    assert type(a).__module__ == __name__


def test_the_users_methods_still_run() -> None:
    lif, loud = NamedLeaky("a"), LoudLIF(0.2)
    convert(lif), convert(loud)
    lif.reset_mem()
    loud.reset()
    assert lif.resets == 1
    assert loud.resets == 1
    assert loud.volume == 0.2


def _saved(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@EVERY_HOST
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda net: pickle.loads(pickle.dumps(net)), _saved],
    ids=["deepcopy", "copy", "pickle", "save"],
)
def test_copies_of_a_converted_net(host: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    def program(net: nn.Module, swap: Callable) -> Observed:
        swap(net)
        with torch.no_grad():
            net(torch.randn(2, BATCH, 5))
        twin = copied(net)
        assert [type(each) for each in neurons_of(twin)] == [type(each) for each in neurons_of(net)]
        return train(twin)

    both(host, program)


@EVERY_HOST
def test_a_copy_can_be_restored(host: str) -> None:
    net = NETS[host]()
    kinds = [type(each) for each in neurons_of(net)]
    convert(net)
    twin = copy.deepcopy(net)
    restore(twin)
    assert [type(each) for each in neurons_of(twin)] == kinds
    assert all(isinstance(each, OURS) for each in neurons_of(net))


def test_spikingjellys_reset_cache_knows_the_swapped_neurons() -> None:
    net = SpikingJellyNet()
    functional.reset_net(net)  # fills the cache
    for swap in (convert, restore):
        swap(net)
        net(torch.randn(2, 3, 5))
        functional.reset_net(net)
        assert [each.v for each in neurons_of(net)] == [0.0, 0.0, 0.0]
    assert net.body[3].resets == 3


def test_snntorchs_utilities_know_the_swapped_neurons() -> None:
    net = nn.Sequential(nn.Linear(5, 4), snn.Leaky(beta=0.9, init_hidden=True), NamedLeaky("a"))
    convert(net)
    net(torch.randn(3, 5))
    assert all(each.mem.requires_grad for each in net[1:])
    utils.reset(net)
    for each in net[1:]:
        assert not each.mem.requires_grad
        assert not each.mem.any()


@EVERY_HOST
def test_state_dicts_go_both_ways(host: str) -> None:
    plain, swapped = NETS[host](), NETS[host]()
    convert(swapped)
    swapped.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(4, 3, 5)
    assert torch.equal(plain(x), swapped(x))
    plain.clear(), swapped.clear()
    plain.load_state_dict(swapped.state_dict(), strict=True)
    assert torch.equal(plain(x), swapped(x))


@EVERY_HOST
def test_parameters_substituted_by_functional_call(host: str) -> None:
    def program(net: nn.Module, swap: Callable) -> Observed:
        swap(net)
        other = {name: (p.detach() * 0.9).requires_grad_() for name, p in net.named_parameters()}
        x = torch.randn(6, 3, 5, requires_grad=True)
        y = torch.func.functional_call(net, other, (x,))
        (y * torch.randn(y.shape)).sum().backward()
        return Observed({"y": y}, {name: p.grad for name, p in other.items()} | {"x": x.grad})

    both(host, program)


class Bounded(nn.Module):
    def forward(self, free: Tensor) -> Tensor:
        return free.sigmoid()


def test_a_parametrized_decay() -> None:
    """The decay is then computed anew whenever it is read, and another tensor each time."""

    def program(net: nn.Module, swap: Callable) -> Observed:
        parametrize.register_parametrization(net.body[1], "beta", Bounded(), unsafe=True)
        swap(net)
        return train(net)

    neurons = both("snntorch", program)
    assert isinstance(neurons[0], RevLeaky)


def test_a_threshold_that_learns_in_the_users_own_way() -> None:
    """SpikingJelly's threshold is a number, but with a surrogate of the user's own a tensor in its
    place learns."""
    gradients = []
    for swap in (lambda net: None, convert):
        torch.manual_seed(0)
        lif, threshold = (
            neuron.LIFNode(surrogate_function=step_spike),
            nn.Parameter(torch.tensor(0.7)),
        )
        lif.v_threshold = threshold
        swap(lif)
        x = torch.rand(4, 2, 5, requires_grad=True)
        y = torch.stack([lif(2 * frame) for frame in x])
        y.sum().backward()
        gradients.append((threshold.grad, x.grad, y))
    assert gradients[1][0] is not None
    for ours, theirs in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_reversible_false_in_the_settings_takes_the_hosts_path() -> None:
    def program(net: nn.Module, swap: Callable) -> Observed:
        swap(net)
        with use_settings(reversible=False):
            return train(net)

    assert_path(both("snntorch", program), "host", "reversible=False")

"""RevIFNode, RevLIFNode and RevParametricLIFNode against SpikingJelly's: every option, both step
modes, its own tools."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn as nn
from compare import MakeNeuron, Observed, agree, assert_alive
from hosts import PURE, only_pure
from nets import BATCH
from pairs import every_pair
from spikingjelly.activation_based import base, functional, layer, neuron, surrogate
from torch import Tensor

from snn_revplugin.adapters.spikingjelly import RevIFNode, RevLIFNode, RevParametricLIFNode

NODES = {
    "IF": (neuron.IFNode, RevIFNode),
    "LIF": (neuron.LIFNode, RevLIFNode),
    "PLIF": (neuron.ParametricLIFNode, RevParametricLIFNode),
}
TAU = {"IF": None, "LIF": "tau", "PLIF": "init_tau"}
LENGTHS = 1, 2, 9, 30

SURROGATES: dict[str, Callable[[], Callable]] = {
    "Sigmoid": lambda: surrogate.Sigmoid(2.0),
    "ATan": lambda: surrogate.ATan(1.5),
    "SoftSign": lambda: surrogate.SoftSign(2.0),
    "LeakyKReLU": lambda: surrogate.LeakyKReLU(leak=0.1, k=0.9),
    "Erf": lambda: surrogate.Erf(1.2),
    "PiecewiseLeakyReLU": lambda: surrogate.PiecewiseLeakyReLU(0.8, 0.05),
    "QPseudoSpike": lambda: surrogate.QPseudoSpike(1.7),
    "a function of sigmoid.apply": lambda: lambda z: surrogate.sigmoid.apply(z, 3.0),
}


class Net(nn.Sequential):
    """A weight layer, neurons, a linear layer, neurons; on one time step or on a sequence of
    them."""

    def __init__(self, make: MakeNeuron, kind: str, mode: str, options: dict) -> None:
        convolves = kind == "conv"
        super().__init__(
            (
                layer.Conv2d(2, 3, 3, step_mode=mode)
                if convolves
                else layer.Linear(5, 6, step_mode=mode)
            ),
            make(step_mode=mode, **options),
            layer.Flatten(step_mode=mode),
            layer.Linear(27 if convolves else 6, 4, step_mode=mode),
            make(step_mode=mode, **options),
        )
        for each in (self[0], self[3]):
            nn.init.normal_(each.weight, std=2.5 / each.weight[0].numel() ** 0.5)
            nn.init.constant_(each.bias, 0.7)

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[T, N, ...]`` to the spikes of both layers of neurons, ``[T, N, ...]``."""
        if self[1].step_mode == "m":
            spikes1 = self[1](self[0](x))
            return spikes1, self[4](self[3](self[2](spikes1)))
        first, second = [], []
        for frame in x:
            first.append(self[1](self[0](frame)))
            second.append(self[4](self[3](self[2](first[-1]))))
        return torch.stack(first), torch.stack(second)


def draw(kind: str, T: int, dtype: torch.dtype, batch: int = BATCH) -> Tensor:
    shape = (5,) if kind == "linear" else (2, 5, 5)
    return torch.randn(T, batch, *shape).to(dtype).requires_grad_()


def train(net: Net, x: Tensor, calls: int = 1) -> Observed:
    """One forward over time, in one call or in several, and one backward from every spike, every
    last potential and path."""
    exact: dict[str, Tensor] = {}
    for i, part in enumerate(x.tensor_split(calls)):
        exact[f"spikes1_{i}"], exact[f"spikes2_{i}"] = net.run(part)
        for name, node in (("1", net[1]), ("2", net[4])):
            exact[f"v{name}_{i}"] = node.v
            if (
                node.store_v_seq and node.v_seq is not None
            ):  # 0.0.0.0.14 stores it in step mode 'm' alone
                exact[f"v_seq{name}_{i}"] = node.v_seq
    loss = sum((each * torch.randn(each.shape).to(each.dtype)).sum() for each in exact.values())
    loss.backward()
    return Observed(exact).see_gradients(net, x=x)


def _table() -> list:
    """Options of which every three values meet, chosen from all combinations, with a net, T,
    surrogate and initial state that are dealt out at random."""
    deal = random.Random(0).choice
    rows = []
    for node in NODES:
        for each in product(
            (None,) if node == "IF" else (True, False), (0.0, None, -0.3), (False, True),
            (None,) if node == "IF" else (2.0, 1.25), "sm", (False, True),
            (torch.float32, torch.float64, torch.float16, torch.bfloat16),
        ):  # fmt: skip
            dealt = (
                deal(tuple(SURROGATES)),
                deal((*LENGTHS, 2, 9)),
                deal(("linear", "conv")),
                deal((False, True)),
            )
            rows.append((node, *each, *dealt))
    return [
        pytest.param(*row, id="-".join(str(each).removeprefix("torch.") for each in row))
        for row in every_pair(rows, together=3)
    ]


@pytest.mark.parametrize(
    (
        "node",
        "decay_input",
        "v_reset",
        "detach_reset",
        "tau",
        "mode",
        "store_v_seq",
        "dtype",
        "spike",
        "T",
        "kind",
        "initial",
    ),
    _table(),
)
def test_every_three_options_together(
    node: str,
    decay_input: bool | None,
    v_reset: float | None,
    detach_reset: bool,
    tau: float | None,
    mode: str,
    store_v_seq: bool,
    dtype: torch.dtype,
    spike: str,
    T: int,
    kind: str,
    initial: bool,
) -> None:
    def program(make: MakeNeuron) -> Observed:
        options = {
            "v_threshold": 0.8,
            "v_reset": v_reset,
            "detach_reset": detach_reset,
            "store_v_seq": store_v_seq,
            "surrogate_function": SURROGATES[spike](),
        }
        if tau is not None:
            options |= {TAU[node]: tau, "decay_input": decay_input}
        net = Net(make, kind, mode, options).to(dtype)
        x = draw(kind, T, dtype)
        starts = {}
        if initial:
            for name, i, shape in (
                ("v1_0", 1, (6,) if kind == "linear" else (3, 3, 3)),
                ("v2_0", 4, (4,)),
            ):
                starts[name] = torch.randn(BATCH, *shape).to(dtype).requires_grad_()
                net[i].v = starts[name]
        observed = train(net, x, calls=2 if T > 2 else 1)
        if T >= 9:
            assert_alive(observed.exact["spikes1_0"])
            assert_alive(observed.exact["spikes2_0"])
        return observed.see_gradients(**starts)

    agree(program, *NODES[node])


def _options(node: str, **options) -> dict:
    return {"v_threshold": 0.8, "surrogate_function": surrogate.ATan(), **options}


EVERY_NODE = pytest.mark.parametrize("node", NODES)
EVERY_MODE = pytest.mark.parametrize("mode", ["s", "m"])


@EVERY_NODE
@EVERY_MODE
@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize(
    "clear",
    ["reset_net", "detach_net", "detach_net in mid-sequence", "reset_net in mid-sequence", "none"],
)
def test_state_between_sequences(clear: str, v_reset: float | None, mode: str, node: str) -> None:
    """Before the backward of what went before, and after."""

    def program(make: MakeNeuron) -> Observed:
        net = Net(make, "linear", mode, _options(node, v_reset=v_reset))
        clearing = (
            functional.reset_net
            if "reset" in clear
            else functional.detach_net
            if "detach" in clear
            else lambda net: None
        )
        observed = Observed()
        for i in range(2 if clear != "none" else 1):
            first = net.run(draw("linear", 6, torch.float32))
            if "mid" in clear:
                clearing(net)
            second = net.run(draw("linear", 5, torch.float32))
            values = [*first, *second, net[1].v, net[4].v]
            observed.exact |= {f"{i}.{j}": each for j, each in enumerate(values)}
            clearing(net)
            sum((each * torch.randn(each.shape)).sum() for each in values).backward()
        return observed.see_gradients(net)

    agree(program, *NODES[node])


@EVERY_NODE
@EVERY_MODE
def test_a_tensor_as_reset_value_is_written_into_the_state(mode: str, node: str) -> None:
    """``reset()`` then writes into the membrane potential itself, here before the backward of the
    steps that made it."""

    def program(make: MakeNeuron) -> Observed:
        net = Net(make, "linear", mode, _options(node))
        for i, features in ((1, 6), (4, 4)):
            net[i].set_reset_value("v", torch.rand(BATCH, features))
        functional.reset_net(net)
        observed = Observed()
        for i in range(3):
            values = [*net.run(draw("linear", 5, torch.float32)), net[1].v * 1, net[4].v * 1]
            functional.reset_net(net)
            sum((each * torch.randn(each.shape)).sum() for each in values).backward()
            observed.exact |= {f"{i}.{j}": each for j, each in enumerate([*values, net[1].v])}
        return observed.see_gradients(net)

    agree(program, *NODES[node])


@EVERY_NODE
def test_a_tensor_as_reset_value_after_steps_on_plain_input(node: str) -> None:
    """The potential's history cannot be recomputed from an input that no operation made, so it must
    not be lost either."""

    def program(make: MakeNeuron) -> Observed:
        lif = make(**_options(node))
        lif.set_reset_value("v", torch.rand(BATCH, 6))
        lif.reset()
        x = torch.randn(5, BATCH, 6, requires_grad=True)
        spikes = torch.stack([lif(frame) for frame in x])
        lif.reset()
        (spikes * torch.randn(spikes.shape)).sum().backward()
        return Observed({"spikes": spikes, "v": lif.v}).see_gradients(lif, x=x)

    agree(program, *NODES[node])


@EVERY_NODE
@pytest.mark.parametrize("order", ["sm", "ms", "smsm"])
def test_set_step_mode_between_calls(order: str, node: str) -> None:
    def program(make: MakeNeuron) -> Observed:
        net = Net(make, "conv", "s", _options(node, v_reset=None))
        values = []
        for mode in order:
            functional.set_step_mode(net, mode)
            values += net.run(draw("conv", 4, torch.float32))
        sum((each * torch.randn(each.shape)).sum() for each in values).backward()
        return Observed({str(i): each for i, each in enumerate(values)}).see_gradients(net)

    agree(program, *NODES[node])


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "v_threshold": lambda node: setattr(node, "v_threshold", 0.5),
    "v_reset": lambda node: setattr(node, "v_reset", None),
    "detach_reset": lambda node: setattr(node, "detach_reset", True),
    "decay_input": lambda node: setattr(node, "decay_input", False),
    "tau": lambda node: setattr(node, "tau", 1.5),
    "surrogate_function": lambda node: setattr(node, "surrogate_function", surrogate.Sigmoid(3.0)),
    "alpha": lambda node: setattr(node.surrogate_function, "alpha", 0.5),
    "spiking": lambda node: node.surrogate_function.set_spiking_mode(False),
    "store_v_seq": lambda node: setattr(node, "store_v_seq", True),
}


@EVERY_MODE
@pytest.mark.parametrize("name", CHANGES)
def test_an_option_changed_between_two_calls(name: str, mode: str) -> None:
    def program(make: MakeNeuron) -> Observed:
        net = Net(make, "linear", mode, {**_options("LIF"), "surrogate_function": surrogate.ATan()})
        values = [*net.run(draw("linear", 4, torch.float32))]
        for i in (1, 4):
            CHANGES[name](net[i])
        values += net.run(draw("linear", 4, torch.float32))
        sum((each * torch.randn(each.shape)).sum() for each in values).backward()
        return Observed({str(i): each for i, each in enumerate([*values, net[1].v])}).see_gradients(
            net
        )

    agree(program, *NODES["LIF"], path="both" if name == "spiking" else "reversible")


@EVERY_MODE
def test_graded_spikes_take_the_hosts_path(mode: str) -> None:
    def program(make: MakeNeuron) -> Observed:
        net = Net(
            make, "linear", mode, _options("LIF", surrogate_function=surrogate.ATan(spiking=False))
        )
        return train(net, draw("linear", 5, torch.float32))

    agree(program, *NODES["LIF"], path="host", reason="Heaviside")


@EVERY_NODE
@EVERY_MODE
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 0)], ids=str)
def test_scalar_and_empty_inputs(shape: tuple[int, ...], mode: str, node: str) -> None:
    def program(make: MakeNeuron) -> Observed:
        lif = make(step_mode=mode, **_options(node))
        x = torch.rand(4, *shape, requires_grad=True)
        spikes = lif(x * 2) if mode == "m" else torch.stack([lif(frame) for frame in x * 2])
        (spikes.sum() + lif.v.sum()).backward()
        return Observed({"spikes": spikes, "v": lif.v}).see_gradients(lif, x=x)

    agree(program, *NODES[node], path="small")


@only_pure
@EVERY_NODE
@EVERY_MODE
def test_state_of_another_shape_or_dtype_starts_as_the_host_does(mode: str, node: str) -> None:
    def program(make: MakeNeuron) -> Observed:
        lif, values = make(step_mode=mode, **_options(node, v_reset=-0.1)), []
        for batch, dtype in (
            (BATCH, torch.float32),
            (BATCH, torch.float64),
            (BATCH, torch.float32),
            (BATCH // 2, torch.float32),
            (BATCH // 2, torch.float16),
        ):
            lif.to(dtype)
            x = torch.randn(
                *((2,) if mode == "m" else ()), batch, 4, dtype=dtype, requires_grad=True
            )
            values += [lif(x * 2), lif.v]
        sum(each.double().sum() for each in values).backward()
        return Observed({str(i): each for i, each in enumerate(values)}).see_gradients(lif, x=x)

    agree(program, *NODES[node])


@only_pure
@EVERY_NODE
@pytest.mark.parametrize(
    "mixed", [(torch.float16, torch.float32), (torch.float32, torch.float64)], ids=str
)
def test_the_pure_transitions(mixed: tuple[torch.dtype, torch.dtype], node: str) -> None:
    """``functional_forward`` and its parts leave the module's own state alone; input and state may
    differ in dtype."""

    def program(make: MakeNeuron) -> Observed:
        observed = Observed()
        for mode in "sm":
            lif = make(step_mode=mode, **_options(node))
            x, v = (
                torch.randn(3, 4, dtype=mixed[0], requires_grad=True),
                torch.randn(4, dtype=mixed[1], requires_grad=True),
            )
            transition = (
                lif.multi_step_functional_forward
                if mode == "m"
                else lif.single_step_functional_forward
            )
            (spikes,), (after,) = transition((x * 2 if mode == "m" else x[0] * 2,), (v,))
            (spikes.double().sum() + (after.double() * torch.arange(4)).sum()).backward()
            (again,), (v2,) = lif.functional_forward((torch.randn(3, 4),), (0.0,))
            assert isinstance(lif.v, float)
            observed.exact |= {
                f"{mode}{i}": each for i, each in enumerate((spikes, after, again, v2))
            }
            observed.gradients |= {f"{mode}x": x.grad, f"{mode}v": v.grad}
        return observed

    agree(program, *NODES[node], path="any")


@only_pure
@EVERY_NODE
@EVERY_MODE
def test_to_functional_forward(mode: str, node: str) -> None:
    def program(make: MakeNeuron) -> Observed:
        net = Net(make, "linear", mode, _options(node, v_reset=None))
        forward = base.to_functional_forward(net)
        x, states = (
            draw("linear", 3, torch.float32),
            list(net[1].memories()) + list(net[4].memories()),
        )
        outputs = []
        for part in x.unsqueeze(1) if mode == "m" else x:
            (output,), states = forward((part,), tuple(states))
            outputs.append(output)
        seen = torch.stack(outputs)
        (seen * torch.randn(seen.shape)).sum().backward()
        return Observed({"seen": seen, "v": states[-1]}).see_gradients(net, x=x)

    agree(program, *NODES[node])


@EVERY_MODE
def test_monitors_record_what_they_record_of_the_host(mode: str) -> None:
    if not PURE:
        pytest.importorskip(
            "tensorboard", reason="SpikingJelly 0.0.0.0.14's monitors need it and do not bring it"
        )
    from spikingjelly.activation_based import monitor

    def program(make: MakeNeuron) -> Observed:
        net = Net(make, "linear", mode, _options("LIF", store_v_seq=mode == "m"))
        nodes = neuron.BaseNode
        outputs, inputs = monitor.OutputMonitor(net, nodes), monitor.InputMonitor(net, nodes)
        states = monitor.AttributeMonitor(
            "v_seq" if mode == "m" else "v", False, net, nodes, lambda v: v.clone()
        )
        grads_in, grads_out = (
            monitor.GradInputMonitor(net, nodes),
            monitor.GradOutputMonitor(net, nodes),
        )
        observed = train(net, draw("linear", 6, torch.float32))
        for name, each in (("output", outputs), ("input", inputs), ("state", states)):
            observed.exact |= {f"{name}{i}": record for i, record in enumerate(each.records)}
        for name, each in (("grad_in", grads_in), ("grad_out", grads_out)):
            assert each.records
            observed.gradients |= {f"{name}{i}": record for i, record in enumerate(each.records)}
        for each in (outputs, inputs, states, grads_in, grads_out):
            each.close() if PURE else each.remove_hooks()
        return observed

    agree(program, *NODES["LIF"])


def test_containers_drive_ours_as_they_drive_the_host() -> None:
    def program(make: MakeNeuron) -> Observed:
        net = nn.Sequential(
            layer.SeqToANNContainer(
                nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.MaxPool2d(2)
            ),
            make(step_mode="m", **_options("LIF", detach_reset=True)),
            layer.MultiStepContainer(nn.Sequential(nn.Conv2d(3, 4, 3), make(**_options("LIF")))),
            nn.Flatten(2),
            layer.LinearRecurrentContainer(make(**_options("LIF")), 16, 16, step_mode="m"),
        )
        x = torch.randn(5, 30, 2, 9, 9, requires_grad=True)
        y = net[:2](x * 2)
        y = net[2:](y)
        (y * torch.randn(y.shape)).sum().backward()
        return Observed({"y": y} | dict(net.named_buffers())).see_gradients(net, x=x)

    agree(program, *NODES["LIF"])


def test_found_by_name_in_the_hosts_module() -> None:
    for name in ("RevIFNode", "RevLIFNode", "RevParametricLIFNode"):
        assert getattr(neuron, name) is globals()[name]


@pytest.mark.parametrize("name", ["spiking_resnet18", "sew_resnet18", "spiking_vgg11_bn"])
def test_model_builders_take_our_class(name: str) -> None:
    from spikingjelly.activation_based.model import sew_resnet, spiking_resnet, spiking_vgg

    builders = {
        "spiking_resnet18": lambda node: spiking_resnet.spiking_resnet18(
            spiking_neuron=node, num_classes=3
        ),
        "sew_resnet18": lambda node: sew_resnet.sew_resnet18(
            spiking_neuron=node, cnf="ADD", num_classes=3
        ),
        "spiking_vgg11_bn": lambda node: spiking_vgg.spiking_vgg11_bn(
            spiking_neuron=node, num_classes=3
        ),
    }
    nets = []
    for node in (neuron.LIFNode, RevLIFNode):
        torch.manual_seed(0)
        nets.append(builders[name](node))
    assert list(nets[0].state_dict()) == list(nets[1].state_dict())
    assert sum(isinstance(m, RevLIFNode) for m in nets[1].modules()) == sum(
        isinstance(m, neuron.LIFNode) for m in nets[0].modules()
    )


@EVERY_NODE
def test_state_dict_repr_and_memories_are_the_hosts(node: str) -> None:
    host, ours = (kind(v_reset=None, step_mode="m") for kind in NODES[node])
    for each in (host, ours):
        each(torch.randn(3, 2, requires_grad=True))
    assert list(ours.state_dict()) == list(host.state_dict())
    assert [name for name, _ in ours.named_memories()] == [
        name for name, _ in host.named_memories()
    ]
    assert repr(ours) == repr(host).replace(type(host).__name__, type(ours).__name__)
    host.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(host.state_dict(), strict=True)


@EVERY_NODE
@pytest.mark.parametrize(
    "options",
    [{"v_threshold": 1}, {"v_reset": 0}, {"detach_reset": 1}, {"taau": 2.0}, {"step_mode": "t"}],
)
def test_bad_options_raise_as_the_host_does(options: dict, node: str) -> None:
    errors = []
    for kind in NODES[node]:
        with pytest.raises((AssertionError, TypeError, ValueError)) as caught:
            kind(**options)
        errors.append((caught.type, str(caught.value).replace("Rev", "")))
    assert errors[0] == errors[1]


def test_a_learned_decay_follows_its_optimizer() -> None:
    """The distance between anchors follows the decay, which the optimizer changes."""

    def program(make: MakeNeuron) -> Observed:
        net = Net(
            make,
            "linear",
            "s",
            {"v_threshold": 0.8, "v_reset": None, "init_tau": 3.0, "decay_input": False},
        )
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
        losses = []
        for _ in range(5):
            functional.reset_net(net)
            _, spikes = net.run(draw("linear", 12, torch.float32))
            loss = (spikes.mean(0) - torch.tensor([0.9, 0.1, 0.5, 0.0])).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return Observed(
            {},
            {
                "losses": torch.stack(losses),
                "w": net[1].w.detach(),
                "weight": net[0].weight.detach(),
            },
        )

    agree(program, *NODES["PLIF"], tolerance=1e-4)


@only_pure
@EVERY_MODE
def test_learned_time_constant_that_the_host_widens_takes_its_path(mode: str) -> None:
    def program(make: MakeNeuron) -> Observed:
        net = Net(make, "linear", mode, _options("PLIF"))
        for i in (1, 4):
            net[i].bfloat16()
        return train(net, draw("linear", 4, torch.float32))

    agree(program, *NODES["PLIF"], path="host", reason="shorter dtype")

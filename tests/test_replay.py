"""Recipes in whole networks: who reads them and how often, what may be changed in between, and what
is left alive."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import pytest
import snntorch
import torch
import torch.nn.functional as F
from calls import Calls
from collector import no_garbage_collector
from compare import MakeNeuron, Observed, agree, assert_alive, assert_close
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import neuron as sj_neuron
from spikingjelly.activation_based import surrogate as sj_surrogate
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from snn_revplugin import use_settings
from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.adapters.spikingjelly import RevLIFNode
from snn_revplugin.report.memory import LiveBytes

pytestmark = pytest.mark.usefixtures("recompute_everything")

TIME_LOOP, ALL_STEPS = "time loop", "all steps"
NEURONS = {TIME_LOOP: (snntorch.Leaky, RevLeaky), ALL_STEPS: (sj_neuron.LIFNode, RevLIFNode)}
STYLES = pytest.mark.parametrize("style", NEURONS)
FEATURES, BATCH, STEPS = 8, 5, 7


def options(style: str, **more: object) -> dict[str, object]:
    """The arguments of a neuron that fires at some steps."""
    if style == TIME_LOOP:
        return {
            "beta": 0.9,
            "threshold": 0.4,
            "spike_grad": snn_surrogate.fast_sigmoid(slope=5),
        } | more
    return {
        "tau": 1.6,
        "v_threshold": 0.3,
        "surrogate_function": sj_surrogate.ATan(),
        "step_mode": "m",
    } | more


def data(*shape: int, steps: int = STEPS) -> Tensor:
    return torch.randn(steps, *(shape or (BATCH, FEATURES)))


class Layer:
    """A neuron of either host behind one call: from the current of a time step (of all) to its
    spikes."""

    def __init__(self, make: MakeNeuron, style: str, **more: object) -> None:
        self.style, self.neuron = style, make(**options(style, **more))
        self.potential: Tensor | None = None

    def __call__(self, current: Tensor) -> Tensor:
        if self.style == ALL_STEPS:
            spikes = self.neuron(current)
            self.potential = self.neuron.v
            return spikes
        if self.potential is None:
            self.potential = torch.zeros_like(current)
        spikes, self.potential = self.neuron(current, self.potential)
        return spikes


def over_time(style: str, step: Callable[[Tensor], Tensor], x_seq: Tensor) -> Tensor:
    """A network applied to each time step in turn, or to all of them at once."""
    return step(x_seq) if style == ALL_STEPS else torch.stack([step(x) for x in x_seq])


def weighted(spikes: Tensor) -> Tensor:
    """A loss in which every spike counts differently."""
    return (spikes * torch.linspace(-1, 2, spikes.numel()).to(spikes).view_as(spikes)).sum()


def linear() -> nn.Linear:
    return nn.Linear(FEATURES, FEATURES)


def two_layers(
    style: str,
    between: Callable[[nn.Module, Tensor], Tensor],
    build: Callable[[], nn.Module] = linear,
) -> Callable[[MakeNeuron], Observed]:
    """A program: linear, neuron, ``between`` of a module that is built anew and the spikes,
    neuron."""

    def program(make: MakeNeuron) -> Observed:
        first, module = linear(), build()
        below, above = Layer(make, style), Layer(make, style)
        x_seq = data().requires_grad_()
        out = over_time(style, lambda x: above(between(module, below(first(x)))), x_seq)
        assert_alive(out)
        (weighted(out) + above.potential.square().sum()).backward()
        buffers = {f"buffer {name}": each for name, each in module.named_buffers()}
        return Observed({"out": out} | buffers).see_gradients(first, module, x=x_seq)

    return program


CONVOLUTION = torch.ops.aten.convolution.default
ADDMM = torch.ops.aten.addmm.default


class ConvNet(nn.Module):
    """The tutorial's: conv, max pool, neuron, conv, max pool, neuron, linear, neuron, in its own
    time loop."""

    def __init__(self, neuron: type[snntorch.Leaky]) -> None:
        super().__init__()
        self.conv1, self.lif1 = nn.Conv2d(1, 4, 3), neuron(**options(TIME_LOOP))
        self.conv2, self.lif2 = nn.Conv2d(4, 6, 3), neuron(**options(TIME_LOOP))
        self.fc, self.lif3 = nn.Linear(24, 5), neuron(**options(TIME_LOOP))

    def forward(self, x_seq: Tensor) -> Tensor:
        mem1 = mem2 = mem3 = torch.zeros(0)
        out = []
        for x in x_seq:
            spk, mem1 = self.lif1(
                F.max_pool2d(self.conv1(x), 2), self._like(mem1, (len(x), 4, 6, 6))
            )
            spk, mem2 = self.lif2(
                F.max_pool2d(self.conv2(spk), 2), self._like(mem2, (len(x), 6, 2, 2))
            )
            spk, mem3 = self.lif3(self.fc(spk.flatten(1)), self._like(mem3, (len(x), 5)))
            out.append(mem3)
        return torch.stack(out)

    @staticmethod
    def _like(mem: Tensor, shape: tuple[int, ...]) -> Tensor:
        return mem if mem.numel() else torch.zeros(shape)


def images(steps: int = STEPS, size: int = 14) -> Tensor:
    return torch.rand(steps, 3, 1, size, size) * 2


class TestReaders:
    """A recipe's value lives from its first to its last reader of one backward."""

    def test_computed_once_a_step(self) -> None:
        """By max pooling's indices and by the neuron that reverses time, in either layer."""
        net = ConvNet(RevLeaky)
        with use_settings(match_host_order=True):  # which recomputes step by step
            loss = weighted(net(images()))
        with Calls(CONVOLUTION) as calls:
            loss.backward()
        assert calls.count[CONVOLUTION] <= 2 * STEPS
        assert calls.count[CONVOLUTION] >= 2 * (STEPS - 1)
        assert calls.most_alive <= 2  # one a layer
        assert calls.alive == 0

    def test_computed_once_for_many_readers(self) -> None:
        """One current that two neurons, a product and a relu read."""
        x_seq, fc = data(), nn.Linear(FEATURES, FEATURES)
        below, one, other = (RevLeaky(**options(TIME_LOOP)) for _ in range(3))
        mem_below, mem_one, mem_other = (torch.zeros(BATCH, FEATURES) for _ in range(3))
        loss = torch.zeros(())
        scale = nn.Parameter(torch.full((FEATURES,), 1.5))
        with use_settings(match_host_order=True):
            for x in x_seq:
                spikes, mem_below = below(x * scale, mem_below)
                current = fc(spikes)
                a, mem_one = one(current * current + F.relu(current), mem_one)
                b, mem_other = other(current, mem_other)
                loss = loss + weighted(a) + weighted(b)
        with Calls(ADDMM) as calls:
            loss.backward()
        assert STEPS - 1 <= calls.count[ADDMM] <= STEPS
        assert calls.most_alive <= 1 and calls.alive == 0

    def test_once_in_every_pass_of_a_kept_graph(self) -> None:
        net = ConvNet(RevLeaky)
        loss = weighted(net(images()))
        counts = []
        for _ in range(3):
            with Calls(CONVOLUTION) as calls:
                loss.backward(retain_graph=True)
            counts.append(calls.count[CONVOLUTION])
            assert calls.alive == 0
        assert len(set(counts)) == 1

    def test_a_static_input_is_computed_once_a_pass(self) -> None:
        """An image shown at every time step goes through the first layer each time, but only once
        in backward."""
        net, image = ConvNet(RevLeaky), images(1)[0]
        loss = weighted(net([image] * STEPS))
        with Calls(CONVOLUTION) as calls:
            loss.backward(retain_graph=True)
        assert calls.count[CONVOLUTION] <= 1 + STEPS
        with Calls(CONVOLUTION) as calls:
            loss.backward()
        assert calls.count[CONVOLUTION] <= 1 + STEPS
        assert calls.alive == 0

    def test_a_static_input_is_the_hosts(self) -> None:
        def program(make: MakeNeuron) -> Observed:
            net, image = ConvNet(make), torch.rand(3, 1, 14, 14)
            out = net([image] * STEPS)
            weighted(out).backward(retain_graph=True)
            weighted(out.square()).backward()
            weighted(net([image] * 2 + [image.clone()] * 2)).backward()
            return Observed({"out": out}).see_gradients(net)

        agree(program, snntorch.Leaky, RevLeaky)


def gradient_bytes(net: nn.Module) -> int:
    return sum(
        each.grad.untyped_storage().nbytes() for each in net.parameters() if each.grad is not None
    )


class SequenceNet(nn.Module):
    """Conv, batch norm, neuron, twice, and a linear layer; SpikingJelly's, all steps at once."""

    def __init__(self, neuron: type[sj_neuron.LIFNode], **more: object) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for channels in ((1, 4), (4, 6)):
            conv, norm = nn.Conv2d(*channels, 3, bias=False), nn.BatchNorm2d(channels[1])
            self.layers.append(
                nn.ModuleList([nn.Sequential(conv, norm), neuron(**options(ALL_STEPS, **more))])
            )
        self.fc = nn.Linear(6, 5)

    def forward(self, x_seq: Tensor) -> Tensor:
        for weigh, neuron in self.layers:
            neuron.reset()
            x_seq = neuron(weigh(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2]))
        return self.fc(x_seq.mean((-1, -2)))


NETS = {
    TIME_LOOP: lambda: ConvNet(RevLeaky),
    ALL_STEPS: lambda: SequenceNet(RevLIFNode),
    "all steps, soft reset": lambda: SequenceNet(RevLIFNode, v_reset=None),
}
EVERY_NET = pytest.mark.parametrize("kind", NETS)


class TestMemory:
    """Nothing outlives its use, whatever becomes of the backward pass."""

    @EVERY_NET
    def test_returns_to_its_start(self, kind: str) -> None:
        """With a backward and without, and without the garbage collector."""
        net, x = NETS[kind](), images()
        weighted(net(x)).backward()
        with no_garbage_collector(), LiveBytes() as live:
            weighted(net(x)).backward()
            after_one = live.now()
            for _ in range(3):
                weighted(net(x)).backward()
                assert live.now() == after_one
                weighted(net(x))
            weighted(net(x)).backward()
            assert live.now() == after_one
            for each in (
                net.modules()
            ):  # both hosts' neurons hold their last potential, and its graph, as state
                if isinstance(each, snntorch.Leaky):
                    each.mem = each.reset = torch.zeros(0)
                elif isinstance(each, sj_neuron.LIFNode):
                    each.reset()
            assert live.now() == 0

    @EVERY_NET
    def test_the_input_is_let_go(self, kind: str) -> None:
        net, x = NETS[kind](), images()
        memory = weakref.ref(x.untyped_storage())
        with no_garbage_collector():
            out = net(x)
            del x
            assert memory() is not None
            weighted(out).backward()
            assert memory() is None

    @EVERY_NET
    def test_a_kept_graph_holds_no_more_after_each_pass(self, kind: str) -> None:
        net, x = NETS[kind](), images()
        with no_garbage_collector(), LiveBytes() as live:
            loss = weighted(net(x))
            after_forward = live.now()
            for _ in range(3):
                loss.backward(retain_graph=True)
                assert live.now() - gradient_bytes(net) == after_forward

    @EVERY_NET
    def test_a_loss_on_some_steps_only(self, kind: str) -> None:
        """Readers that never come: the steps after the loss are not walked."""
        net, x = NETS[kind](), images()
        with no_garbage_collector(), LiveBytes() as live:
            out = net(x)
            after_forward = live.now()
            weighted(out[STEPS // 2]).backward(retain_graph=True)
            assert live.now() - gradient_bytes(net) == after_forward
            weighted(out[1]).backward(retain_graph=True)
            assert live.now() - gradient_bytes(net) == after_forward

    @EVERY_NET
    def test_gradients_of_some_inputs_only(self, kind: str) -> None:
        """Part of the graph is not run, and there are readers that never come."""
        net, x = NETS[kind](), images()
        with no_garbage_collector(), LiveBytes() as live:
            loss = weighted(net(x))
            after_forward = live.now()
            some = list(net.parameters())[-3:]
            grads = torch.autograd.grad(loss, some, retain_graph=True)
            expected = [each.clone() for each in grads]
            del grads
            assert live.now() - sum(each.nbytes for each in expected) == after_forward
            loss.backward()
            assert all(
                torch.allclose(p.grad, g, rtol=1e-5, atol=1e-6)
                for p, g in zip(some, expected, strict=True)
            )

    @pytest.mark.parametrize("at", range(0, 2 * STEPS, 3))
    def test_an_exception_in_backward(self, at: int) -> None:
        """Also while the graph is held; and a second backward through it is right."""
        net, x, tensors = ConvNet(RevLeaky), images(), []
        net.conv2.register_forward_hook(lambda _, inputs, out: tensors.extend((inputs[0], out)))
        with no_garbage_collector(), LiveBytes() as live:
            out = net(x)
            loss = weighted(out)
            weighted(out).backward(retain_graph=True)
            expected = [p.grad for p in net.parameters()]
            net.zero_grad()
            before = live.now()

            def interrupt(_: Tensor) -> None:
                raise KeyboardInterrupt

            hook = tensors[at].register_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                loss.backward(retain_graph=True)
            handed_down = out[
                0
            ].nbytes  # the potential of a step that backward has not come to waits there for it
            assert live.now() - gradient_bytes(net) <= before + handed_down
            net.zero_grad()
            hook.remove()
            loss.backward(retain_graph=True)
            assert live.now() - gradient_bytes(net) == before
            for i, (parameter, gradient) in enumerate(zip(net.parameters(), expected, strict=True)):
                assert_close(str(i), gradient, parameter.grad, tolerance=1e-5)

    def test_an_exception_in_backward_of_a_graph_that_is_dropped(self) -> None:
        net, x = ConvNet(RevLeaky), images()
        weighted(net(x)).backward()

        def interrupt(_: Tensor) -> None:
            raise KeyboardInterrupt

        with (
            no_garbage_collector(),
            LiveBytes() as live,
        ):
            weighted(net(x)).backward()
            before = live.now()

            def interrupt_later(module: nn.Module, inputs: tuple, out: Tensor) -> None:
                out.register_hook(interrupt)

            hook = net.conv2.register_forward_hook(interrupt_later)
            try:
                weighted(net(x)).backward()
            except KeyboardInterrupt as error:
                error.__traceback__ = None  # its frames hold the loss
            else:
                pytest.fail("the hook did not run")
            hook.remove()
            weighted(net(x)).backward()
            assert live.now() == before


@STYLES
class TestNetworks:
    """Gradients are the host's, whatever the network looks like."""

    def test_residual_sums(self, style: str) -> None:
        def program(make: MakeNeuron) -> Observed:
            weights = nn.ModuleList([linear() for _ in range(4)])
            layers = [Layer(make, style) for _ in weights]

            def step(x: Tensor) -> Tensor:
                x = layers[0](weights[0](x))
                for weigh, layer in zip(weights[1:], layers[1:], strict=True):
                    x = layer(weigh(x)) + x  # of spikes: SEW-ResNet
                return x

            x_seq = data().requires_grad_()
            out = over_time(style, step, x_seq)
            weighted(out).backward()
            return Observed({"out": out}).see_gradients(weights, x=x_seq)

        agree(program, *NEURONS[style])

    def test_membrane_shortcuts(self, style: str) -> None:
        """The stream between the blocks is of floats: every block's current reaches down through
        all those below."""

        def program(make: MakeNeuron) -> Observed:
            weights = nn.ModuleList([linear() for _ in range(4)])
            layers = [Layer(make, style) for _ in weights]

            def step(x: Tensor) -> Tensor:
                for weigh, layer in zip(weights, layers, strict=True):
                    x = x + weigh(layer(x))
                return x

            x_seq = data().requires_grad_()
            out = over_time(style, step, x_seq)
            weighted(out).backward()
            return Observed({"out": out}).see_gradients(weights, x=x_seq)

        agree(program, *NEURONS[style])

    def test_concatenations(self, style: str) -> None:
        def program(make: MakeNeuron) -> Observed:
            sizes = FEATURES, 2 * FEATURES, 3 * FEATURES
            weights = nn.ModuleList([nn.Linear(size, FEATURES) for size in sizes])
            layers = [Layer(make, style) for _ in weights]

            def step(x: Tensor) -> Tensor:
                x = layers[0](weights[0](x))
                for weigh, layer in zip(weights[1:], layers[1:], strict=True):
                    x = torch.cat(
                        [
                            layer(
                                weigh(x if weigh is not weights[1] else torch.cat([x, 1 - x], -1))
                            ),
                            x,
                            x,
                        ],
                        -1,
                    )
                return x

            x_seq = data().requires_grad_()
            out = over_time(style, step, x_seq)
            weighted(out).backward()
            return Observed({"out": out}).see_gradients(weights, x=x_seq)

        agree(program, *NEURONS[style])

    def test_tied_weights(self, style: str) -> None:
        """The same layer within a current twice, and in two currents."""

        def program(make: MakeNeuron) -> Observed:
            weigh = linear()
            below, middle, above = (Layer(make, style) for _ in range(3))
            x_seq = data().requires_grad_()
            out = over_time(
                style, lambda x: above(weigh(weigh(middle(weigh(below(weigh(x))))))), x_seq
            )
            weighted(out).backward()
            return Observed({"out": out}).see_gradients(weigh, x=x_seq)

        agree(program, *NEURONS[style])

    def test_one_current_for_two_neurons(self, style: str) -> None:
        def program(make: MakeNeuron) -> Observed:
            weights = nn.ModuleList([linear() for _ in range(2)])
            below, one, other = Layer(make, style), Layer(make, style), Layer(make, style)

            def step(x: Tensor) -> Tensor:
                current = weights[1](below(weights[0](x)))
                return one(current) + 2 * other(current)

            x_seq = data().requires_grad_()
            out = over_time(style, step, x_seq)
            weighted(out).backward()
            return Observed({"out": out}).see_gradients(weights, x=x_seq)

        agree(program, *NEURONS[style])

    def test_one_current_whose_first_neuron_is_dropped(self, style: str) -> None:
        """Its recipe died with it; what it replaced in the graph is there for the second."""

        def program(make: MakeNeuron) -> Observed:
            weights = nn.ModuleList([linear() for _ in range(2)])
            below, above = Layer(make, style), Layer(make, style)

            def step(x: Tensor) -> Tensor:
                current = F.relu(weights[1](below(weights[0](x)))) - 0.1
                Layer(make, style)(current)
                snntorch.SpikingNeuron.instances.clear()
                return above(current)

            x_seq = data().requires_grad_()
            out = over_time(style, step, x_seq)
            weighted(out).backward()
            return Observed({"out": out}).see_gradients(weights, x=x_seq)

        agree(program, *NEURONS[style])

    def test_spikes_for_two_layers(self, style: str) -> None:
        def program(make: MakeNeuron) -> Observed:
            weights = nn.ModuleList([linear() for _ in range(3)])
            below, one, other = Layer(make, style), Layer(make, style), Layer(make, style)

            def step(x: Tensor) -> Tensor:
                spikes = below(weights[0](x))
                return one(weights[1](spikes)) + 2 * other(weights[2](spikes)) * spikes

            x_seq = data().requires_grad_()
            out = over_time(style, step, x_seq)
            weighted(out).backward()
            return Observed({"out": out}).see_gradients(weights, x=x_seq)

        agree(program, *NEURONS[style])

    def test_a_current_that_the_loss_reads_too(self, style: str) -> None:
        def program(make: MakeNeuron) -> Observed:
            weights = nn.ModuleList([linear() for _ in range(2)])
            below, above, currents = Layer(make, style), Layer(make, style), []

            def step(x: Tensor) -> Tensor:
                currents.append(F.relu(weights[1](below(weights[0](x)))))
                return above(currents[-1])

            x_seq = data().requires_grad_()
            out = over_time(style, step, x_seq)
            (weighted(out) + sum(weighted(each.square()) for each in currents)).backward()
            return Observed({"out": out}).see_gradients(weights, x=x_seq)

        agree(program, *NEURONS[style])

    @pytest.mark.parametrize("product", ["current", "spikes", "both"])
    def test_products_with_itself(self, style: str, product: str) -> None:
        between = {
            "current": lambda weigh, s: weigh(s) * weigh(s),
            "spikes": lambda weigh, s: s * s + weigh(s),
            "both": lambda weigh, s: (c := weigh(s)) * s * c + s * 0.5,
        }
        agree(two_layers(style, between[product]), *NEURONS[style])

    def test_weights_that_are_computed(self, style: str) -> None:
        """Weight norm; and a weight that another layer gives."""

        def program(make: MakeNeuron) -> Observed:
            net = nn.ModuleList([weight_norm(linear()), linear()])
            scale = nn.Parameter(torch.linspace(0.5, 1.5, FEATURES))
            below, above = Layer(make, style), Layer(make, style)

            def step(x: Tensor) -> Tensor:
                spikes = below(net[0](x))
                return above(net[0](spikes) + F.linear(spikes, net[1].weight * scale, net[1].bias))

            x_seq = data().requires_grad_()
            out = over_time(style, step, x_seq)
            weighted(out).backward()
            return Observed({"out": out}).see_gradients(net, x=x_seq, scale=scale)

        agree(program, *NEURONS[style])

    def test_double_precision(self, style: str) -> None:
        def program(make: MakeNeuron) -> Observed:
            weights = nn.ModuleList([linear() for _ in range(2)]).double()
            below, above = Layer(make, style), Layer(make, style)
            x_seq = data().double().requires_grad_()
            out = over_time(
                style, lambda x: above(weights[1](below(weights[0](x)).to(x.dtype))), x_seq
            )
            weighted(out).backward()
            return Observed({"out": out}).see_gradients(weights, x=x_seq)

        agree(program, *NEURONS[style])

    def test_bfloat16_by_autocast(self, style: str) -> None:
        """Values come back in the dtypes that autocast chose; backward runs outside of it, as torch
        advises."""

        def program(make: MakeNeuron) -> Observed:
            weights = nn.ModuleList([linear() for _ in range(3)])
            norm = nn.LayerNorm(FEATURES)
            below, middle, above = (Layer(make, style) for _ in range(3))
            x_seq = data().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                out = over_time(
                    style,
                    lambda x: above(norm(weights[2](middle(weights[1](below(weights[0](x))))))),
                    x_seq,
                )
                loss = weighted(out.float())
            loss.backward()
            return Observed({"out": out}).see_gradients(weights, norm, x=x_seq)

        agree(program, *NEURONS[style], tolerance=1.6e-2)  # two roundings of bfloat16

    def test_without_gradient_in_between(self, style: str) -> None:
        """An evaluation between forward and backward."""

        def program(make: MakeNeuron) -> Observed:
            weights = nn.ModuleList([linear() for _ in range(2)])
            below, above = Layer(make, style), Layer(make, style)

            def step(x: Tensor) -> Tensor:
                return above(weights[1](below(weights[0](x))))

            x_seq, kept = data().requires_grad_(), []
            out = over_time(style, step, x_seq)
            for layer in (below, above):
                kept.append(layer.potential)
                layer.potential = None
                if style == ALL_STEPS:
                    layer.neuron.reset()
            with torch.no_grad():
                evaluated = over_time(style, step, x_seq)
            weighted(out).backward()
            return Observed({"out": out, "evaluated": evaluated}).see_gradients(weights, x=x_seq)

        agree(program, *NEURONS[style], path="both")


@STYLES
class TestFrozen:
    """A parameter that asks for no gradient: autograd saves other tensors, or none."""

    NAMES = "norm.weight", "norm.bias", "conv.weight", "conv.bias", "fc.weight", "fc.bias"

    @pytest.mark.parametrize(
        "frozen",
        [*((name,) for name in NAMES), NAMES[:2], NAMES[2:4], NAMES[4:], NAMES[:4], NAMES],
        ids=" ".join,
    )
    @pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
    def test_gradients(self, style: str, frozen: tuple[str, ...], training: bool) -> None:
        def build() -> nn.Module:
            net = nn.ModuleDict(
                {
                    "norm": nn.BatchNorm1d(1),
                    "conv": nn.Conv1d(1, 3, 3),
                    "fc": nn.Linear(18, FEATURES),
                }
            )
            net["norm"].train(training)
            for name in frozen:
                net.get_parameter(name).requires_grad_(False)
            return net

        def between(net: nn.Module, spikes: Tensor) -> Tensor:
            lines = net["conv"](net["norm"](spikes.reshape(-1, 1, FEATURES)))
            return net["fc"](lines.flatten(1)).view(spikes.shape)

        agree(two_layers(style, between, build), *NEURONS[style])


def changes() -> dict[str, Callable[[nn.Module], None]]:
    """What may happen to parameters between forward and backward."""

    def step_optimizer(net: nn.Module) -> None:
        for each in net.parameters():
            each.grad = torch.ones_like(each)
        torch.optim.SGD(net.parameters(), 0.1).step()

    def load(net: nn.Module) -> None:
        net.load_state_dict({name: each + 1 for name, each in net.state_dict().items()})

    def edit(net: nn.Module) -> None:
        with torch.no_grad():
            net.weight.mul_(2)

    return {"optimizer.step": step_optimizer, "load_state_dict": load, "an edit": edit}


@STYLES
class TestChangedInPlace:
    """A tensor that was written into between forward and backward."""

    @pytest.mark.parametrize("how", changes())
    @pytest.mark.parametrize(
        ("build", "between"),
        [
            (linear, lambda fc, s: fc(s)),
            (lambda: nn.Linear(FEATURES, FEATURES, bias=False), lambda fc, s: fc(s)),
            (
                lambda: nn.Conv1d(1, 2, 3, 2, 1, bias=False),
                lambda conv, s: conv(s.reshape(-1, 1, FEATURES)).view(s.shape),
            ),
            (
                lambda: nn.BatchNorm1d(FEATURES),
                lambda norm, s: norm(s.view(-1, FEATURES)).view(s.shape),
            ),
            (lambda: nn.LayerNorm(FEATURES), lambda norm, s: norm(s)),
        ],
        ids=["linear", "linear without bias", "conv", "batch norm", "layer norm"],
    )
    def test_parameters(
        self,
        style: str,
        how: str,
        build: Callable[[], nn.Module],
        between: Callable[[nn.Module, Tensor], Tensor],
    ) -> None:
        """An error like autograd's own, that tells which; and the next step is right."""
        torch.manual_seed(0)
        module, first = build(), linear()
        host, ours = NEURONS[style]
        below, above = Layer(ours, style), Layer(ours, style)
        out = over_time(style, lambda x: above(between(module, below(first(x)))), data())
        changes()[how](module)
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as raised:
            weighted(out).backward()
        assert any(str(list(each.shape))[1:-1] in str(raised.value) for each in module.parameters())
        agree(two_layers(style, between, build), host, ours)

    def test_a_bias(self, style: str) -> None:
        """Autograd does not save it, but the current is recomputed with it."""
        torch.manual_seed(0)
        module, first = linear(), linear()
        below, above = (Layer(NEURONS[style][1], style) for _ in range(2))
        out = over_time(style, lambda x: above(module(below(first(x)))), data())
        with torch.no_grad():
            module.bias.add_(1)
        with pytest.raises(
            RuntimeError, match=rf"parameter of shape \({FEATURES},\) is at version"
        ):
            weighted(out).backward()

    def test_the_input(self, style: str) -> None:
        torch.manual_seed(0)
        conv = nn.Conv1d(1, 1, 3, padding=1)
        above, x_seq = Layer(NEURONS[style][1], style), data()
        out = over_time(
            style, lambda x: above(conv(x.reshape(-1, 1, FEATURES)).view(x.shape)), x_seq
        )
        x_seq.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            weighted(out).backward()

    def test_running_statistics_of_training(self, style: str) -> None:
        """Those change in every forward pass and are no part of the gradient."""

        def program(make: MakeNeuron) -> Observed:
            first, norm = linear(), nn.BatchNorm1d(FEATURES)
            below, above = Layer(make, style), Layer(make, style)
            x_seq = data()
            out = over_time(
                style,
                lambda x: above(norm(below(first(x)).view(-1, FEATURES)).view(x.shape)),
                x_seq,
            )
            norm(torch.randn(4, FEATURES))
            weighted(out).backward()
            return Observed({"out": out} | dict(norm.named_buffers())).see_gradients(first, norm)

        agree(program, *NEURONS[style])

    EDITS = {  # noqa: RUF012
        "mul_": lambda s: s.mul_(0.5),
        "mul_ of a view": lambda s: s[..., 1:4].mul_(0.5),
        "set to zero": lambda s: s[..., 2].zero_(),
        "masked_fill_": lambda s: s.masked_fill_(torch.arange(FEATURES) % 3 == 0, 0.5),
    }
    USES = {  # noqa: RUF012
        "linear": lambda weigh, s: weigh(s),
        "linear of a view": lambda weigh, s: weigh(s.unflatten(-1, (2, -1)).flatten(-2)),
        "sum": lambda weigh, s: weigh(s * 0.5) + s,
        "alone": lambda weigh, s: s,
    }

    @pytest.mark.parametrize("use", USES)
    @pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "no_grad"])
    @pytest.mark.parametrize("edit", EDITS)
    def test_spikes_before_the_next_layer(
        self, style: str, edit: str, recorded: bool, use: str
    ) -> None:
        def between(weigh: nn.Module, spikes: Tensor) -> Tensor:
            with torch.set_grad_enabled(recorded):
                self.EDITS[edit](spikes)
            return self.USES[use](weigh, spikes)

        agree(two_layers(style, between), *NEURONS[style])

    @pytest.mark.parametrize("edit", EDITS)
    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "no_grad"])
    def test_a_current_before_or_after_the_neuron(
        self, style: str, edit: str, when: str, recorded: bool
    ) -> None:
        def program(make: MakeNeuron) -> Observed:
            first, second = linear(), linear()
            below, above = Layer(make, style), Layer(make, style)

            def step(x: Tensor) -> Tensor:
                current = second(below(first(x)))
                out = above(current) if when == "after" else None
                with torch.set_grad_enabled(recorded):
                    self.EDITS[edit](current)
                return above(current) if out is None else out

            x_seq = data().requires_grad_()
            out = over_time(style, step, x_seq)
            weighted(out).backward()
            return Observed({"out": out}).see_gradients(first, second, x=x_seq)

        agree(program, *NEURONS[style])

    def test_a_current_that_is_clipped_now_and_then(self, style: str) -> None:
        """An edit that autograd does not see, and that at most time steps changes nothing."""

        def program(make: MakeNeuron) -> Observed:
            first, second = linear(), linear()
            below, above = Layer(make, style), Layer(make, style)
            scale = iter([0.5, 0.5, 2.0, 0.5, 4.0, 1.0, 0.5])

            def step(x: Tensor) -> Tensor:
                current = second(below(first(x))) * next(scale)
                with torch.no_grad():
                    current.clamp_(-0.8, 0.8)
                return above(current)

            x_seq = data().requires_grad_()
            out = over_time(style, step, x_seq)
            weighted(out).backward()
            return Observed({"out": out}).see_gradients(first, second, x=x_seq)

        agree(program, *NEURONS[style])

    def test_a_current_that_is_edited_with_and_without_a_record(self, style: str) -> None:
        """The same operation and version, once of an in-place addition and once of an edit that
        autograd does not see."""

        def program(make: MakeNeuron) -> Observed:
            first, second = linear(), linear()
            below, above = Layer(make, style), Layer(make, style)
            in_place = iter([True, False] * STEPS if style == TIME_LOOP else [False])

            def step(x: Tensor) -> Tensor:
                spikes = below(first(x))
                current = second(spikes)
                if next(in_place):
                    current.add_(spikes)
                else:
                    current = current + spikes
                    with torch.no_grad():
                        current.mul_(0.5)
                return above(current)

            x_seq = data().requires_grad_()
            out = over_time(style, step, x_seq)
            weighted(out).backward()
            return Observed({"out": out}).see_gradients(first, second, x=x_seq)

        agree(program, *NEURONS[style])

    @pytest.mark.parametrize("edit", [None, "one step", "all steps"])
    def test_steps_of_a_sequence_whose_bias_torch_adds_in_place(
        self, style: str, edit: str | None
    ) -> None:
        """``nn.Linear`` does so where its input is not contiguous. The graph does not tell that
        from an edit under ``no_grad``, so forward recomputes the sequence to compare: once, not
        once per time step."""
        products = []

        def program(make: MakeNeuron) -> Observed:
            first, second = linear(), linear()
            below, *above = (Layer(make, style) for _ in range(3))
            x_seq = data(steps=24).requires_grad_()
            spikes = over_time(style, lambda x: below(first(x)), x_seq)
            currents = second(torch.stack(list(spikes), 1).transpose(0, 1))
            assert currents._version == 1  # not so inside of a dispatch mode, such as Calls
            with torch.no_grad():
                if edit is not None:
                    currents[7 if edit == "one step" else slice(None)].mul_(0.5)
            with Calls() as calls:
                halves = zip(above, (currents[:12], currents[12:]), strict=True)
                out = torch.cat([over_time(style, *each) for each in halves])
            products.append(calls.count[torch.ops.aten.mm.default])
            weighted(out).backward()
            return Observed({"out": out}).see_gradients(first, second, x=x_seq)

        agree(program, *NEURONS[style])
        assert products in ([0, 0], [0, 1])

    def test_data_that_is_overwritten_at_each_step(self, style: str) -> None:
        """One buffer for all time steps is right where no gradient needs the data."""

        def program(make: MakeNeuron) -> Observed:
            first, second = linear().requires_grad_(False), linear()
            below, above = Layer(make, style), Layer(make, style)
            frames, buffer = data(), torch.zeros(BATCH, FEATURES)

            def step(x: Tensor) -> Tensor:
                if style == TIME_LOOP:
                    buffer.copy_(x)
                    x = buffer
                return above(second(below(first(x))))

            out = over_time(style, step, frames)
            weighted(out).backward()
            return Observed({"out": out}).see_gradients(second)

        below, above = agree(program, *NEURONS[style], path="any")
        assert below.record.statistics.steps == 0 < above.record.statistics.steps


@STYLES
class TestHooks:
    """The graph shows a user what the host's graph shows."""

    def test_hooks_on_intermediate_tensors(self, style: str) -> None:
        def program(make: MakeNeuron) -> Observed:
            first, second = linear(), linear()
            below, above = Layer(make, style), Layer(make, style)
            seen, held = {}, []

            def watch(name: str, tensor: Tensor) -> Tensor:
                tensor.register_hook(
                    lambda grad: seen.__setitem__(f"{name} {len(seen)}", grad.clone())
                )
                return tensor

            def step(x: Tensor) -> Tensor:
                spikes = watch("spikes", below(watch("first", first(x))))
                summed = watch("sum", second(spikes) + spikes)
                held.append(summed)
                summed.retain_grad()
                return watch("out", above(F.relu(summed) * 1.5))

            x_seq = data()
            out = over_time(style, step, x_seq)
            weighted(out).backward()
            observed = Observed({"out": out}).see_gradients(first, second)
            observed.gradients |= seen | {f"held {i}": each.grad for i, each in enumerate(held)}
            return observed

        agree(program, *NEURONS[style])

    def test_hooks_that_change_the_gradient(self, style: str) -> None:
        def between(weigh: nn.Module, spikes: Tensor) -> Tensor:
            spikes.register_hook(lambda grad: grad * 2)
            current = weigh(spikes)
            current.register_hook(lambda grad: grad.clamp(-0.5, 0.5))
            return current + 0.1 * spikes

        agree(two_layers(style, between), *NEURONS[style])

    def test_hooks_on_parameters(self, style: str) -> None:
        def scale_gradient(parameter: Tensor) -> None:
            parameter.grad.mul_(5)

        def build() -> nn.Module:
            weigh = linear()
            weigh.weight.register_hook(lambda grad: grad * 3)
            weigh.bias.register_post_accumulate_grad_hook(scale_gradient)
            return weigh

        agree(two_layers(style, lambda weigh, spikes: weigh(spikes), build), *NEURONS[style])

    def test_hooks_of_modules(self, style: str) -> None:
        def program(make: MakeNeuron) -> Observed:
            first, second, seen = linear(), linear(), {}

            def look(module: nn.Module, grad_input: tuple, grad_output: tuple) -> None:
                seen[f"{len(seen)} in"], seen[f"{len(seen)} out"] = (
                    grad_input[0].clone(),
                    grad_output[0].clone(),
                )

            second.register_full_backward_hook(look)
            below, above = Layer(make, style), Layer(make, style)
            out = over_time(style, lambda x: above(second(below(first(x)))), data())
            weighted(out).backward()
            observed = Observed({"out": out}).see_gradients(first, second)
            observed.gradients |= seen
            return observed

        agree(program, *NEURONS[style])

    def test_saved_tensor_hooks_of_others_around_an_operation(self, style: str) -> None:
        """The neuron is called outside of them."""

        def between(weigh: nn.Module, spikes: Tensor) -> Tensor:
            with torch.autograd.graph.save_on_cpu():
                hidden = F.relu(weigh(spikes))
            return weigh(hidden)

        agree(two_layers(style, between), *NEURONS[style])

    def test_a_checkpoint_around_an_operation(self, style: str) -> None:
        """It is recomputed once, in backward, and not when the neuron looks at the graph."""
        calls: list[int] = []

        def block(weigh: nn.Module, spikes: Tensor) -> Tensor:
            calls.append(1)
            return F.relu(weigh(spikes)) @ weigh.weight

        def between(weigh: nn.Module, spikes: Tensor) -> Tensor:
            current = checkpoint(block, weigh, spikes, use_reentrant=False)
            return current + spikes

        host, ours = NEURONS[style]
        agree(two_layers(style, between), host, ours)
        torch.manual_seed(0)
        calls.clear()
        two_layers(style, between)(host)
        hosts = len(calls)
        calls.clear()
        two_layers(style, between)(ours)
        assert len(calls) == hosts


class TestThroughTime:
    """Currents that reach back in time."""

    def test_recurrent_spikes(self) -> None:
        def program(make: MakeNeuron) -> Observed:
            first, feedback = linear(), linear()
            layer, spikes = Layer(make, TIME_LOOP), torch.zeros(BATCH, FEATURES)
            out = []
            x_seq = data(steps=30).requires_grad_()
            for x in x_seq:
                spikes = layer(first(x) + feedback(spikes))
                out.append(spikes)
            out = torch.stack(out)
            weighted(out).backward()
            return Observed({"out": out}).see_gradients(first, feedback, x=x_seq)

        agree(program, snntorch.Leaky, RevLeaky)

    @pytest.mark.parametrize("steps", [30, 500])
    @pytest.mark.parametrize(
        "from_spikes", [True, False], ids=["from the first spikes", "from zeros"]
    )
    def test_a_trace_of_spikes(self, steps: int, from_spikes: bool) -> None:
        """A synapse's own leak, written out in the loop: each step's current depends on all spikes
        before it."""

        def program(make: MakeNeuron) -> Observed:
            first, second = linear(), linear()
            below, above = Layer(make, TIME_LOOP), Layer(make, TIME_LOOP)
            trace, out = torch.zeros(BATCH, FEATURES), []
            x_seq = data(steps=steps).requires_grad_()
            for x in x_seq:
                spikes = below(first(x))
                trace = 0.8 * trace + spikes if out or not from_spikes else spikes
                out.append(above(second(trace)))
            out = torch.stack(out)
            weighted(out).backward()
            return Observed({"out": out}).see_gradients(first, second, x=x_seq)

        agree(program, snntorch.Leaky, RevLeaky)

    def test_a_long_sum_before_the_neuron(self) -> None:
        """One current that hundreds of operations made."""

        def between(weigh: nn.Module, spikes: Tensor) -> Tensor:
            current = weigh(spikes)
            for _ in range(600):
                current = current * 0.99 + spikes * 0.01
            return current

        agree(two_layers(ALL_STEPS, between), *NEURONS[ALL_STEPS])

    @pytest.mark.parametrize("known", ["even", "odd", "first", "last"])
    @pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
    @pytest.mark.parametrize("delay", [True, False], ids=["delayed", "at once"])
    def test_currents_that_are_known_at_some_steps_only(
        self, known: str, reset: str, delay: bool
    ) -> None:
        """At the other steps an unknown operation is a boundary."""
        steps = 20
        is_known = {
            "even": lambda t: t % 2 == 0,
            "odd": lambda t: t % 2 == 1,
            "first": lambda t: t < steps // 2,
            "last": lambda t: t >= steps // 2,
        }[known]

        def program(make: MakeNeuron) -> Observed:
            first, second = linear(), linear()
            below, above = (
                Layer(make, TIME_LOOP),
                Layer(make, TIME_LOOP, reset_mechanism=reset, reset_delay=delay),
            )
            out, x_seq = [], data(steps=steps).requires_grad_()
            for t, x in enumerate(x_seq):
                current = second(below(first(x)))
                out.append(above(current if is_known(t) else current.sin()))
            out = torch.stack(out)
            (weighted(out) + above.potential.square().sum()).backward()
            return Observed({"out": out}).see_gradients(first, second, x=x_seq)

        agree(program, snntorch.Leaky, RevLeaky)

    @pytest.mark.parametrize("reset", [None, 0.0], ids=["soft", "hard"])
    def test_single_steps_that_are_known_now_and_then(self, reset: float | None) -> None:
        def program(make: MakeNeuron) -> Observed:
            first, second = linear(), linear()
            below, above = (
                make(**options(ALL_STEPS, step_mode="s", v_reset=reset)) for _ in range(2)
            )
            out, x_seq = [], data(steps=20).requires_grad_()
            for t, x in enumerate(x_seq):
                current = second(below(first(x)))
                out.append(above(current if t % 3 else current.sin()))
            out = torch.stack(out)
            (weighted(out) + above.v.square().sum()).backward()
            return Observed({"out": out}).see_gradients(first, second, x=x_seq)

        agree(program, *NEURONS[ALL_STEPS])

    def test_spikes_of_the_step_before(self) -> None:
        """A layer that is one step late."""

        def program(make: MakeNeuron) -> Observed:
            first, second = linear(), linear()
            below, above = Layer(make, TIME_LOOP), Layer(make, TIME_LOOP)
            spikes, out = torch.zeros(BATCH, FEATURES), []
            for x in data():
                late, spikes = spikes, below(first(x))
                out.append(above(second(late) + 0.5 * second(spikes)))
            out = torch.stack(out)
            weighted(out).backward()
            return Observed({"out": out}).see_gradients(first, second)

        agree(program, snntorch.Leaky, RevLeaky)

    def test_spikes_of_a_sequence_that_backward_has_freed(self) -> None:
        """Truncated backpropagation with a potential that was detached and spikes that were not:
        the host's error."""
        for make in NEURONS[TIME_LOOP]:
            torch.manual_seed(0)
            first, feedback = linear(), linear()
            layer, spikes = Layer(make, TIME_LOOP), torch.zeros(BATCH, FEATURES)
            for i, x in enumerate(data(steps=2)):
                spikes = layer(first(x) + feedback(spikes))
                layer.potential = layer.potential.detach()
                if i == 0:
                    weighted(spikes).backward()
            with pytest.raises(RuntimeError, match="a second time"):
                weighted(spikes).backward()


class TestStatistics:
    """A batch norm updates its running statistics once, however often its output is computed."""

    @STYLES
    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_running_statistics(self, style: str, momentum: float | None) -> None:
        def between(norm: nn.Module, spikes: Tensor) -> Tensor:
            return F.relu(norm(spikes.view(-1, FEATURES)).view(spikes.shape))

        agree(
            two_layers(style, between, lambda: nn.BatchNorm1d(FEATURES, momentum=momentum)),
            *NEURONS[style],
        )

    def test_after_two_backwards(self) -> None:
        def program(make: MakeNeuron) -> Observed:
            net = SequenceNet(make)
            out = net(images())
            weighted(out).backward(retain_graph=True)
            weighted(out.square()).backward()
            return Observed({"out": out} | dict(net.named_buffers())).see_gradients(net)

        agree(program, *NEURONS[ALL_STEPS])


class TestThreads:
    """Forward and backward in other threads."""

    @staticmethod
    def train(kind: str, seed: int, start: threading.Barrier | None = None) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        net = NETS[kind]()
        for each in net.parameters():
            each.data.normal_(0, 0.4, generator=generator)
        for _ in range(3):
            x = torch.rand(STEPS, 3, 1, 14, 14, generator=generator)
            if start is not None:
                start.wait(timeout=60)
            weighted(net(x)).backward()
        return [each.grad for each in net.parameters()]

    @EVERY_NET
    def test_two_networks_at_once(self, kind: str) -> None:
        expected = [self.train(kind, seed) for seed in (1, 2)]
        found, start = {}, threading.Barrier(2)

        def work(seed: int) -> None:
            found[seed] = self.train(kind, seed, start)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        for seed, gradients in enumerate(expected, 1):
            assert all(torch.equal(a, b) for a, b in zip(gradients, found[seed], strict=True))

    @EVERY_NET
    def test_backward_in_another_thread(self, kind: str) -> None:
        torch.manual_seed(0)
        net = NETS[kind]()
        loss = weighted(net(images()))
        loss.backward(retain_graph=True)
        expected = [each.grad for each in net.parameters()]
        net.zero_grad()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        for i, (parameter, gradient) in enumerate(zip(net.parameters(), expected, strict=True)):
            assert_close(str(i), gradient, parameter.grad)

    @EVERY_NET
    def test_one_kept_graph_in_several_threads(self, kind: str) -> None:
        torch.manual_seed(0)
        net = NETS[kind]()
        loss, parameters = weighted(net(images())), list(net.parameters())
        expected = torch.autograd.grad(loss, parameters, retain_graph=True)
        found: list[tuple[Tensor, ...]] = []

        def work() -> None:
            found.append(torch.autograd.grad(loss, parameters, retain_graph=True))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert len(found) == 4
        for gradients in found:
            for i, (gradient, ours) in enumerate(zip(expected, gradients, strict=True)):
                assert_close(str(i), gradient, ours)

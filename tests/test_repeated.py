"""A layer that sees the same data at every time step is differentiated once: the host's gradients,
by one backward of it.

Whatever a user could put in between, a hook, another loss, a detached step, has to see what it sees
with the host's neuron.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import snntorch
import torch
import torch.nn as nn
from calls import Calls
from compare import MakeNeuron, Observed, agree
from either_host import step_of
from spikingjelly.activation_based import neuron
from torch import Tensor

from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.adapters.spikingjelly import RevLIFNode
from snn_revplugin.report.memory import LiveBytes
from snn_revplugin.settings import use_settings

pytestmark = pytest.mark.usefixtures("recompute_everything")

T = 8
NEURONS = {
    "Leaky": (snntorch.Leaky, RevLeaky, {"beta": 0.8, "threshold": 0.3}),
    "Leaky, reset at once": (
        snntorch.Leaky,
        RevLeaky,
        {"beta": 0.8, "threshold": 0.3, "reset_delay": False},
    ),
    "LIFNode": (neuron.LIFNode, RevLIFNode, {"v_threshold": 0.2}),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 24)),
    "linear without bias": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 8 * 8, 24, bias=False)
    ),
    "convolution": lambda: nn.Conv2d(3, 5, 3),
    "convolution, batch norm": lambda: nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)
    ),
    "convolution, batch norm in evaluation": lambda: nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5).eval()
    ),
    "convolution, pooling": lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.MaxPool2d(2)),
    "convolution, batch norm, pooling": lambda: nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.MaxPool2d(2)
    ),
}
aten = torch.ops.aten
BACKWARDS = {
    aten.mm.default,
    aten.convolution_backward.default,
    aten.native_batch_norm_backward.default,
    aten.max_pool2d_with_indices_backward.default,
}


def shown(layer: nn.Module, node: nn.Module, image: Tensor, steps: int = T) -> list[Tensor]:
    """The spikes of a neuron behind a layer, at each time step."""
    potential, spikes = None, []
    for _ in range(steps):
        current = layer(image)
        fired, potential = step_of(
            node, current, torch.zeros_like(current) if potential is None else potential
        )
        spikes.append(fired)
    return spikes


def weighted(spikes: list[Tensor]) -> Tensor:
    """A loss with another gradient at each time step."""
    return sum((each * (1 + t)).square().mean() for t, each in enumerate(spikes))


def image_of(seed: int = 0) -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(("host", "ours", "options"), NEURONS.values(), ids=NEURONS)
def test_one_backward_of_the_layer_and_the_hosts_gradients(
    host: type, ours: type, options: dict, layer: Callable[[], nn.Module]
) -> None:
    counts = []

    def program(make: MakeNeuron) -> Observed:
        net, node = layer(), make(**options)
        spikes = shown(net, node, image_of())
        loss = weighted(spikes)
        with Calls() as calls:
            loss.backward()
        counts.append({each: n for each, n in calls.count.items() if each in BACKWARDS})
        return Observed({str(t): each.detach() for t, each in enumerate(spikes)}).see_gradients(net)

    agree(program, host, ours)
    assert counts[0] and set(counts[0].values()) == {T}
    again = (
        layer is LAYERS["linear without bias"]
    )  # whose forward is an ``mm`` too, and recomputed once
    assert counts[1].keys() == counts[0].keys() and set(counts[1].values()) == {1 + again}


@pytest.mark.parametrize("layer", ["convolution, pooling", "convolution, batch norm, pooling"])
def test_a_tensor_that_somebody_has_keeps_its_own_gradient(layer: str) -> None:
    """What the convolution gave at each step, of which the gradient is asked for: the sum is taken
    below it."""

    def program(make: MakeNeuron) -> Observed:
        net, node, seen = LAYERS[layer](), make(beta=0.8, threshold=0.3), []

        def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            output.retain_grad()
            seen.append(output)

        net[0].register_forward_hook(keep)
        weighted(shown(net, node, image_of())).backward()
        return Observed().see_gradients(
            net, **{f"convolved {t}": each for t, each in enumerate(seen)}
        )

    agree(program, snntorch.Leaky, RevLeaky)


def test_a_hook_on_a_tensor_that_nobody_has_any_more_sees_its_own_gradient() -> None:
    def program(make: MakeNeuron) -> Observed:
        net, node, seen = LAYERS["convolution, pooling"](), make(beta=0.8, threshold=0.3), []
        net[0].register_forward_hook(
            lambda module, inputs, output: output.register_hook(seen.append) and None
        )
        weighted(shown(net, node, image_of())).backward()
        return Observed(
            {"times": torch.tensor(len(seen))}, {f"hooked {t}": each for t, each in enumerate(seen)}
        )

    agree(program, snntorch.Leaky, RevLeaky)


def test_hooks_on_the_current_and_on_a_parameter() -> None:
    def program(make: MakeNeuron) -> Observed:
        net, node, seen = nn.Linear(6, 5), make(beta=0.8, threshold=0.3), []
        image, mem, loss = (
            torch.rand(4, 6, generator=torch.Generator().manual_seed(0)),
            node.init_leaky(),
            0,
        )
        net.weight.register_hook(lambda grad: seen.append(grad.clone()) or grad * 2)
        for t in range(T):
            current = net(image)
            current.register_hook(lambda grad: seen.append(grad.clone()) or grad.clamp(-0.1, 0.1))
            spikes, mem = node(current, mem)
            loss = loss + (spikes * (1 + t)).sum()
        loss.backward()
        return Observed(
            {"times": torch.tensor(len(seen))}, {str(i): each for i, each in enumerate(seen)}
        ).see_gradients(net)

    agree(program, snntorch.Leaky, RevLeaky)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # the image needs no gradient
def test_module_hooks() -> None:
    def program(make: MakeNeuron) -> Observed:
        net, node, seen = LAYERS["convolution, pooling"](), make(beta=0.8, threshold=0.3), []
        net[0].register_full_backward_hook(lambda module, given, out: seen.append(out[0].clone()))
        weighted(shown(net, node, image_of())).backward()
        return Observed({}, {str(i): each for i, each in enumerate(seen)}).see_gradients(net)

    agree(program, snntorch.Leaky, RevLeaky)


def leaf_at_times(net: nn.Module, image: Tensor, t: int) -> Tensor:
    return net(image if t % 3 else image.detach())


def frozen_at_times(net: nn.Module, image: Tensor, t: int) -> Tensor:
    net.weight.requires_grad_(t % 3 != 1)
    return net(image)


def another_image_between(net: nn.Module, image: Tensor, t: int) -> Tensor:
    return net(image if t < 2 or t > 5 else image_between)


def without_gradient_at_times(net: nn.Module, image: Tensor, t: int) -> Tensor:
    with torch.set_grad_enabled(t != 4):
        return net(image)


def once(net: nn.Module, image: Tensor, t: int) -> Tensor:
    if t == 0:
        once.current = net(image)
    return once.current


def through_a_view(net: nn.Module, image: Tensor, t: int) -> Tensor:
    return net(image.view(2, -1)).view(2, 5)


def with_noise(net: nn.Module, image: Tensor, t: int) -> Tensor:
    return net(image + 0.1 * t)


def twice(net: nn.Module, image: Tensor, t: int) -> Tensor:
    return net(image) + 0.5 * net(image)


image_between = torch.rand(2, 6, generator=torch.Generator().manual_seed(5))
CURRENTS = (
    leaf_at_times,
    frozen_at_times,
    another_image_between,
    without_gradient_at_times,
    once,
    through_a_view,
    with_noise,
    twice,
)


@pytest.mark.parametrize("current", CURRENTS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("needs_gradient", [False, True], ids=["data", "a leaf"])
def test_steps_that_are_not_quite_the_same(current: Callable, needs_gradient: bool) -> None:
    def program(make: MakeNeuron) -> Observed:
        net, node, loss = nn.Linear(6, 5), make(beta=0.8, threshold=0.3), 0
        image = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)).requires_grad_(
            needs_gradient
        )
        mem = node.init_leaky()
        for t in range(T):
            spikes, mem = node(current(net, image, t), mem)
            loss = loss + (spikes * (1 + t)).square().sum() + mem.sum()
        loss.backward()
        return Observed({"mem": mem.detach()}).see_gradients(net, image=image)

    agree(program, snntorch.Leaky, RevLeaky, path="any")


def to_the_end(spikes: list[Tensor], net: nn.Module) -> None:
    weighted(spikes).backward()


def twice_with_one_graph(spikes: list[Tensor], net: nn.Module) -> None:
    weighted(spikes).backward(retain_graph=True)
    weighted(spikes[:5]).backward()


def after_a_pass_that_failed(spikes: list[Tensor], net: nn.Module) -> None:
    def fail(grad: Tensor) -> None:
        raise KeyboardInterrupt

    handle = spikes[2].register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        weighted(spikes).backward(retain_graph=True)
    handle.remove()
    net.zero_grad()
    weighted(spikes).backward()


def each_step_by_itself(spikes: list[Tensor], net: nn.Module) -> None:
    for t, each in enumerate(spikes):
        (each * (1 + t)).sum().backward(retain_graph=True)


def for_some_parameters(spikes: list[Tensor], net: nn.Module) -> None:
    net.bias.grad = torch.autograd.grad(weighted(spikes), net.bias, retain_graph=True)[0]
    weighted(spikes).backward(inputs=[net.weight])


PASSES = (
    to_the_end,
    twice_with_one_graph,
    after_a_pass_that_failed,
    each_step_by_itself,
    for_some_parameters,
)


@pytest.mark.parametrize("differentiate", PASSES, ids=lambda each: each.__name__)
@pytest.mark.parametrize(("host", "ours", "options"), NEURONS.values(), ids=NEURONS)
def test_passes(host: type, ours: type, options: dict, differentiate: Callable) -> None:
    def program(make: MakeNeuron) -> Observed:
        net, node = nn.Linear(6, 5), make(**options)
        differentiate(
            shown(net, node, torch.rand(4, 6, generator=torch.Generator().manual_seed(0))), net
        )
        return Observed().see_gradients(net)

    agree(program, host, ours)


def test_the_gradient_at_one_steps_current() -> None:
    def program(make: MakeNeuron) -> Observed:
        net, node, mem, currents, loss = nn.Linear(6, 5), make(beta=0.8, threshold=0.3), None, [], 0
        mem = node.init_leaky()
        for t in range(T):
            currents.append(net(torch.ones(4, 6)))
            spikes, mem = node(currents[-1], mem)
            loss = loss + (spikes * (1 + t)).sum()
        asked = currents[3], net.weight, currents[6]
        return Observed(
            {}, {str(i): each for i, each in enumerate(torch.autograd.grad(loss, asked))}
        )

    agree(program, snntorch.Leaky, RevLeaky)


def test_two_neurons_on_one_current() -> None:
    def program(make: MakeNeuron) -> Observed:
        net, nodes = nn.Linear(6, 5), [make(beta=beta, threshold=0.3) for beta in (0.8, 0.6)]
        mems, loss = [each.init_leaky() for each in nodes], 0
        image = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
        for t in range(T):
            current = net(image)
            for i, node in enumerate(nodes):
                spikes, mems[i] = node(current, mems[i])
                loss = loss + (spikes * (1 + t + i)).sum()
        loss.backward()
        return Observed().see_gradients(net)

    agree(program, snntorch.Leaky, RevLeaky)


def test_no_more_stays_with_the_last_potential_than_with_the_hosts() -> None:
    """The potential holds the graph's nodes, through which the sum went."""
    left = {}
    for kind in (snntorch.Leaky, RevLeaky):
        layer, node, image, held = nn.Linear(6, 500), kind(beta=0.8), torch.rand(4, 6), []

        def loss(layer=layer, node=node, image=image, held=held) -> Tensor:
            mem, total = node.init_leaky(), torch.zeros(())
            for t in range(T):
                spikes, mem = node(layer(image), mem)
                total = total + (spikes * (1 + t)).sum()
            held[:] = [mem]
            return total

        loss().backward()
        with LiveBytes() as live:
            loss().backward()
        left[kind] = live.now()
    assert left[RevLeaky] <= left[snntorch.Leaky]


@pytest.mark.parametrize(
    ("dtype", "match_host_order"), [(torch.float32, True), (torch.bfloat16, False)]
)
def test_a_backward_for_each_step(dtype: torch.dtype, match_host_order: bool) -> None:
    """Where the setting asks for it, and in a dtype in which the sum might overflow."""
    torch.manual_seed(0)
    net, node = LAYERS["linear"]().to(dtype), RevLeaky(beta=0.8, threshold=0.3).to(dtype)
    with use_settings(match_host_order=match_host_order):
        loss = weighted(shown(net, node, image_of().to(dtype)))
    with Calls() as calls:
        loss.backward()
    assert calls.count[aten.mm.default] == T


@pytest.mark.parametrize("channels", [6, 12, 16])
def test_spikes_in_another_memory_format_change_rounding_alone(channels: int) -> None:
    """A convolution's backward may read spikes with their channels last; the neuron below gets its
    gradient all the same."""

    def program(make: MakeNeuron) -> Observed:
        first, second = nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 20, 3)
        below, above = make(beta=0.8, threshold=0.1), make(beta=0.8, threshold=0.1)
        mem1, mem2, loss, kept = below.init_leaky(), above.init_leaky(), 0, []
        for t in range(T):
            spikes, mem1 = below(first(image_of(t)), mem1)
            spikes.retain_grad()
            kept.append(spikes)
            out, mem2 = above(second(spikes), mem2)
            loss = loss + (out * (1 + t)).square().sum()
        loss.backward()
        seen = {f"spikes {t}": each for t, each in enumerate(kept)}
        return Observed({"mem2": mem2.detach()}).see_gradients(first, second, **seen)

    agree(program, snntorch.Leaky, RevLeaky)

"""Gradients that are differentiated again (``create_graph=True``) are the host's: a gradient
penalty, and a step of MAML through a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from compare import assert_close, assert_exact
from hosts import only_pure
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor

from snn_revplugin import use_settings
from snn_revplugin.adapters.snntorch import CoupledLeaky, RevLeaky
from snn_revplugin.adapters.spikingjelly import (
    CoupledLIFNode,
    RevIFNode,
    RevLIFNode,
    RevParametricLIFNode,
)

T, TOLERANCE = 6, 1e-9  # of float64


@pytest.fixture(autouse=True, params=[0, 1024], ids=["recomputed", "small layers kept"])
def _settings(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_settings(recompute_min_bytes=request.param):
        yield


def loop(make: Callable[[], nn.Module], x: Tensor) -> tuple[list[Tensor], list[nn.Module]]:
    """Two layers in a time loop, of snnTorch or of SpikingJelly in step mode 's'."""
    torch.manual_seed(0)
    weigh, readout = nn.Linear(5, 6).double(), nn.Linear(6, 4).double()
    first, second = make().double(), make().double()
    outputs, states = [], [None, None]

    def take(index: int, layer: nn.Module, current: Tensor) -> Tensor:
        if not isinstance(layer, snn.SpikingNeuron):
            return layer(current)
        state = torch.zeros_like(current) if states[index] is None else states[index]
        spikes, states[index] = layer(current, state)
        return spikes

    for frame in x:
        spikes = take(0, first, weigh(frame))
        outputs.append(take(1, second, readout(spikes.double())).double())
    return outputs, [weigh, readout, first, second]


def sequence(make: Callable[[], nn.Module], x: Tensor) -> tuple[list[Tensor], list[nn.Module]]:
    """The same of SpikingJelly in step mode 'm'."""
    torch.manual_seed(0)
    weigh, readout = nn.Linear(5, 6).double(), nn.Linear(6, 4).double()
    first, second = make().double(), make().double()
    return list(second(readout(first(weigh(x))))), [weigh, readout, first, second]


def penalised(
    run: Callable, make: Callable[[], nn.Module]
) -> tuple[list[Tensor], list[Tensor | None], list[nn.Module]]:
    """Outputs, gradients of a loss with a penalty on the gradient at the input, and the layers."""
    torch.manual_seed(1)
    x = (torch.randn(T, 3, 5, dtype=torch.float64) * 2).requires_grad_()
    outputs, layers = run(make, x)
    out = torch.stack(outputs)
    loss = (out * torch.linspace(0.5, 2, out.numel(), dtype=torch.float64).view(out.shape)).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + (grad**2).sum()).backward()
    parameters = [each for layer in layers for each in layer.parameters()]
    return [*outputs, grad], [x.grad, *(each.grad for each in parameters)], layers


def assert_same(
    run: Callable,
    host: Callable[[], nn.Module],
    ours: Callable[[], nn.Module],
    tolerance: float = TOLERANCE,
) -> None:
    (outputs, gradients, _), (our_outputs, our_gradients, layers) = (
        penalised(run, make) for make in (host, ours)
    )
    for i, (a, b) in enumerate(zip(outputs[:-1], our_outputs[:-1], strict=True)):
        assert_exact(f"spikes {i}", a.detach(), b.detach())
    assert_close("first derivative", outputs[-1], our_outputs[-1], TOLERANCE)
    largest = max(each.abs().max().item() for each in gradients if each is not None)
    for i, (a, b) in enumerate(zip(gradients, our_gradients, strict=True)):
        assert_close(f"second derivative {i}", a, b, tolerance, floor=largest)
    assert all(each.record.statistics.fallback_calls == 0 for each in layers[2:])
    assert all(each.record.statistics.steps > 0 for each in layers[2:])


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("delay", [True, False])
@pytest.mark.parametrize("learn", [False, True])
def test_leaky(reset: str, delay: bool, learn: bool) -> None:
    options = {
        "beta": 0.8,
        "threshold": 0.7,
        "spike_grad": snn_surrogate.atan(alpha=2.0),
        "reset_mechanism": reset,
        "reset_delay": delay,
        "learn_beta": learn,
        "learn_threshold": learn,
    }
    # An immediate reset multiplies the gradient with snnTorch's spikes, which are float32.
    tolerance = TOLERANCE if delay else 1e-6
    assert_same(loop, lambda: snn.Leaky(**options), lambda: RevLeaky(**options), tolerance)


NODES = {
    "IF": (neuron.IFNode, RevIFNode),
    "LIF": (neuron.LIFNode, RevLIFNode),
    "PLIF": (neuron.ParametricLIFNode, RevParametricLIFNode),
}


@only_pure
@pytest.mark.parametrize("run", [loop, sequence])
@pytest.mark.parametrize("v_reset", [None, 0.0, -0.2])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("name", NODES)
def test_nodes(name: str, detach: bool, v_reset: float | None, run: Callable) -> None:
    options = {
        "v_threshold": 0.6,
        "v_reset": v_reset,
        "detach_reset": detach,
        "surrogate_function": surrogate.ATan(),
        "step_mode": "m" if run is sequence else "s",
    }
    host, ours = NODES[name]
    assert_same(run, lambda: host(**options), lambda: ours(**options))


@pytest.mark.parametrize("mode", ["s", "m"])
def test_the_coupled_node(mode: str) -> None:
    run = sequence if mode == "m" else loop
    options = {"surrogate_function": surrogate.ATan(), "step_mode": mode, "split_dim": -1}
    seen = []
    for reversible in (False, True):
        make = lambda reversible=reversible: CoupledLIFNode(reversible=reversible, **options)  # noqa: E731
        seen.append(penalised(run, make))
    (outputs, gradients, _), (our_outputs, our_gradients, layers) = seen
    assert all(torch.equal(a, b) for a, b in zip(outputs[:-1], our_outputs[:-1], strict=True))
    for i, (a, b) in enumerate(zip(gradients, our_gradients, strict=True)):
        assert_close(f"second derivative {i}", a, b, TOLERANCE)
    assert all(each.record.statistics.steps > 0 for each in layers[2:])


def test_the_coupled_node_of_snntorch() -> None:
    def make(reversible: bool) -> Callable[[], nn.Module]:
        return lambda: CoupledLeaky(
            spike_grad=snn_surrogate.atan(), split_dim=-1, reversible=reversible
        )

    (_, gradients, _), (_, ours, _) = penalised(loop, make(False)), penalised(loop, make(True))
    for i, (a, b) in enumerate(zip(gradients, ours, strict=True)):
        assert_close(f"second derivative {i}", a, b, 1e-6)  # its buffers are float32


def test_a_step_of_maml() -> None:
    """The loss after one step of gradient descent, differentiated by the weights before it."""
    seen = []
    for kind in (snn.Leaky, RevLeaky):
        torch.manual_seed(0)
        weight = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
        x = torch.randn(T, 3, 5, dtype=torch.float64)

        def loss(weight: Tensor, kind=kind, x=x) -> Tensor:
            lif, mem, total = kind(beta=0.9, spike_grad=snn_surrogate.atan()).double(), None, 0
            mem = torch.zeros(3, 6, dtype=torch.float64)
            for frame in x:
                spikes, mem = lif(nn.functional.linear(frame, weight), mem)
                total = total + (spikes * mem).sum()
            return total

        (grad,) = torch.autograd.grad(loss(weight), weight, create_graph=True)
        (meta,) = torch.autograd.grad(loss(weight - 0.05 * grad), weight)
        seen.append((grad, meta))
    (grad, meta), (our_grad, our_meta) = seen
    assert_close("inner", grad, our_grad, TOLERANCE)
    assert_close("meta", meta, our_meta, TOLERANCE)


@only_pure
def test_inside_saved_tensor_hooks_it_is_refused_in_words() -> None:
    node, x = RevLIFNode(step_mode="m"), torch.randn(T, 3, 4, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        out = node(x * 1)
    with pytest.raises(RuntimeError, match=r"create_graph=True is not supported .* saved-tensor"):
        torch.autograd.grad(out.sum(), x, create_graph=True)

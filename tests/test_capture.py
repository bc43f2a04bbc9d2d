"""CUDA graphs: a training step with our neurons can be captured, because nothing in it asks the
device for a value.

On a CPU the code takes the same decisions when it is told that a graph is being captured; an
operation that hands a value to Python is an error then. (What packs bits on a CPU is numpy, which
no such operation sees; on CUDA it is torch code.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from compare import Observed, assert_agree
from hosts import PURE
from spikingjelly.activation_based import neuron
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from snn_revplugin import use_settings
from snn_revplugin.adapters.snntorch import CoupledLeaky, RevLeaky
from snn_revplugin.adapters.spikingjelly import CoupledLIFNode, RevLIFNode, RevParametricLIFNode
from snn_revplugin.kernels import triton_neuron
from snn_revplugin.torch_internals import capture

T = 15  # more than a stretch between anchors
READS_A_VALUE = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
}
KINDS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module], dict[str, Any]]] = {
    "Leaky": (snn.Leaky, RevLeaky, {"beta": 0.9}),
    "Leaky learned": (
        snn.Leaky,
        RevLeaky,
        {"beta": 0.9, "learn_beta": True, "learn_threshold": True},
    ),
    "LIF s": (neuron.LIFNode, RevLIFNode, {"v_reset": None}),
    "LIF m": (neuron.LIFNode, RevLIFNode, {"step_mode": "m"}),
    "PLIF s": (neuron.ParametricLIFNode, RevParametricLIFNode, {"v_reset": None}),
}
COUPLED: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module], dict[str, Any]]] = {
    "CoupledLeaky": (lambda **o: CoupledLeaky(reversible=False, **o), CoupledLeaky, {}),
    "CoupledLIF m": (
        lambda **o: CoupledLIFNode(reversible=False, **o),
        CoupledLIFNode,
        {"step_mode": "m"},
    ),
}


class NoValues(TorchDispatchMode):
    """Inside, an operation that hands a tensor's value to Python is an error."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        assert func not in READS_A_VALUE, f"{func} would stop the capture of a CUDA graph"
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    """Two layers of neurons with a layer norm, which replay recognises by values, and a sum with a
    number between them."""

    def __init__(self, make: Callable[..., nn.Module], options: dict[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8)])
        self.norm = nn.LayerNorm(8)
        self.neurons = nn.ModuleList([make(**options) for _ in range(2)])

    def forward(self, x_seq: Tensor) -> Tensor:
        x_seq = self._through(0, self.layers[0](x_seq))
        return self._through(1, self.norm(self.layers[1](1.0 - x_seq)))

    def _through(self, index: int, currents: Tensor) -> Tensor:
        node, spikes = self.neurons[index], []
        v = torch.zeros_like(currents[0])
        if isinstance(node, snn.SpikingNeuron):
            for current in currents:
                s, v = node(current, v)
                spikes.append(s)
            return torch.stack(spikes)
        if node.step_mode == "m":
            return node.multi_step_functional_forward((currents,), (v,))[0][0]
        for current in currents:
            (s,), (v,) = node.single_step_functional_forward((current,), (v,))
            spikes.append(s)
        return torch.stack(spikes)


def nets(kind: str, device: str) -> tuple[nn.Module, nn.Module, Tensor]:
    if not PURE and "LIF" in kind and kind in KINDS:
        pytest.skip(
            "SpikingJelly 0.0.0.0.14 has no pure transitions, by which this net hands its"
            " potentials on"
        )
    host, ours, options = (KINDS | COUPLED)[kind]
    made = []
    for make in (host, ours):
        torch.manual_seed(0)
        made.append(Net(make, options).to(device))
    return *made, 2 * torch.randn(T, 4, 6, device=device)


def step(net: nn.Module, x: Tensor) -> Tensor:
    net.zero_grad(set_to_none=False)
    outputs = net(x)
    (
        outputs * torch.linspace(0.5, 1.5, outputs.numel(), device=x.device).view(outputs.shape)
    ).sum().backward()
    return outputs


@pytest.mark.parametrize("kind", KINDS | COUPLED)
def test_nothing_asks_for_a_value(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host, ours, x = nets(kind, "cpu")
    step(ours, x)  # numbers that do not change are looked up once, in the warm-up
    monkeypatch.setattr(capture, "may_synchronise", lambda tensor: False)
    with NoValues():
        outputs = step(ours, x)
    expected = Observed({"spikes": step(host, x).detach()}).see_gradients(host)
    assert_agree(expected, Observed({"spikes": outputs.detach()}).see_gradients(ours))


class Rounded(torch.autograd.Function):
    """A weight that the user quantises, by a Function that the table does not know."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return (weight * 8).round() / 8

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Quantised(nn.Module):
    """A computed weight, which time steps share if it is equal, and a batch norm without a bias,
    which is recognised by its output."""

    def __init__(self, make: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8)])
        self.scale = nn.Parameter(torch.ones(8))
        self.neurons = nn.ModuleList([make(beta=0.9) for _ in range(2)])

    def forward(self, x_seq: Tensor) -> Tensor:
        spikes, (first, second) = [], self.neurons
        a = b = torch.zeros(x_seq.shape[1], 8)
        for x in x_seq:
            s, a = first(self.layers[0](x), a)
            current = nn.functional.linear(s, Rounded.apply(self.layers[1].weight))
            normed = nn.functional.batch_norm(current, None, None, self.scale, None, True)
            s, b = second(normed, b)
            spikes.append(s)
        return torch.stack(spikes)


def test_nothing_asks_for_the_value_of_a_weight_or_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for make in (snn.Leaky, RevLeaky):
        torch.manual_seed(0)
        made.append(Quantised(make))
    host, ours = made
    x = 2 * torch.randn(T, 4, 6)
    with use_settings(recompute_min_bytes=0):
        step(ours, x)
        monkeypatch.setattr(capture, "may_synchronise", lambda tensor: False)
        with NoValues():
            outputs = step(ours, x)
    expected = Observed({"spikes": step(host, x).detach()}).see_gradients(host)
    assert_agree(expected, Observed({"spikes": outputs.detach()}).see_gradients(ours))


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["Leaky", "PLIF s"])
def test_a_capture_needs_no_kernel_that_the_warm_up_did_not(
    kind: str, kernels_on: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A form of a kernel that is first needed inside of a capture would be compiled there."""
    _, ours, x = nets(kind, "cpu")
    forms: set[tuple] = set()

    def launch_and_note(kernel: Any, count: int, *arguments: Any, **options: Any) -> None:
        kinds = [each.dtype if isinstance(each, Tensor) else type(each) for each in arguments]
        constants = [each for each in sorted(options.items()) if each[0] != "like"]
        forms.add((id(kernel), tuple(kinds), str(constants)))
        launch_kernel(kernel, count, *arguments, **options)

    launch_kernel = triton_neuron.launch
    monkeypatch.setattr(triton_neuron, "launch", launch_and_note)
    with use_settings(backend="triton", recompute_min_bytes=0):
        with use_settings(capturable=True):
            step(ours, x)
        warmed_up = set(forms)
        assert warmed_up
        monkeypatch.setattr(capture, "may_synchronise", lambda tensor: False)
        step(ours, x)
    assert forms == warmed_up


def test_values_are_asked_for_elsewhere() -> None:
    """Or the test above would show nothing."""
    _, ours, x = nets("Leaky", "cpu")
    with pytest.raises(AssertionError, match="would stop the capture"), NoValues():
        step(ours, x)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS | COUPLED)
def test_capture_of_a_training_step(kind: str) -> None:
    """Captured once, replayed on other data: the host's spikes and gradients, and memory that does
    not grow."""
    host, ours, x = nets(kind, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(ours, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(ours, x)
    for _ in range(2):
        x.copy_(2 * torch.randn(x.shape))
        before = torch.cuda.memory_allocated()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
        expected = Observed({"spikes": step(host, x).detach()}).see_gradients(host)
        assert_agree(expected, Observed({"spikes": outputs.detach()}).see_gradients(ours))

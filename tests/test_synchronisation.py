"""How often a training step asks the device for a value, which stalls a GPU: in a steady loop never
where equations are fixed, once per layer and sequence where they are learned.

There is no GPU here: the code is told not to compare, as it is told by a tensor on CUDA, and a
dispatch mode counts the operations that hand a value to Python, ours beside the host's. So the same
steps also show that what is decided without values gives the host's spikes and gradients.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import snntorch as snn
import torch
import torch.nn as nn
import torch.nn.functional as F
from compare import Observed, assert_agree
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import snn_revplugin
from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.adapters.spikingjelly import RevLIFNode, RevParametricLIFNode
from snn_revplugin.bptt import chain, sequence
from snn_revplugin.bptt.record import NeuronRecord
from snn_revplugin.replay import HeldTensor, attach_recipes
from snn_revplugin.report.memory import memory_report
from snn_revplugin.torch_internals import capture
from snn_revplugin.torch_internals.late import Largest, Late

T, BATCH, FEATURES = 50, 32, 16
aten = torch.ops.aten
READS_A_VALUE = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
}


class Loop(nn.Module):
    """Three linear layers with Leaky neurons in a time loop, ``1 - spikes`` below the second."""

    def __init__(self, make: Callable[..., nn.Module], norm: bool, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(3))
        self.norm = nn.GroupNorm(4, FEATURES) if norm else nn.Identity()
        self.neurons = nn.ModuleList(make(beta=0.9, **options) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        mems, outputs = [each.reset_mem() for each in self.neurons], []
        for spikes in x:
            for i, (linear, leaky) in enumerate(zip(self.layers, self.neurons, strict=True)):
                current = linear(1.0 - spikes if i == 1 else spikes)
                spikes, mems[i] = leaky(self.norm(current) if i == 2 else current, mems[i])
            outputs.append(spikes)
        return torch.stack(outputs)


class Convolutions(nn.Module):
    """SpikingJelly's conv-BN-LIF twice, in either step mode."""

    def __init__(self, make: Callable[..., nn.Module], mode: str, **options: Any) -> None:
        super().__init__()
        options = {"surrogate_function": surrogate.ATan(), "detach_reset": True} | options
        self.blocks = nn.Sequential()
        for channels in (3, 8):
            self.blocks.append(layer.Conv2d(channels, 8, 3, padding=1, bias=False))
            self.blocks.append(layer.BatchNorm2d(8))
            self.blocks.append(make(**options))
        self.mode = mode
        functional.set_step_mode(self, mode)

    def forward(self, x: Tensor) -> Tensor:
        functional.reset_net(self)
        return self.blocks(x) if self.mode == "m" else torch.stack([*map(self.blocks, x)])


SEQUENCE, IMAGES = (T, BATCH, FEATURES), (8, 4, 3, 12, 12)
SOFT = {"v_reset": None}
LEARNED = {"learn_beta": True}
# The net, the host's neuron and ours, options, and how often the device is asked: in the first
# training step (for a layer: its bounds, and its last potential's magnitude; a norm's eps with two
# questions), and in each step after it.
NETS: dict[str, tuple[Callable[..., nn.Module], type, type, tuple[int, ...], int, int]] = {
    "loop": (lambda make: Loop(make, False), snn.Leaky, RevLeaky, SEQUENCE, 6, 0),
    "loop, norm, learned beta": (
        lambda make: Loop(make, True, **LEARNED),
        snn.Leaky,
        RevLeaky,
        SEQUENCE,
        8,
        3,
    ),
    "LIF s": (lambda make: Convolutions(make, "s"), neuron.LIFNode, RevLIFNode, IMAGES, 0, 0),
    "LIF m": (lambda make: Convolutions(make, "m"), neuron.LIFNode, RevLIFNode, IMAGES, 0, 0),
    "LIF s, soft": (
        lambda make: Convolutions(make, "s", **SOFT),
        neuron.LIFNode,
        RevLIFNode,
        IMAGES,
        2,
        0,
    ),
    "PLIF s, soft": (
        lambda make: Convolutions(make, "s", **SOFT),
        neuron.ParametricLIFNode,
        RevParametricLIFNode,
        IMAGES,
        4,
        2,
    ),
}


@dataclass(frozen=True)
class _Row:
    function: Callable[[Tensor], Tensor]
    questions: int


CONSTANTS = {
    "1 - x": _Row(lambda x: 1.0 - x, 0),
    "0.3 - 2 x": _Row(lambda x: torch.rsub(x, 0.3, alpha=2), 0),
    "x + 0.3": _Row(lambda x: x + 0.3, 1),
    "x - 0.7": _Row(lambda x: x - 0.7, 1),
    "padded with a number": _Row(lambda x: F.pad(x, (1, 2, 1, 0), value=0.7), 0),
    "cut and padded": _Row(lambda x: F.pad(x, (-1, 2)), 0),
}


class Questions(TorchDispatchMode):
    """Counts the operations that hand a tensor's value to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.count += func in READS_A_VALUE
        return func(*args, **(kwargs or {}))


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> Questions:
    """Counts, while code takes the branches of a device that should not be waited for."""
    counting, numbers = Questions(), capture.numbers

    def asked(tensor: Tensor) -> list[float]:
        counting.count += 1
        return numbers(tensor)

    monkeypatch.setattr(capture, "may_compare", lambda tensor: False)
    monkeypatch.setattr(capture, "numbers", asked)
    return counting


def made(kind: str, neuron: type) -> nn.Module:
    torch.manual_seed(0)
    return NETS[kind][0](neuron)


def train(net: nn.Module, x: Tensor) -> Observed:
    net.zero_grad(set_to_none=True)
    outputs = net(x)
    weights = torch.linspace(0.5, 1.5, outputs.numel()).view(outputs.shape)
    (outputs * weights).sum().backward()
    seen = Observed({"spikes": outputs.detach().clone()}).see_gradients(net)
    with torch.no_grad():
        for each in net.parameters():  # as an optimiser would
            each.mul_(0.999)
    return seen


@pytest.mark.parametrize("kind", NETS)
def test_a_steady_loop_asks_for_no_value(kind: str, questions: Questions) -> None:
    _, host_neuron, our_neuron, shape, first, later = NETS[kind]
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    host, ours = made(kind, host_neuron), made(kind, our_neuron)
    asked = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            with Questions() as of_host:
                expected = train(host, x)
            assert of_host.count == 0
            questions.count = 0
            with questions:
                found = train(ours, x)
            asked.append(questions.count)
            assert_agree(expected, found)
    assert asked[0] <= first + 3, asked  # the steepness of a surrogate, once in a process: on a CPU
    assert asked[1:] == [later, later], asked


@pytest.mark.usefixtures("recompute_everything")
@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_stays_on_the_device(name: str, questions: Questions) -> None:
    """The recomputed current has the first bits."""
    row, x = CONSTANTS[name], 2 * torch.rand(T, 8, 12)
    spikes = RevLeaky(beta=0.9)(x.requires_grad_(), torch.zeros(T, 8, 12))[0]
    questions.count = 0
    with questions:
        current = row.function(spikes)
        value = attach_recipes(current, NeuronRecord())
    assert value is not None and not isinstance(value, HeldTensor)
    assert questions.count == row.questions
    assert torch.equal(value.compute(), current)


def test_no_sum_with_a_tensor_is_taken_for_one_with_a_constant(questions: Questions) -> None:
    spikes = RevLeaky(beta=0.9)(torch.rand(8, 64).requires_grad_(), torch.zeros(8, 64))[0]
    assert attach_recipes(spikes + torch.rand(8, 64), NeuronRecord()) is None


@pytest.mark.parametrize("kind", ["loop", "LIF s", "LIF m"])
def test_a_reset_state_is_known_to_be_uniform(
    kind: str, questions: Questions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal elements one is kept, though no value is looked at."""
    starts, initial = [], chain.initial

    def noted(state: Tensor) -> Tensor:
        starts.append(initial(state))
        return starts[-1]

    for room in (chain, sequence):
        monkeypatch.setattr(room, "initial", noted)
    _, _, our_neuron, shape, *_ = NETS[kind]
    net = made(kind, our_neuron)
    for _ in range(2):  # the second time the host's reset gives zeros of the shape of the state
        train(net, torch.rand(shape))
    assert starts and all(not any(each.stride()) for each in starts)


def test_anchors_hold_their_potentials(questions: Questions) -> None:
    """What is held without a question is what is held with them, but for two anchors a layer whose
    potentials are not 16 bits long."""
    x, held = torch.rand(NETS["loop"][3]), {}
    net = made("loop", RevLeaky)
    for compares in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if compares:
                patch.setattr(capture, "may_compare", lambda tensor: True)
            for _ in range(2):
                net.zero_grad(set_to_none=True)
                held[compares] = memory_report(lambda: net(x).sum(), device="cpu").retained
    a_number_each_step = 4 * T
    assert held[False] - held[True] <= 3 * 2 * 2 * BATCH * FEATURES + a_number_each_step


class TestLargest:
    def test_asks_once_and_then_knows(self, questions: Questions) -> None:
        largest, small = Largest(), (torch.tensor([0.5, -1.0]),)
        assert all(largest.stays_below(8.0, small) for _ in range(4))
        assert questions.count == 1

    def test_asks_near_the_limit(self, questions: Questions) -> None:
        largest = Largest()
        assert all(largest.stays_below(8.0, (torch.tensor([-3.0]),)) for _ in range(3))
        assert not largest.stays_below(8.0, (torch.tensor([9.0]),))
        assert questions.count == 4

    def test_a_jump_is_told_late(self, questions: Questions) -> None:
        largest = Largest()
        assert largest.stays_below(8.0, (torch.tensor([1.0]),))
        assert largest.stays_below(8.0, (torch.tensor([100.0]),))  # trusted
        with pytest.warns(UserWarning, match="grew from 1 to 100"):
            assert not largest.stays_below(8.0, (torch.tensor([100.0]),))

    def test_nan_is_not_below(self, questions: Questions) -> None:
        assert not Largest().stays_below(8.0, (torch.tensor([float("nan")]),))


def test_late_numbers() -> None:
    assert Late(torch.tensor([1.0, 2.5])).read() == [1.0, 2.5]


@pytest.mark.gpu
def test_late_numbers_of_a_gpu() -> None:
    late = Late(torch.tensor([1.0, 2.5], device="cuda"))
    torch.cuda.synchronize()
    assert late.read() == [1.0, 2.5]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["loop", "LIF s", "LIF m", "LIF s, soft"])
def test_a_steady_step_on_a_gpu_does_not_wait(kind: str) -> None:
    _, _, our_neuron, shape, *_ = NETS[kind]
    net, x = made(kind, our_neuron).cuda(), torch.rand(shape, device="cuda")
    for _ in range(3):
        net(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        net(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Files on the path of a time step that may ask for a value, and when.
MAY_ASK = {
    "bptt/anchors.py": "on a CPU",
    "bptt/any_neuron.py": "a neuron's own step: whether it fires",
    "bptt/chain.py": "on a CPU",
    "bptt/module_copy.py": "on a CPU",
    "bptt/record.py": "on a CPU",
    "bptt/rows.py": "the trial of a call in rows, once",
    "bptt/trial.py": "the trial of a neuron's own step, once",
    "compile/equations.py": "while a net is compiled",
    "kernels/self_test.py": "once for each kernel",
    "neurons/integrate_and_fire.py": "a learned decay, once per sequence",
    "neurons/lapicque.py": "the decay, once",
    "neurons/leaky.py": "the slopes of a clamp, once, on a CPU",
    "neurons/surrogate.py": "the steepness of a surrogate, once, on a CPU",
    "neurons/synaptic.py": "the decays, once",
    "neurons/transition.py": "on a CPU",
    "packed/integers.py": "a neuron whose outputs are numbers",
    "replay/cache.py": "what a boundary computed from parameters",
    "replay/operations/in_place.py": "a write into a part of a tensor",
    "replay/operations/lookup.py": "a write by indices, into a tensor that was not saved",
    "replay/operations/masked.py": "a number in the place of masked elements",
    "replay/operations/normalisation.py": "a norm's eps, once",
    "replay/operations/pointwise.py": "x + c and x - c, once each; a dropout mask, on a CPU",
    "replay/operations/resampling.py": "on a CPU",
    "replay/operations/shape.py": "a constant that is joined to a tensor",
    "replay/walk.py": "a tensor that was written into",
    "torch_internals/capture.py": "the door",
    "torch_internals/late.py": "numbers that the device has copied",
}
ASKS = re.compile(r"\.item\(\)|torch\.equal\(|\.tolist\(\)|\.new_tensor\(|\.nonzero\(")


def test_no_other_file_asks_for_a_value() -> None:
    room = Path(snn_revplugin.__file__).parent
    asking = {
        str(path.relative_to(room))
        for path in room.rglob("*.py")
        if path.relative_to(room).parts[0] not in ("adapters", "report", "cli")
        and ASKS.search(path.read_text())
    }
    assert asking - MAY_ASK.keys() == set()

"""Several devices or streams in one graph. What backward reads lies on the device that runs it, and
was made there on the same stream; a copy to another device is a boundary, and a step on another
stream starts a chain of its own.

There is no GPU here: streams are numbers that the library is told, devices are fake tensors.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from compare import Observed, assert_agree
from either_host import clear
from spikingjelly.activation_based import neuron
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from snn_revplugin import convert, explain
from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.bptt import chain
from snn_revplugin.bptt.record import NeuronRecord
from snn_revplugin.packed.spikes import PackedSpikes
from snn_revplugin.replay import attach_recipes, operation_of
from snn_revplugin.torch_internals import backward_pass, graph, streams
from snn_revplugin.torch_internals.graph import Node
from snn_revplugin.torch_internals.pass_cache import pass_cache

T = 12


def net_of(host: str) -> nn.Module:
    torch.manual_seed(0)
    node = {
        "snntorch": lambda: snn.Leaky(beta=0.8, init_hidden=True),
        "spikingjelly": lambda: neuron.LIFNode(v_reset=None),
    }[host]
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), node(),
        nn.Conv2d(8, 8, 3, padding=1), nn.AvgPool2d(2), node(),
        nn.Flatten(), nn.Linear(8 * 36, 16), node(),
    )  # fmt: skip


def neurons_of(net: nn.Module) -> list[nn.Module]:
    return [each for each in net if isinstance(each, snn.SpikingNeuron | neuron.BaseNode)]


def run_on(stream: list[int], number: int, top: Node, known: set[Node]) -> None:
    """Graph nodes that are not known yet run on a stream, as autograd does with that of forward."""
    waiting = [top]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in known and not graph.is_leaf_edge(node):
            known.add(node)
            node.register_prehook(lambda grads: stream.__setitem__(0, number))
            waiting += [below for below, _ in node.next_functions]


def step(net: nn.Module, x: Tensor, stream: list[int], of_step: tuple[int, ...]) -> Observed:
    clear(*neurons_of(net))
    outputs, nodes = [], set()
    for frame, number in zip(x, of_step, strict=True):
        stream[0] = number
        outputs.append(net(frame))
        run_on(stream, number, outputs[-1].grad_fn, nodes)
    spikes = torch.stack(outputs)
    (spikes * torch.linspace(-1, 2, spikes.numel()).view(spikes.shape)).sum().backward()
    return Observed({"spikes": spikes.detach()}).see_gradients(net)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of the current stream."""
    now = [0]
    monkeypatch.setattr(streams, "current_stream", lambda: now[0])
    monkeypatch.setattr(streams, "stream_of", lambda device: now[0])
    return now


@pytest.mark.usefixtures("recompute_everything")
@pytest.mark.parametrize("host", ["snntorch", "spikingjelly"])
@pytest.mark.parametrize(
    "of_step", [(0,) * T, (0, 1) * (T // 2), (0,) * 5 + (1,) * 7], ids=["one", "in turns", "two"]
)
def test_streams_share_nothing(
    host: str, of_step: tuple[int, ...], stream: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, seen, starts, initial = torch.rand(T, 2, 2, 12, 12) * 2, [], [], chain.initial
    monkeypatch.setattr(chain, "initial", lambda state: starts.append(state) or initial(state))
    for swap in (False, True):
        net = net_of(host)
        if swap:
            convert(net)
        seen.append(step(net, x, stream, of_step))
    assert_agree(*seen)
    changes = sum(a != b for a, b in pairwise(of_step))
    assert len(starts) == len(neurons_of(net)) * (1 + changes)
    assert all(row.calls == T and not row.fallback_calls for row in explain(net).rows)


def test_values_of_a_pass_are_shared_on_one_stream(
    stream: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    monkeypatch.setattr(backward_pass, "current_pass", lambda: 7)
    monkeypatch.setattr(backward_pass, "at_end_of_pass", kept.append)
    caches = []
    for stream[0] in (0, 1, 0, 1):
        caches.append(pass_cache())
    assert caches[0] is caches[2] and caches[1] is caches[3] and caches[0] is not caches[1]


def test_bits_of_two_streams_lie_in_two_blocks(stream: list[int]) -> None:
    """Or one stream would free, and use again, what the other one reads."""
    fired, blocks, before = torch.ones(64, dtype=torch.bool), [], None
    for number in (0, 0, 0, 1, 1):
        stream[0] = number
        before = PackedSpikes(fired, before=before)
        blocks.append((before.block, number))
    assert len(dict.fromkeys(blocks)) == len({block for block, _ in blocks})


@pytest.mark.usefixtures("recompute_everything")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_copy_to_another_device_is_a_boundary(device: str) -> None:
    """What the layer there read is kept or packed there, not copied again."""
    spikes, _ = RevLeaky(beta=0.9)(torch.rand(8, 64).requires_grad_(), torch.zeros(8, 64))
    linear, record = nn.Linear(64, 64, device=device, dtype=torch.float64), NeuronRecord()
    current = linear(spikes.to(device, torch.float64))
    attach_recipes(current, record)
    assert ("ToCopyBackward0" in record.statistics.operations) == (device == "cpu")


def test_no_operation_reads_from_two_gpus() -> None:
    with FakeTensorMode():
        x = torch.rand(4, 8, device="cuda:0", requires_grad=True)
        for device in ("cuda:1", "cpu"):
            there = torch.zeros(4, 8, dtype=torch.float64, device=device)
            there[1:] = x[1:]
            for copy in (x.to(device, torch.float64), there):
                assert operation_of(copy.grad_fn).replay(copy.grad_fn) is None
        cast = x.to(torch.float64)
        assert operation_of(cast.grad_fn).replay(cast.grad_fn) is not None

"""Residual streams: sums of sums, reversed in depth. Held against the host's own neurons, in
numbers and in memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from collector import no_garbage_collector
from compare import MakeNeuron, Observed, agree
from spikingjelly.activation_based import functional, layer, surrogate
from spikingjelly.activation_based import neuron as host
from torch import Tensor, nn

from snn_revplugin.adapters.spikingjelly import RevIFNode, RevLIFNode, RevParametricLIFNode
from snn_revplugin.packed.integers import PackedIntegers
from snn_revplugin.replay import attach_recipes
from snn_revplugin.replay.residual_stream import BETWEEN_ANCHORS, REVERSED, Stream
from snn_revplugin.report.memory import memory_report

pytestmark = pytest.mark.usefixtures("recompute_everything")

TIME_STEPS, BATCH, WIDTH = 4, 3, 16


class Norm(nn.BatchNorm1d):
    """Batch norm over the last of [T, N, C], whose weights are not ones."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        nn.init.uniform_(self.weight, 0.4, 0.9)

    def forward(self, x_seq: Tensor) -> Tensor:
        return super().forward(x_seq.flatten(0, 1)).view(x_seq.shape)


def neuron_of(make: MakeNeuron) -> nn.Module:
    return make(
        v_threshold=0.4, surrogate_function=surrogate.ATan(), step_mode="m", detach_reset=True
    )


def branch_of(make: MakeNeuron, of_spikes: bool, width: int) -> nn.Sequential:
    """Neuron, linear layer and norm, of a membrane shortcut; or, the neuron last, of a sum of
    spikes."""
    parts = [nn.Linear(width, width), Norm(width)]
    return nn.Sequential(*([*parts, neuron_of(make)] if of_spikes else [neuron_of(make), *parts]))


class Net(nn.Module):
    """A stem, a way through some branches, and a neuron at the end.

    Args:
        way: takes the stem's output and the branches to the last neuron's current.
    """

    def __init__(
        self,
        make: MakeNeuron,
        way: Callable,
        blocks: int = 8,
        of_spikes: bool = False,
        width: int = WIDTH,
    ) -> None:
        super().__init__()
        self.stem = branch_of(make, of_spikes, width)
        self.branches = nn.ModuleList(branch_of(make, of_spikes, width) for _ in range(blocks))
        self.last = neuron_of(make)
        self.way = way

    def forward(self, x_seq: Tensor) -> Tensor:
        return self.last(self.way(self.stem(x_seq), self.branches))


def residual(x: Tensor, branches: nn.ModuleList) -> Tensor:
    for branch in branches:
        x = x + branch(x)
    return x


def iand(x: Tensor, branches: nn.ModuleList) -> Tensor:
    for branch in branches:
        x = x * (1 - branch(x))
    return x


def masked(x: Tensor, branches: nn.ModuleList) -> Tensor:
    for branch in branches:
        x = torch.dropout(x + branch(x), 0.2, train=True)
    return x


def the_other_way_round(x: Tensor, branches: nn.ModuleList) -> Tensor:
    for branch in branches:
        x = branch(x) + x
    return x


def in_place(x: Tensor, branches: nn.ModuleList) -> Tensor:
    for branch in branches:
        x += branch(x)
    return x


def doubled_in_place_at_the_end(x: Tensor, branches: nn.ModuleList) -> Tensor:
    x = residual(x, branches)
    branches[0](x)
    return x.mul_(2)


def edited_on_the_way(x: Tensor, branches: nn.ModuleList) -> Tensor:
    """Without a trace in the graph."""
    for i, branch in enumerate(branches):
        step = branch(x)
        x = x + step
        if i == 5:
            with torch.no_grad():
                x *= 1.25
    return x


def scaled(x: Tensor, branches: nn.ModuleList) -> Tensor:
    for branch in branches:
        x = torch.add(x, branch(x), alpha=0.5)
    return x


def with_smooth_steps(x: Tensor, branches: nn.ModuleList) -> Tensor:
    """A step that is computed from the sum itself, not from its spikes alone: the sum cannot be had
    from it."""
    for branch in branches:
        x = x + (branch(x) + torch.tanh(x))
    return x


def with_long_skips(x: Tensor, branches: nn.ModuleList) -> Tensor:
    """Sums that later steps come back to, as in a U-Net."""
    seen = []
    for branch in branches[:4]:
        seen.append(x)
        x = x + branch(x)
    for branch, before in zip(branches[4:], reversed(seen), strict=True):
        x = x + torch.sigmoid(before)
        x = x + branch(x).relu()
    return x


def of_two_streams(x: Tensor, branches: nn.ModuleList) -> Tensor:
    left, right = residual(x, branches[:4]), residual(-x, branches[4:])
    return residual(left + right, branches[:3])


def branched(x: Tensor, branches: nn.ModuleList) -> Tensor:
    """Two sums that go on from one."""
    x = residual(x, branches[:4])
    return residual(x, branches[4:6]) - residual(x, branches[6:8])


def broadcast(x: Tensor, branches: nn.ModuleList) -> Tensor:
    for branch in branches:
        x = x + branch(x)[:1]
    return x


def pooled(x: Tensor, branches: nn.ModuleList) -> Tensor:
    return residual(x, branches).mean(1, keepdim=True).expand_as(x)


def spikes_and_floats(x: Tensor, branches: nn.ModuleList) -> Tensor:
    """The neurons' spikes are added up first, then their currents go on from that."""
    spikes = x.sigmoid().round().detach()
    for branch in branches:
        spikes = spikes + (branch(x) > 0).to(x) + branch[0](x)
        x = x + branch(x)
    return spikes + x


WAYS = [
    residual,
    iand,
    masked,
    the_other_way_round,
    in_place,
    doubled_in_place_at_the_end,
    edited_on_the_way,
    scaled,
    with_smooth_steps,
    with_long_skips,
    of_two_streams,
    branched,
    broadcast,
    pooled,
    spikes_and_floats,
]


def trained(
    way: Callable,
    of_spikes: bool = False,
    blocks: int = 8,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Callable:
    """A program for :func:`compare.agree`: one training step of neurons with the given options."""

    def program(make: MakeNeuron) -> Observed:
        net = Net(lambda **usual: make(**(usual | options)), way, blocks, of_spikes).to(dtype)
        x_seq = (2 * torch.randn(TIME_STEPS, BATCH, WIDTH, dtype=dtype)).requires_grad_()
        outputs = net(x_seq)
        (outputs * torch.randn_like(outputs)).sum().backward()
        assert outputs.any()
        return Observed({"spikes": outputs.detach()}).see_gradients(x_seq=x_seq, **weights_of(net))

    return program


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    """All but the biases in front of a norm, whose gradients are rounding and nothing else."""
    return {
        name.replace(".", "_"): each
        for name, each in net.named_parameters()
        if not name.endswith("1.bias")
    }


@pytest.mark.parametrize("of_spikes", [False, True], ids=["floats", "spikes"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_trains_as_the_host(way: Callable, of_spikes: bool) -> None:
    if of_spikes and way is in_place:
        way = (
            doubled_in_place_at_the_end  # the host's linear layers do not let a sum be written into
        )
    agree(trained(way, of_spikes), host.LIFNode, RevLIFNode)


@pytest.mark.parametrize("of_spikes", [False, True], ids=["floats", "spikes"])
def test_sums_are_let_go(of_spikes: bool) -> None:
    neurons = agree(trained(residual, of_spikes, blocks=12), host.LIFNode, RevLIFNode)
    reversals = sum(each.record.statistics.operations[REVERSED] for each in neurons)
    assert reversals >= 5
    assert not any(each.record.statistics.boundaries for each in neurons)


NEURONS = [
    pytest.param(host.IFNode, RevIFNode, {"v_threshold": 1.0}, id="IF"),
    pytest.param(host.LIFNode, RevLIFNode, {"v_reset": None}, id="soft reset"),
    pytest.param(
        host.LIFNode,
        RevLIFNode,
        {"v_reset": -0.2, "detach_reset": False},
        id="reset to another potential",
    ),
    pytest.param(
        host.LIFNode,
        RevLIFNode,
        {"decay_input": False, "tau": 4.0, "detach_reset": False},
        id="no decay of input",
    ),
    pytest.param(host.LIFNode, RevLIFNode, {"store_v_seq": True}, id="all potentials"),
    pytest.param(
        host.ParametricLIFNode,
        RevParametricLIFNode,
        {"detach_reset": False},
        id="learned time constant",
    ),
    pytest.param(
        host.ParametricLIFNode,
        RevParametricLIFNode,
        {"v_reset": None},
        id="learned time constant, soft reset",
    ),
]


@pytest.mark.parametrize(("kind", "ours", "options"), NEURONS)
def test_every_kind_of_neuron(
    kind: type[nn.Module], ours: type[nn.Module], options: dict[str, Any]
) -> None:
    neurons = agree(trained(residual, **options), kind, ours)
    assert sum(each.record.statistics.operations[REVERSED] for each in neurons) >= 5


def test_a_spike_is_not_decided_again() -> None:
    """One potential of each layer lies on its threshold, and the rounding of a difference would
    carry some under it."""

    def program(make: MakeNeuron) -> Observed:
        net = Net(make, residual, 12)
        x = net.stem((2 * torch.randn(TIME_STEPS, BATCH, WIDTH)).requires_grad_())
        for branch in net.branches:
            branch[0].v_threshold = (
                x[0].median().item() / 2
            )  # in the first step the charge is x / 2
            x = x + branch(x)
        outputs = net.last(x)
        (outputs * torch.randn_like(outputs)).sum().backward()
        return Observed({"spikes": outputs.detach()}).see_gradients(**weights_of(net))

    agree(program, host.LIFNode, RevLIFNode)


def test_a_deep_stream() -> None:
    agree(trained(residual, blocks=60), host.LIFNode, RevLIFNode)


@pytest.mark.parametrize("of_spikes", [False, True], ids=["floats", "spikes"])
def test_half_precision(of_spikes: bool) -> None:
    agree(trained(residual, of_spikes, dtype=torch.bfloat16), host.LIFNode, RevLIFNode)


def test_double_precision() -> None:
    agree(trained(residual, dtype=torch.float64), host.LIFNode, RevLIFNode)


def test_a_loss_on_the_way_and_two_backward_passes() -> None:
    def program(make: MakeNeuron) -> Observed:
        net, seen = Net(make, residual, 9), []
        net.branches[5].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        x_seq = (2 * torch.randn(TIME_STEPS, BATCH, WIDTH)).requires_grad_()
        outputs = net(x_seq)
        (seen[0] ** 2).sum().backward(retain_graph=True)
        outputs.sum().backward(retain_graph=True)
        outputs.sum().backward()
        return Observed({"spikes": outputs.detach()}).see_gradients(**weights_of(net))

    agree(program, host.LIFNode, RevLIFNode)


def test_the_upper_part_is_dropped() -> None:
    """Its sums were released for a later one, whose graph is no longer held."""

    def program(make: MakeNeuron) -> Observed:
        net = Net(make, residual, 8)
        x = net.stem((2 * torch.randn(TIME_STEPS, BATCH, WIDTH)).requires_grad_())
        middle = residual(x, net.branches[:4])
        early = net.last(middle)
        residual(middle, net.branches[4:])
        early.sum().backward()
        return Observed({"spikes": early.detach()}).see_gradients(**weights_of(net))

    agree(program, host.LIFNode, RevLIFNode)


@pytest.mark.parametrize("backward", [True, False], ids=["backward", "no backward"])
def test_nothing_is_left_behind(backward: bool) -> None:
    net = Net(RevLIFNode, residual, 8)
    sums: list[weakref.ref] = []
    x = 2 * torch.randn(TIME_STEPS, BATCH, WIDTH)
    with no_garbage_collector():
        current = residual(net.stem(x), net.branches)
        outputs = net.last(current)
        node = current.grad_fn
        memo = next(value for value in node.metadata.values())
        assert isinstance(memo(), Stream)
        sums.append(memo)
        if backward:
            outputs.sum().backward()
        for each in net.modules():
            if isinstance(each, RevLIFNode):
                each.reset()
        del outputs, current, node, memo
        assert sums[0]() is None


def kept_of_a_block(x: Tensor) -> float:
    """Bytes: spikes as bits, the potential that is carried on, the norm's statistics; and a
    little."""
    return x.numel() / 8 + x[0].nbytes + 4 * 4 * x.shape[-1]


@pytest.mark.parametrize(
    ("way", "of_spikes"),
    [(residual, False), (residual, True), (iand, True)],
    ids=["floats", "spikes", "products of spikes"],
)
def test_memory_does_not_grow_by_the_sums(way: Callable, of_spikes: bool) -> None:
    width, peaks = 256, []
    x = 2 * torch.randn(16, 16, width)
    for blocks in (8, 14):
        net = Net(RevLIFNode, way, blocks, of_spikes, width)
        for each in net.parameters():
            each.grad = torch.zeros_like(each)
        peaks.append(memory_report(lambda net=net: net(x).sum()).peak)
    assert peaks[0] > x.nbytes
    assert peaks[1] - peaks[0] < 6 * (kept_of_a_block(x) + 0.05 * x.nbytes)


def test_anchors_in_depth() -> None:
    """Of every ``BETWEEN_ANCHORS`` sums one is kept."""
    width, kept = 64, []
    x = 2 * torch.randn(16, 16, width)
    for blocks in (BETWEEN_ANCHORS - 2, 2 * BETWEEN_ANCHORS + 10):
        net = Net(RevLIFNode, residual, blocks, width=width)
        kept.append(memory_report(lambda net=net: net(x).sum()).retained)
    sums = (kept[1] - kept[0] - (BETWEEN_ANCHORS + 12) * kept_of_a_block(x)) / x.nbytes
    assert 1.6 < sums < 2.4


@pytest.mark.parametrize("largest", [0, 1, 2, 7, 8, 31])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_packed_integers(largest: int, dtype: torch.dtype) -> None:
    numbers = torch.randint(0, largest + 1, (3, 5, 7)).to(dtype).transpose(0, 2)
    numbers[0, 0, 0] = largest
    packed = PackedIntegers.of(numbers)
    again = packed.numbers()
    assert (
        torch.equal(again, numbers) and again.dtype == dtype and again.stride() == numbers.stride()
    )
    assert packed.nbytes == max(largest.bit_length(), 1) * 14


@pytest.mark.parametrize("number", [0.5, -31.0, 33.0, 257.0, float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (2, 3)])
def test_what_is_no_small_integer_is_not_packed(number: float, place: tuple[int, int]) -> None:
    numbers = torch.ones(3, 4)
    numbers[place] = number
    assert PackedIntegers.of(numbers) is None


@pytest.mark.parametrize("lowest", [-1, -7, -31])
def test_numbers_below_zero(lowest: int) -> None:
    numbers = torch.randint(lowest, lowest + 32, (4, 9)).float().t()
    packed = PackedIntegers.of(numbers)
    assert torch.equal(packed.numbers(), numbers)
    assert packed.numbers().stride() == numbers.stride()


def test_nothing_is_not_packed() -> None:
    assert PackedIntegers.of(torch.ones(0, 3)) is None


class ShortStream(nn.Module):
    """Sums of sums of spikes, fewer than make a stream: one stage of SEW-ResNet, by its shapes."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()

        def fires(*sizes: int, **options: int) -> nn.Sequential:
            return nn.Sequential(
                layer.Conv2d(*sizes, **options), kind(v_threshold=0.1, detach_reset=True)
            )

        self.first = fires(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(fires(16, 8, 1), fires(8, 16, 1)) for _ in range(4)
        )
        self.last = fires(16, 4, 4, stride=4)
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x) + x
        return self.last(x)


def test_sums_do_not_stand_until_their_layers_are_reached() -> None:
    """The last sum is recomputed from those below, which do not stay for their own readers."""
    peaks, gradients = [], []
    for kind in (host.LIFNode, RevLIFNode):
        torch.manual_seed(0)
        net, x = ShortStream(kind), 2 * torch.rand(TIME_STEPS, 2, 3, 32, 32)
        report = memory_report(lambda net=net, x=x: net(x).square().sum())
        peaks.append(report.peak - report.retained)
        gradients.append([each.grad for each in net.parameters()])
    one_sum = 4 * TIME_STEPS * 2 * 16 * 32 * 32
    assert peaks[1] < 5 * one_sum
    assert all(each.any() for each in gradients[0])
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_single_time_step_makes_no_stream() -> None:
    net = Net(RevLIFNode, residual, 8)
    for each in net.modules():
        if isinstance(each, RevLIFNode):
            each.step_mode = "s"
    current = residual(net.stem(torch.randn(1, BATCH, WIDTH)), net.branches)
    assert attach_recipes(current, net.last.record).exact

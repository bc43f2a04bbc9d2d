"""The memory budget: the plan is right, peaks stay within it, and gradients are the host's."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from itertools import product

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor

from snn_revplugin import convert, explain, memory_report, use_settings
from snn_revplugin.budget import MOST, Unit, Value, bytes_of, check_budget, plan_of
from snn_revplugin.replay.walk import BUDGET

# ------------------------------------------------------------------------------------- the plan


def saved_by(units: list[Unit], kept: tuple[tuple[bool, ...], ...]) -> float:
    return sum(
        value.work
        for unit, flags in zip(units, kept, strict=True)
        for value, flag in zip(unit.values, flags, strict=True)
        if flag
    )


def is_within(units: list[Unit], kept: tuple[tuple[bool, ...], ...], peak: float) -> bool:
    """Whether no unit that stands after something was kept exceeds the peak."""
    held = kept_so_far = 0
    for u, (unit, flags) in enumerate(zip(units, kept, strict=True)):
        kept_so_far += sum(v.nbytes for v, flag in zip(unit.values, flags, strict=True) if flag)
        held += unit.stays
        gradients = sum(each.gradients for each in units[u:])
        if kept_so_far and held + kept_so_far + MOST * unit.largest + gradients > peak:
            return False
    return True


@pytest.mark.parametrize("seed", range(40))
def test_a_small_plan_is_the_best_one(seed: int) -> None:
    draw = random.Random(seed)
    units = [
        Unit(
            draw.randint(0, 5),
            draw.randint(1, 40),
            [Value(draw.randint(1, 30), draw.randint(0, 30))],
            draw.choice((0, 0, 7)),
        )
        for _ in range(12)
    ]
    limit = draw.choice((None, draw.randint(60, 400)))
    plan = plan_of(units, limit)
    peak = plan.least if limit is None else limit
    assert is_within(units, plan.kept, peak)
    best = max(
        (
            saved_by(units, choice)
            for flags in product((False, True), repeat=12)
            if is_within(units, choice := tuple((flag,) for flag in flags), peak)
        ),
    )
    assert saved_by(units, plan.kept) == best


def test_of_many_equal_values_the_last_are_kept() -> None:
    units = [Unit(10, 100, [Value(50, 200.0)]) for _ in range(1000)]
    kept = [flag for (flag,) in plan_of(units, 1000 * 10 + MOST * 100 + 50 * 300).kept]
    assert kept == [False] * 700 + [True] * 300


def test_a_large_plan_stays_within_the_peak() -> None:
    draw = random.Random(0)
    units = [
        Unit(draw.randint(0, 9), draw.randint(1, 900), [Value(draw.randint(1, 90), draw.random())])
        for _ in range(2000)
    ]
    plan = plan_of(units, 40_000)
    assert plan.kept_bytes > 0
    assert is_within(units, plan.kept, 40_000)


@pytest.mark.parametrize("budget", [True, 0, -5, "much", "5 XB", None, float("nan"), "-3 MiB"])
def test_what_is_no_budget(budget: object) -> None:
    with pytest.raises(ValueError, match="memory_budget must be"):
        check_budget(budget)
    with (
        pytest.raises(ValueError, match="memory_budget must be"),
        use_settings(memory_budget=budget),
    ):
        pass


def test_amounts() -> None:
    assert bytes_of("1.5 GiB", 0) == 1.5 * (1 << 30)
    assert bytes_of("50%", 4000) == 2000
    assert bytes_of(123, 0) == 123
    assert bytes_of("peak", 0) is None


# ----------------------------------------------------------------------------- steps of real nets


class Blocks(nn.Module):
    """Convolution, batch norm and LIF neuron, four times; early blocks are large."""

    def __init__(self) -> None:
        super().__init__()
        layers, channels = [], 2
        for width in (16, 16, 32, 32):
            layers += [layer.Conv2d(channels, width, 3, padding=1, bias=False)]
            layers += [layer.BatchNorm2d(width), neuron.LIFNode()]
            layers += [layer.MaxPool2d(2)] if width == 16 else []
            channels = width
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(32 * 16, 5)
        functional.set_step_mode(self.layers, "m")

    def forward(self, x: Tensor) -> Tensor:
        functional.reset_net(self)
        return self.head(self.layers(x).flatten(2).mean(0))


class Loop(nn.Module):
    """Two convolutional layers and a linear one of snnTorch neurons, in a time loop."""

    def __init__(self) -> None:
        super().__init__()
        options = {"beta": 0.9, "spike_grad": snn_surrogate.atan()}
        self.conv1, self.conv2, self.fc = (
            nn.Conv2d(2, 8, 3),
            nn.Conv2d(8, 16, 3),
            nn.Linear(16 * 4, 5),
        )
        self.neurons = nn.ModuleList(snn.Leaky(**options) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        mems, seen = [each.reset_mem() for each in self.neurons], []
        for frame in x:
            a, mems[0] = self.neurons[0](torch.max_pool2d(self.conv1(frame), 2), mems[0])
            b, mems[1] = self.neurons[1](torch.max_pool2d(self.conv2(a), 2), mems[1])
            out, mems[2] = self.neurons[2](self.fc(b.flatten(1)), mems[2])
            seen.append(out + mems[2])
        return torch.stack(seen).mean(0)


NETS = {
    "spikingjelly": (Blocks, (8, 4, 2, 16, 16)),
    "snntorch": (Loop, (30, 8, 2, 14, 14)),
}


class Both:
    """The host's net and ours, with the same weights and data."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        make, shape = NETS[name]
        self.host = make()
        self.ours = copy.deepcopy(self.host)
        convert(self.ours)
        self.x = torch.rand(shape)

    def step(self, net: nn.Module, x: Tensor | None = None) -> Callable[[], None]:
        def run() -> None:
            net.zero_grad()
            net(self.x if x is None else x).square().sum().backward()

        return run

    def gradients(self, net: nn.Module, x: Tensor | None = None) -> Tensor:
        self.step(net, x)()
        return torch.cat([each.grad.flatten() for each in net.parameters()])

    def error(self, x: Tensor | None = None) -> float:
        host = self.gradients(self.host, x)
        return ((self.gradients(self.ours, x) - host).norm() / host.norm()).item()


def kept_by_budget(net: nn.Module) -> int:
    """The bytes that the plans of a net keep."""
    return sum(
        plan.plan.kept_bytes
        for each in net.modules()
        if hasattr(each, "record")
        for plan in each.record.cache.planned_steps.values()
    )


@pytest.mark.parametrize("name", NETS)
def test_peaks_stay_within_the_budget(name: str) -> None:
    both = Both(name)
    host = memory_report(both.step(both.host))
    least = memory_report(both.step(both.ours))
    assert least.peak < host.peak / 2
    retained = []
    for share in (0.5, 0.75, 1.5):
        budget = share * host.peak
        with use_settings(memory_budget=budget):
            both.step(both.ours)()
            report = memory_report(both.step(both.ours))
            assert report.peak <= max(budget, least.peak)
            retained.append(report.retained)
            assert both.error() < 2e-6
    assert least.retained < retained[0] < retained[1] <= retained[2]


def test_what_is_free_is_kept_by_default() -> None:
    both = Both("spikingjelly")
    least = memory_report(both.step(both.ours))
    with use_settings(memory_budget="peak"):
        both.step(both.ours)()
        report = memory_report(both.step(both.ours))
        assert both.error() < 2e-6
    assert report.peak <= 1.02 * least.peak
    assert report.retained > 1.5 * least.retained


def test_too_small_a_budget_keeps_nothing_and_says_what_is_needed() -> None:
    both = Both("spikingjelly")
    least = memory_report(both.step(both.ours))
    with use_settings(memory_budget=1000):
        both.step(both.ours)()
        assert memory_report(both.step(both.ours)).peak == least.peak
    assert "the budget is too small, so nothing more is kept; it takes about" in str(
        explain(both.ours)
    )


def test_explain_tells_what_is_kept() -> None:
    both = Both("spikingjelly")
    with use_settings(memory_budget="host"):
        both.step(both.ours)()
        explanation = explain(both.ours, both.step(both.ours))
    assert explanation.kept[BUDGET] == kept_by_budget(both.ours) > 0
    assert "of values that could be recomputed" in str(explanation)


@pytest.mark.parametrize("name", NETS)
def test_other_batches_and_other_lengths_have_plans_of_their_own(name: str) -> None:
    both = Both(name)
    shapes = [both.x, both.x[:, :3], both.x[:5], both.x, both.x[:5], both.x[:, :3]]
    with use_settings(memory_budget="host"):
        for x in shapes * 2:
            assert both.error(x.contiguous()) < 2e-6


@pytest.mark.parametrize("name", NETS)
def test_faults_in_a_step(name: str) -> None:
    """An exception in forward, a frozen layer, an evaluation in between: never wrong."""
    both = Both(name)
    with use_settings(memory_budget="80%"):
        assert both.error() < 2e-6
        for net in (both.host, both.ours):
            handle = net.get_submodule("head" if name == "spikingjelly" else "fc")
            hook = handle.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                net(both.x)
            hook.remove()
        for _ in range(4):
            assert both.error() < 2e-6
        for net in (both.host, both.ours):
            with torch.no_grad():
                net(both.x)
            next(net.parameters()).requires_grad_(False)
        for _ in range(2):
            for net in (both.host, both.ours):
                net.zero_grad()
                net(both.x).square().sum().backward()
            pairs = zip(both.host.parameters(), both.ours.parameters(), strict=True)
            for theirs, ours in pairs:
                assert (theirs.grad is None) is (ours.grad is None)
                if theirs.grad is not None:
                    torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-4, atol=2e-6)


def test_a_step_that_became_shorter_is_planned_anew() -> None:
    both = Both("snntorch")
    with use_settings(memory_budget="host"):
        both.step(both.ours)()
        plans = both.ours.neurons[0].record.cache.planned_steps
        assert [len(each.calls) for each in plans.values()] == [3 * 30]
        for _ in range(3):
            both.step(both.ours, both.x[:10])()
        assert [len(each.calls) for each in plans.values()] == [3 * 10]


def test_two_nets_in_turn_and_accumulated_gradients() -> None:
    one, other = Both("spikingjelly"), Both("snntorch")
    with use_settings(memory_budget="host"):
        for _ in range(3):
            assert one.error() < 2e-6
            assert other.error() < 2e-6
        totals = []
        for net in (one.host, one.ours):
            net.zero_grad()
            for part in one.x.split(2, dim=1):
                net(part).square().sum().backward()
            totals.append(torch.cat([each.grad.flatten() for each in net.parameters()]))
            net.zero_grad()
            loss = net(one.x).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
            totals.append(torch.cat([each.grad.flatten() for each in net.parameters()]))
    torch.testing.assert_close(totals[2], totals[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(totals[3], totals[1], rtol=1e-4, atol=1e-5)


def test_a_kept_value_that_is_written_into_is_recomputed() -> None:
    """Autograd keeps no neuron's input: the host lets code write into it."""
    both = Both("spikingjelly")

    def spoil(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        inputs[0].data.zero_()

    handles = [
        each.register_forward_hook(spoil)
        for net in (both.host, both.ours)
        for each in net.modules()
        if isinstance(each, neuron.LIFNode)
    ]
    with use_settings(memory_budget="host"):
        for _ in range(2):
            assert both.error() < 2e-6
    assert len(handles) == 8


def test_the_budget_of_a_net() -> None:
    """``convert`` gives a net its own, which copies and pickles keep."""
    both = Both("spikingjelly")
    convert(both.ours, memory_budget="host")
    for net in (both.ours, copy.deepcopy(both.ours), pickle.loads(pickle.dumps(both.ours))):
        both.step(net)()
        assert kept_by_budget(net) > 0
    with pytest.raises(ValueError, match="memory_budget must be"):
        convert(both.ours, memory_budget="all of it")

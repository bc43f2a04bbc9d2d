"""Neurons drawn at random, in nets drawn at random: the converted net has the host's outputs and
states bit for bit and, to rounding, its gradients.

A neuron has one to three states, a charge expression for each, learned parameters or not, any
reset, and may draw noise. It is a plain module in a time loop, or a ``MemoryModule`` of
SpikingJelly in step mode 's' or 'm'. ``RANDOM_EXAMPLES=500 pytest tests/test_random_neurons.py``
draws more than the suite does.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from compare import Observed, assert_agree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import base, surrogate
from torch import Tensor, nn

from snn_revplugin import convert, register_neuron, use_settings

EXAMPLES = int(os.environ.get("RANDOM_EXAMPLES", "40"))
LOOP, SINGLE_STEPS, ALL_STEPS = "plain module", "SpikingJelly 's'", "SpikingJelly 'm'"
CHANNELS, SIZE = 4, 4
SHAPES = {  # what a charge is put through
    "as it is": lambda h: h,
    "tanh": lambda h: 2 * torch.tanh(h / 2),
    "relu": F.relu,
    "sin": lambda h: h + 0.3 * torch.sin(h),
    "quadratic": lambda h: (h + 0.05 * h * h).clamp(-4, 4),
    "softplus": lambda h: F.softplus(h) - 0.7,
}
SURROGATES = {
    "ATan": surrogate.ATan(1.5),
    "Sigmoid": surrogate.Sigmoid(3.0),
    "triangle": surrogate.PiecewiseQuadratic(1.0),
}


@dataclass(frozen=True)
class Charge:
    """How one state is charged: ``shape(decay * state + gain * drive + mixed * another state)``.

    Args:
        decay: of the state.
        learned: whether decay and gain are parameters.
        from_input: whether it is driven by the input; else by the state charged before it.
        mixed: the share of the last state before the step, 0 for none.
        shape: a name in ``SHAPES``.
        reset: what a spike does to it: "soft", "hard", "rise" (a threshold that adapts), or "none".
    """

    decay: float
    learned: bool
    from_input: bool
    mixed: float
    shape: str
    reset: str


@dataclass(frozen=True)
class Neuron:
    """A neuron. The first state fires; the last one is added to the threshold if ``adapts``.

    Args:
        detached: whether no gradient passes through the reset.
        graded: what the outputs are: "spikes", "two levels" (0, 1, 2) or "real" (spikes times the
            potential).
        noise: the share of noise in the input.
    """

    charges: tuple[Charge, ...]
    threshold: float
    learned_threshold: bool
    adapts: bool
    detached: bool
    graded: str
    noise: float
    surrogate: str


@dataclass(frozen=True)
class Block:
    """A layer: its weights ("conv" or "linear" over the channels), its norm, its pooling."""

    weigh: str
    norm: str
    pool: str


@dataclass(frozen=True)
class Plan:
    """A net of one kind of neuron, and how it is trained for one step.

    Args:
        losses: the time steps whose outputs the loss reads.
        cut: the time step after which backpropagation is truncated, or none.
        last_states: whether the loss reads the last states too.
        passes: backward passes through the same graph.
        interval: the setting ``rebuild_interval``.
    """

    style: str
    neuron: Neuron
    blocks: tuple[Block, ...]
    time_steps: int
    losses: frozenset[int]
    cut: int | None
    last_states: bool
    passes: int
    interval: int
    seed: int


charges = st.builds(
    Charge,
    decay=st.sampled_from([0.3, 0.7, 0.9, 1.0]),
    learned=st.booleans(),
    from_input=st.booleans(),
    mixed=st.sampled_from([0.0, 0.0, 0.2, -0.3]),
    shape=st.sampled_from(sorted(SHAPES)),
    reset=st.sampled_from(["soft", "hard", "rise", "none"]),
)
neurons = st.builds(
    Neuron,
    charges=st.lists(charges, min_size=1, max_size=3).map(tuple),
    threshold=st.sampled_from([0.4, 0.8]),
    learned_threshold=st.booleans(),
    adapts=st.booleans(),
    detached=st.booleans(),
    graded=st.sampled_from(["spikes", "spikes", "two levels", "real"]),
    noise=st.sampled_from([0.0, 0.0, 0.0, 0.4]),
    surrogate=st.sampled_from(sorted(SURROGATES)),
)
blocks = st.builds(
    Block,
    weigh=st.sampled_from(["conv", "linear"]),
    norm=st.sampled_from(["none", "batch", "group"]),
    pool=st.sampled_from(["none", "max", "average"]),
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    steps = draw(st.integers(1, 9))
    style = draw(st.sampled_from([LOOP, SINGLE_STEPS, ALL_STEPS]))
    plan = Plan(
        style=style,
        neuron=draw(neurons),
        blocks=tuple(draw(st.lists(blocks, min_size=1, max_size=3))),
        time_steps=steps,
        losses=frozenset(draw(st.sets(st.integers(0, steps - 1), min_size=1))),
        cut=draw(st.none() | st.integers(0, steps - 1)),
        last_states=draw(st.booleans()),
        passes=draw(st.integers(1, 2)),
        interval=draw(st.sampled_from([1, 3, 12])),
        seed=draw(st.integers(0, 999)),
    )
    # In step mode 'm' a layer draws the noise of all its steps before the next layer draws any.
    return plan if style != ALL_STEPS or plan.cut is None else replace(plan, cut=None)


class Dynamics(nn.Module):
    """The parameters of a drawn neuron, and its step."""

    def __init__(self, neuron: Neuron) -> None:
        super().__init__()
        self.neuron = neuron
        self.numbers = nn.ParameterList()
        for each in neuron.charges:
            for number in (each.decay, 1.1):
                self.numbers.append(nn.Parameter(torch.tensor(number), each.learned))
        self.threshold = nn.Parameter(torch.tensor(neuron.threshold), neuron.learned_threshold)

    def forward(self, x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        neuron, charged = self.neuron, []
        if neuron.noise:
            x = x + neuron.noise * torch.randn_like(x)
        for i, (each, state) in enumerate(zip(neuron.charges, states, strict=True)):
            decay, gain = self.numbers[2 * i], self.numbers[2 * i + 1]
            drive = x if each.from_input or not charged else charged[-1]
            h = decay * state + gain * drive
            if each.mixed:
                h = h + each.mixed * states[-1]
            charged.append(SHAPES[each.shape](h))
        above = charged[0] - self.threshold
        if neuron.adapts and len(charged) > 1:
            above = above - 0.3 * charged[-1]
        fire = SURROGATES[neuron.surrogate]
        spikes = fire(above)
        outputs = spikes
        if neuron.graded == "two levels":
            outputs = spikes + fire(above - 0.5)
        elif neuron.graded == "real":
            outputs = spikes * charged[0]
        signal = spikes.detach() if neuron.detached else spikes
        after = [
            {
                "soft": lambda h: h - self.threshold * signal,
                "hard": lambda h: (1 - signal) * h,
                "rise": lambda h: h + 0.3 * signal,
                "none": lambda h: h * 1.0,
            }[each.reset](h)
            for each, h in zip(neuron.charges, charged, strict=True)
        ]
        return outputs, tuple(after)


class Plain1(nn.Module):
    def __init__(self, neuron: Neuron) -> None:
        super().__init__()
        self.dynamics = Dynamics(neuron)

    def forward(self, x: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        outputs, states = self.dynamics(x, (a,))
        return outputs, *states


class Plain2(Plain1):
    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        outputs, states = self.dynamics(x, (a, b))
        return outputs, *states


class Plain3(Plain1):
    def forward(self, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        outputs, states = self.dynamics(x, (a, b, c))
        return outputs, *states


PLAIN = {1: Plain1, 2: Plain2, 3: Plain3}


class Memory(base.MemoryModule):
    def __init__(self, neuron: Neuron) -> None:
        super().__init__()
        for i in range(len(neuron.charges)):
            self.register_memory(f"state{i}", 0.0)
        self.dynamics = Dynamics(neuron)

    def single_step_forward(self, x: Tensor) -> Tensor:
        names = list(self._memories)
        states = tuple(
            each if isinstance(each, Tensor) else torch.full_like(x, each)
            for each in self._memories.values()
        )
        outputs, after = self.dynamics(x, states)
        self._memories.update(zip(names, after, strict=True))
        return outputs

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        return torch.stack([self.single_step_forward(x) for x in x_seq])


class Layer(nn.Module):
    def __init__(self, block: Block, plan: Plan) -> None:
        super().__init__()
        self.block, self.style = block, plan.style
        bias = block.norm != "batch"  # under which its gradient cancels
        if block.weigh == "conv":
            self.weigh: nn.Module = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=bias)
        else:
            self.weigh = nn.Linear(CHANNELS, CHANNELS, bias=bias)
        norms = {"batch": nn.BatchNorm2d(CHANNELS), "group": nn.GroupNorm(2, CHANNELS)}
        self.norm = norms.get(block.norm, nn.Identity())
        count = len(plan.neuron.charges)
        self.cell = (PLAIN[count] if plan.style == LOOP else Memory)(plan.neuron)
        if plan.style == ALL_STEPS:
            self.cell.step_mode = "m"
        self.states: tuple[Tensor, ...] = ()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        if self.style == ALL_STEPS:
            current = self.current(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        else:
            current = self.current(x)
        if self.style != LOOP:
            return self.cell(current)
        states = self.states or (torch.zeros_like(current),) * self.count
        outputs, *self.states = self.cell(current, *states)
        return outputs

    def current(self, x: Tensor) -> Tensor:
        if self.block.weigh == "conv":
            x = self.weigh(x)
        else:
            x = self.weigh(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.norm(x * 2)
        pool = {"max": F.max_pool2d, "average": F.avg_pool2d}.get(self.block.pool)
        return x if pool is None else pool(x, 3, 1, 1)

    def last(self) -> list[Tensor]:
        return [*self.states] if self.style == LOOP else [*self.cell._memories.values()]

    def detach(self) -> None:
        if self.style == LOOP:
            self.states = [each.detach() for each in self.states]
        else:
            self.cell.detach()


def train(net: nn.ModuleList, plan: Plan) -> Observed:
    """One training step."""
    generator = torch.Generator().manual_seed(plan.seed)
    shape = plan.time_steps, 2, CHANNELS, SIZE, SIZE
    x = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.randn(shape, dtype=torch.float64, generator=generator)
    torch.manual_seed(plan.seed)  # of the neurons' noise

    def through(x: Tensor) -> Tensor:
        for each in net:
            x = each(x)
        return x

    outputs: list[Tensor] = []
    if plan.style == ALL_STEPS:
        outputs = list(through(x).unbind(0))
    else:
        for t, frame in enumerate(x):
            outputs.append(through(frame))
            if t == plan.cut:
                for each in net:
                    each.detach()
    terms = [(outputs[t] * weights[t]).sum() for t in sorted(plan.losses)]
    states = [state for each in net for state in each.last()]
    if plan.last_states:
        terms += [(i + 1) * each.sum() for i, each in enumerate(states) if each.requires_grad]
    for i in range(plan.passes):
        loss = sum(terms[i :: plan.passes])
        if isinstance(loss, Tensor):
            loss.backward(retain_graph=i + 1 < plan.passes)
    exact = {f"output {t}": each.detach() for t, each in enumerate(outputs)}
    exact |= {f"state {i}": each.detach() for i, each in enumerate(states)}
    exact |= {f"buffer {name}": each for name, each in net.named_buffers()}
    exact["generator"] = torch.get_rng_state()
    return Observed(exact).see_gradients(net, x=x)


@pytest.mark.timeout(900)  # to print a failing plan, hypothesis makes it small first
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(plans())
def test_a_random_neuron_in_a_random_net(plan: Plan) -> None:
    for count, kind in PLAIN.items():
        register_neuron(kind, states=("a", "b", "c")[:count])
    torch.manual_seed(plan.seed)
    host = nn.ModuleList(Layer(block, plan) for block in plan.blocks).double()
    ours = copy.deepcopy(host)
    report = convert(ours)
    assert len(report.by_own_step) == len(plan.blocks), report
    with use_settings(recompute_min_bytes=0, rebuild_interval=plan.interval):
        assert_agree(train(host, plan), train(ours, plan))
    for each in ours:
        statistics = each.cell.record.statistics
        assert not statistics.fallback_calls, statistics.reasons

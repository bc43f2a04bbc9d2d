"""RevLeaky against snntorch.Leaky: every combination of options, both state forms, and snnTorch's own tools."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from compare import MakeNeuron, Observed, agree, assert_alive
from snntorch import surrogate
from torch import Tensor

from snn_revplugin.adapters.snntorch import RevLeaky

FEATURES = {"linear": (6,), "conv": (3, 4, 4)}  # of the first layer's neurons
LENGTHS = 1, 2, 9, 40
PASSED, HIDDEN, HIDDEN_WITH_OUTPUT = "mem passed", "init_hidden", "init_hidden, output"


class _UsersStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).float()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / (1 + 3 * x.abs())


SURROGATES: dict[str, Callable[[], Callable | None]] = {
    "default": lambda: None,
    "fast_sigmoid": lambda: surrogate.fast_sigmoid(slope=4),
    "sigmoid": lambda: surrogate.sigmoid(slope=5),
    "atan": lambda: surrogate.atan(alpha=1.5),
    "straight_through": surrogate.straight_through_estimator,
    "spike_rate_escape": lambda: surrogate.spike_rate_escape(beta=0.7, slope=2),
    "custom_surrogate": lambda: surrogate.custom_surrogate(lambda z, grad, spikes: grad * (0.2 + spikes) / (1 + z * z)),
    "user's autograd Function": lambda: _UsersStep.apply,
}


class Net(nn.Module):
    """A weight layer, neurons, a linear layer, neurons; the time loop is :func:`train`'s."""

    def __init__(self, make: MakeNeuron, kind: str, first: dict, second: dict) -> None:
        super().__init__()
        self.weigh = nn.Linear(5, 6) if kind == "linear" else nn.Conv2d(2, 3, 3)
        self.lif1 = make(**first)
        self.readout = nn.Linear(FEATURES[kind][0] if kind == "linear" else 48, 4)
        self.lif2 = make(**second)


def draw(kind: str, T: int, dtype: torch.dtype, batch: int = 3) -> Tensor:
    """A sequence of inputs ``[T, batch, ...]`` that makes a :class:`Net` fire now and then."""
    shape = (5,) if kind == "linear" else (2, 6, 6)
    return (torch.randn(T, batch, *shape) * 2 + 0.5).to(dtype).requires_grad_()


def train(net: Net, x: Tensor, form: str, initial: tuple[Tensor, Tensor] | None = None) -> Observed:
    """One forward over time and one backward from every spike and membrane."""
    mem = initial
    if mem is None:
        mem = net.lif1.reset_mem(), net.lif2.reset_mem()
    elif form != PASSED:
        net.lif1.mem, net.lif2.mem = mem
    record: dict[str, list[Tensor]] = {name: [] for name in ("spk1", "mem1", "spk2", "mem2", "reset")}
    for frame in x:
        out1 = net.lif1(net.weigh(frame), *mem[:1] if form == PASSED else ())
        spk1, mem1 = (out1, net.lif1.mem) if form == HIDDEN else out1
        out2 = net.lif2(net.readout(spk1.flatten(1).to(frame.dtype)), *mem[1:] if form == PASSED else ())
        spk2, mem2 = (out2, net.lif2.mem) if form == HIDDEN else out2
        mem = mem1, mem2
        for name, value in zip(record, (spk1, mem1, spk2, mem2, net.lif1.reset), strict=True):
            record[name].append(value)
    exact = {name: torch.stack(values) for name, values in record.items()}
    loss = sum((each * torch.randn(each.shape)).sum() for name, each in exact.items() if name != "reset")
    loss.backward()
    return Observed(exact).see_gradients(net, x=x)


def per_neuron(low: float, high: float, shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape) * (high - low) + low


def _table() -> list:
    """Every combination of the options; the net, T, the surrogate and the initial state are dealt out at random."""
    deal = random.Random(0).choice
    combinations = product(
        ("subtract", "zero", "none"), (True, False), (False, True), (False, True), (False, True), (False, True),
        (1.0, 0.7), (PASSED, HIDDEN, HIDDEN_WITH_OUTPUT), (torch.float32, torch.float64),
    )  # fmt: skip
    rows = [
        (*each, deal(tuple(SURROGATES)), deal(LENGTHS), deal(tuple(FEATURES)), deal((False, True))) for each in combinations
    ]
    return [pytest.param(*row, id="-".join(str(each).removeprefix("torch.") for each in row)) for row in rows]


@pytest.mark.parametrize(
    ("reset", "delay", "learn_beta", "learn_threshold", "learn_factor", "vectors", "factor", "form", "dtype",
     "spike_grad", "T", "kind", "initial"),
    _table(),
)  # fmt: skip
def test_every_combination_of_options(
    reset: str, delay: bool, learn_beta: bool, learn_threshold: bool, learn_factor: bool, vectors: bool, factor: float,
    form: str, dtype: torch.dtype, spike_grad: str, T: int, kind: str, initial: bool,
) -> None:  # fmt: skip
    def program(make: MakeNeuron) -> Observed:
        def options(shape: tuple[int, ...]) -> dict:
            return {
                "beta": per_neuron(0.5, 0.99, shape) if vectors else 0.9,
                "threshold": per_neuron(0.6, 1.2, shape) if vectors else 0.8,
                "graded_spikes_factor": per_neuron(0.5, 1.5, shape) * factor if vectors else factor,
                "spike_grad": SURROGATES[spike_grad](),
                "reset_mechanism": reset,
                "reset_delay": delay,
                "learn_beta": learn_beta,
                "learn_threshold": learn_threshold,
                "learn_graded_spikes_factor": learn_factor,
                "init_hidden": form != PASSED,
                "output": form == HIDDEN_WITH_OUTPUT,
            }

        first = FEATURES[kind] if T != 9 else (FEATURES[kind][0], *(1 for _ in FEATURES[kind][1:]))
        net = Net(make, kind, options(first), options((4,))).to(dtype)
        x = draw(kind, T, dtype)
        mem = None
        if initial:
            mem = tuple(torch.randn(3, *shape, dtype=dtype, requires_grad=True) for shape in (FEATURES[kind], (4,)))
        observed = train(net, x, form, mem)
        if T >= 9:
            assert_alive(observed.exact["spk1"])
            assert_alive(observed.exact["spk2"])
        if initial:
            observed.gradients |= {"mem1_0": mem[0].grad, "mem2_0": mem[1].grad}
        return observed

    agree(program, snn.Leaky, RevLeaky)

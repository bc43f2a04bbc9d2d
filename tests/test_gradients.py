"""Gradients where rounding could be magnified: steep surrogates, surrogates that jump, and rates of
decay next to zero. The host's gradients are the specification."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import snntorch
import torch
import torch.nn as nn
from compare import MakeNeuron, Observed, agree, assert_alive, assert_close
from either_host import step_of
from hosts import PURE, only_pure
from pairs import every_pair
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import neuron
from spikingjelly.activation_based import surrogate as sj_surrogate
from torch import Tensor

from snn_revplugin import use_settings
from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.adapters.spikingjelly import RevIFNode, RevLIFNode, RevParametricLIFNode
from snn_revplugin.bptt.anchors import anchoring_of, bits_to_lose
from snn_revplugin.bptt.record import NeuronRecord
from snn_revplugin.bptt.step import step
from snn_revplugin.compile.equations import Equations, equations_id
from snn_revplugin.neurons.integrate_and_fire import (
    IntegrateAndFire,
    ParametricLeakyIntegrateAndFire,
)
from snn_revplugin.neurons.leaky import Leaky
from snn_revplugin.neurons.surrogate import Surrogate, steepness_of, surrogate_of

pytestmark = pytest.mark.usefixtures("recompute_everything")


class Rectangle(torch.autograd.Function):
    """A user's surrogate: the derivative is one within half a threshold of the threshold."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return grad * (z.abs() < 0.5).to(grad.dtype)


class Failing(Rectangle):
    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        raise RuntimeError("this surrogate has no derivative")


class SteepStep(Rectangle):
    """A small jump beside a steep derivative."""

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return grad * (1 / (1 + 25 * z.abs()) ** 2 + 1e-3 * (z > 1.3))


class SinglePrecision(Rectangle):
    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return (grad.float() / (1 + 25 * z.float().abs()) ** 2).to(grad.dtype)


# ---------------------------------------------------------------------- the shape of a surrogate


@pytest.mark.parametrize(
    ("name", "parameters", "steepness"),
    [
        ("straight_through", (), 0.0),
        ("atan", (2.0,), math.pi * 3 * math.sqrt(3) / 8),
        ("fast_sigmoid", (25.0,), 50.0),
        ("fast_sigmoid", (1000.0,), 2000.0),
        ("sigmoid", (4.0,), 8 / math.sqrt(27)),
        ("sigmoid_of_exp", (25.0,), 50 / math.sqrt(27)),
        ("soft_sign", (2.0,), 4.0),
        ("fake_numerical_gradient", (30.0,), 30.0),
        ("s2nn", (4.0, 1.0), 8 / math.sqrt(27)),
        ("s2nn", (4.0, 2.0), math.inf),
        ("triangular", (1.0,), math.inf),
        ("heaviside", (), math.inf),
        ("rect", (1.0,), math.inf),
        ("rect", (0.01,), math.inf),
        ("piecewise_leaky_relu", (1.0, 0.01), math.inf),
        ("leaky_k_relu", (0.0, 1.0), math.inf),
        ("leaky_k_relu", (1.0, 1.0), 0.0),
        ("log_tailed_relu", (0.0,), math.inf),
        ("sparse_fast_sigmoid", (25.0, 1.0), math.inf),
    ],
)
def test_how_steep_a_derivative_is(
    name: str, parameters: tuple[float, ...], steepness: float
) -> None:
    surrogate = Surrogate(name, parameters)
    assert surrogate.steepness == pytest.approx(steepness, rel=1e-2)
    assert surrogate.jumps == math.isinf(steepness)


@pytest.mark.parametrize(
    ("function", "steepness"),
    [
        (Rectangle, math.inf),
        (SteepStep, math.inf),
        (Failing, math.inf),
        (SinglePrecision, 50.0),
    ],
)
def test_how_steep_a_users_derivative_is(
    function: type[torch.autograd.Function], steepness: float
) -> None:
    state = torch.random.get_rng_state()
    assert surrogate_of(function.apply).steepness == pytest.approx(steepness, rel=1e-2)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_users_function_without_a_gradient_is_flat() -> None:
    surrogate = surrogate_of(lambda z: (z > 0).to(z.dtype))
    assert surrogate.steepness == 0 and not surrogate.jumps


def test_a_users_derivative_is_measured_again_when_it_changes() -> None:
    slope = torch.tensor(5.0, dtype=torch.float64)
    function = snn_surrogate.fast_sigmoid(slope)
    assert surrogate_of(function).steepness == pytest.approx(10, rel=1e-2)
    slope.fill_(50.0)
    assert surrogate_of(function).steepness == pytest.approx(100, rel=1e-2)


def test_an_overflow_is_no_jump() -> None:
    assert steepness_of(lambda z: torch.exp(-z * 25) / (1 + torch.exp(-z * 25)) ** 2) < 12


# -------------------------------------------------------------------------------- steep surrogates


def _leaky(slope: float, beta: float = 0.9, threshold: float = 1.0) -> Leaky:
    numbers = (torch.tensor(each) for each in (beta, threshold, 1.0))
    return Leaky(Surrogate("fast_sigmoid", (slope,)), *numbers, "subtract", graded=False)


def test_a_steep_derivative_costs_bits() -> None:
    assert bits_to_lose(4, _leaky(5)) == bits_to_lose(4, _leaky(5), behind_norm=True) == 4
    assert bits_to_lose(4, _leaky(100)) == pytest.approx(bits_to_lose(4, _leaky(50)) - 1, abs=1e-3)
    assert bits_to_lose(4, _leaky(50)) > bits_to_lose(4, _leaky(50), behind_norm=True)
    # the rounding of a potential grows with the threshold
    assert bits_to_lose(4, _leaky(50, threshold=2.0)) == pytest.approx(
        bits_to_lose(4, _leaky(100)), abs=1e-3
    )


def test_the_intervals_of_usual_surrogates() -> None:
    def intervals(neuron_: Leaky) -> list[tuple[int, bool]]:
        v = (torch.zeros(2),)
        return [anchoring_of(neuron_, v, behind_norm)[:2] for behind_norm in (False, True)]

    atan, rebuilt = _leaky(1), (12, False)
    atan.surrogate = Surrogate("atan", (2.0,))
    assert intervals(atan) == [(18, True)] * 2
    assert intervals(_leaky(25)) == [(18, True), (6, True)]
    assert intervals(_leaky(100)) == [(6, True), rebuilt]
    rectangle = IntegrateAndFire(Surrogate("rect", (1.0,)), 1.0, None)
    assert anchoring_of(rectangle, (torch.zeros(2),))[:2] == rebuilt


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("slope", [25, 100])
def test_a_steep_surrogate_behind_a_batch_norm(slope: float, learned: bool) -> None:
    """25 time steps, as in issue 11: at anchors whose distance knows the decay alone, the error is
    9e-5 at a slope of 25 and 6e-4 at 100."""
    spikes = []

    def program(make: MakeNeuron) -> Observed:
        layers = nn.ModuleList(
            [
                nn.Linear(40, 64, bias=False),
                nn.BatchNorm1d(64),
                nn.Linear(64, 64, bias=False),
                nn.BatchNorm1d(64),
                nn.Linear(64, 10),
            ]
        )
        first, second, last = (
            make(0.9, spike_grad=snn_surrogate.fast_sigmoid(slope), learn_beta=learned)
            for _ in range(3)
        )
        v1, v2, v3 = torch.zeros(32, 64), torch.zeros(32, 64), torch.zeros(32, 10)
        data, labels, loss, exact = torch.rand(25, 32, 40), torch.randint(0, 10, (32,)), 0, {}
        for t, x in enumerate(data):
            x, v1 = first(layers[1](layers[0](x)), v1)
            x, v2 = second(layers[3](layers[2](x)), v2)
            exact[f"spikes {t}"] = x.detach()
            _, v3 = last(layers[4](x), v3)
            loss = loss + nn.functional.cross_entropy(v3, labels)
        loss.backward()
        spikes.append(torch.stack([*exact.values()]))
        return Observed(exact=exact).see_gradients(layers)

    for seed in range(4):
        agree(program, snntorch.Leaky, RevLeaky, seed=seed)
    assert_alive(torch.stack(spikes))


# ---------------------------------------------------------------------------- surrogates that jump

T, BATCH, NEURONS = 24, 16, 8
Make = Callable[[type[nn.Module]], nn.Module]


def _snntorch(surrogate: Callable[[], Callable], **options: object) -> Make:
    return lambda kind: kind(0.9, spike_grad=surrogate(), **options)


def _spikingjelly(surrogate: Callable[[], Callable], **options: object) -> Make:
    return lambda kind: kind(v_reset=None, surrogate_function=surrogate(), **options)


# host, ours, how one is made, distance of an edge of the derivative from the threshold
JUMPING = {
    "Leaky, rectangle": (snntorch.Leaky, RevLeaky, _snntorch(lambda: Rectangle.apply), 0.5),
    "Leaky, rectangle, learned": (
        snntorch.Leaky,
        RevLeaky,
        _snntorch(lambda: Rectangle.apply, learn_beta=True, learn_threshold=True),
        -0.5,
    ),
    "Leaky, triangular": (snntorch.Leaky, RevLeaky, _snntorch(snn_surrogate.triangular), 0.0),
    "Leaky, heaviside": (snntorch.Leaky, RevLeaky, _snntorch(snn_surrogate.heaviside), 0.0),
    "Leaky, SFS": (
        snntorch.Leaky,
        RevLeaky,
        _snntorch(lambda: snn_surrogate.SFS(slope=1, B=1)),
        1.0,
    ),
    "LIFNode, LeakyKReLU": (
        neuron.LIFNode,
        RevLIFNode,
        _spikingjelly(lambda: sj_surrogate.LeakyKReLU(leak=0.1, k=1.0), tau=3.0),
        0.0,
    ),
    "IFNode, rectangle": (
        neuron.IFNode,
        RevIFNode,
        _spikingjelly(lambda: Rectangle.apply),
        0.5,
    ),
}
if PURE:
    JUMPING |= {
        "LIFNode, Rect": (
            neuron.LIFNode,
            RevLIFNode,
            _spikingjelly(lambda: sj_surrogate.Rect(alpha=1.0), tau=3.0),
            0.5,
        ),
        "LIFNode, PiecewiseLeakyReLU": (
            neuron.LIFNode,
            RevLIFNode,
            _spikingjelly(lambda: sj_surrogate.PiecewiseLeakyReLU(w=1.0, c=0.01), tau=3.0),
            -1.0,
        ),
    }


def _data_at_the_edge(node: nn.Module, edge: float) -> Tensor:
    """Currents ``[T, BATCH, NEURONS]`` that charge half of the potentials to an edge of the
    derivative, to rounding."""
    data, v = [], torch.zeros(BATCH, NEURONS)
    theta = 1.0 + edge
    with torch.no_grad():
        for _ in range(T):
            drawn = torch.randn(BATCH, NEURONS) * 2
            # the charge is linear in the current: find it from two currents
            low, high = (_charged(node, torch.full_like(v, each), v) for each in (0.0, 1.0))
            towards_edge = (theta - low) / (high - low)
            x = torch.where(torch.rand(BATCH, NEURONS) < 0.5, towards_edge, drawn)
            data.append(x)
            _, v = step_of(node, x, v)
    node.reset_mem() if isinstance(node, snntorch.Leaky) else node.reset()
    return torch.stack(data)


def _charged(node: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    """The potential before the reset."""
    spikes, after = step_of(node, x, v)
    return after if isinstance(node, snntorch.Leaky) else after + spikes * node.v_threshold


@pytest.mark.parametrize(("host", "ours", "make_node", "edge"), JUMPING.values(), ids=JUMPING)
def test_a_surrogate_that_jumps(
    host: type[nn.Module], ours: type[nn.Module], make_node: Make, edge: float
) -> None:
    torch.manual_seed(0)
    data = _data_at_the_edge(make_node(host), edge)
    kinds = iter((host, ours))

    def program(make: MakeNeuron) -> Observed:
        node = make_node(next(kinds))
        made.append(node)
        layer, spikes = nn.Linear(NEURONS, NEURONS, bias=False), []
        nn.init.eye_(layer.weight)
        v, x = torch.zeros(BATCH, NEURONS), data.clone().requires_grad_()
        for each in x:
            s, v = step_of(node, layer(each), v)
            spikes.append(s)
        spikes = torch.stack(spikes)
        (spikes * torch.randn_like(spikes)).sum().backward()
        observed = Observed(exact={"spikes": spikes.detach(), "v": v.detach()})
        return observed.see_gradients(layer, node, x=x)

    made: list[nn.Module] = []
    agree(program, host, ours, path="any")
    statistics = made[1].record.statistics
    assert statistics.steps == T and statistics.fallback_calls == 0


# ------------------------------------------------------------------------ rates of decay near zero

# 1/tau = sigmoid(w): zero in float32, 3e-7, 0.5, 0.95
RATES = [-90.0, -15.0, 0.0, 3.0]


def _parametric(
    w: float, v_reset: float | None, mode: str, decay_input: bool = True
) -> Callable[[MakeNeuron], Observed]:
    """A layer and a ParametricLIFNode with this ``w``."""

    def program(make: MakeNeuron) -> Observed:
        layer = nn.Linear(12, 16)
        node = make(decay_input=decay_input, v_reset=v_reset, v_threshold=0.5, step_mode=mode)
        with torch.no_grad():
            node.w.fill_(w)
        data = torch.randn(10, 8, 12) * 3
        node.v = torch.rand(8, 16)
        if mode == "m":
            spikes = node(layer(data))
        else:
            spikes = torch.stack([node(layer(x)) for x in data])
        loss = (spikes * torch.randn_like(spikes)).sum() + (node.v * torch.randn(8, 16)).sum()
        loss.backward()
        assert node.w.grad.isfinite()
        observed = Observed({"spikes": spikes.detach()}, {"w": node.w.grad})
        if w > -90:
            observed.gradients["layer"] = layer.weight.grad
        return observed

    return program


@pytest.mark.parametrize("smallest", [0, 2**20], ids=["recomputed", "kept"])
@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("v_reset", [None, 0.0, -0.3])
@pytest.mark.parametrize("w", RATES)
def test_a_learned_rate(
    w: float, v_reset: float | None, decay_input: bool, mode: str, smallest: int
) -> None:
    with use_settings(recompute_min_bytes=smallest):
        agree(
            _parametric(w, v_reset, mode, decay_input),
            neuron.ParametricLIFNode,
            RevParametricLIFNode,
            path="small" if smallest else "reversible",
        )


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("w", "v_reset", "mode"),
    # There is no kernel for a step of SpikingJelly 0.0.0.0.14.
    every_pair(product(RATES, (None, -0.3), "sm" if PURE else "m")),
)
def test_a_learned_rate_in_kernels(w: float, v_reset: float | None, mode: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    with use_settings(backend="triton"):
        agree(_parametric(w, v_reset, mode), neuron.ParametricLIFNode, RevParametricLIFNode)


@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize("w", RATES)
def test_a_learned_rate_of_currents_that_are_not_recomputed(w: float, mode: str) -> None:
    """The input itself is the current, so there is no recipe: the neuron keeps it."""

    def program(make: MakeNeuron) -> Observed:
        node = make(v_reset=None, v_threshold=0.5, step_mode=mode)
        with torch.no_grad():
            node.w.fill_(w)
        x = (torch.randn(10, 8, 16) * 3).requires_grad_()
        node.v = torch.rand(8, 16)
        spikes = node(x) if mode == "m" else torch.stack([node(each) for each in x])
        (spikes * torch.randn_like(spikes)).sum().backward()
        return Observed({"spikes": spikes.detach()}, {"w": node.w.grad})

    agree(program, neuron.ParametricLIFNode, RevParametricLIFNode)


@only_pure
@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize("w", RATES)
def test_a_learned_rate_through_saved_tensor_hooks(w: float, mode: str) -> None:
    def program(make: MakeNeuron) -> Observed:
        with torch.autograd.graph.save_on_cpu():
            return _parametric(w, None, mode)(make)

    agree(program, neuron.ParametricLIFNode, RevParametricLIFNode, path="hooked")


@only_pure
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("v_reset", [None, -0.3])
@pytest.mark.parametrize("w", RATES)
def test_a_learned_rate_in_the_operators_of_the_compiler(
    w: float, v_reset: float | None, sequence: bool
) -> None:
    gradients = []
    for kind in (neuron.ParametricLIFNode, RevParametricLIFNode):
        torch.manual_seed(0)
        node = kind(v_reset=v_reset, v_threshold=0.5, step_mode="m" if sequence else "s")
        with torch.no_grad():
            node.w.fill_(w)
        x, v = torch.randn(5, 8, 16).mul_(3).requires_grad_(), torch.rand(8, 16)
        if kind is neuron.ParametricLIFNode:
            node.v = v
            spikes = node(x) if sequence else torch.stack([node(each) for each in x])
        else:
            id = equations_id("plif", "soft" if v_reset is None else "hard", "", "decay_input")
            numbers = [0.5, v_reset or 0.0, 2.0, 4.0]
            equations = ([node.w], *Equations([id, "sigmoid"], numbers))
            if sequence:
                spikes, *_ = torch.ops.snn_revplugin.sequence(x, v, *equations, False)
            else:
                each_step = []
                for each in x:
                    s, v = torch.ops.snn_revplugin.step(each, v, *equations)
                    each_step.append(s)
                spikes = torch.stack(each_step)
        (spikes * torch.randn_like(spikes)).sum().backward()
        gradients.append((spikes.detach(), node.w.grad))
    (spikes, host), (our_spikes, ours) = gradients
    assert torch.equal(spikes, our_spikes)
    assert_close("w", host, ours)


def test_the_bytes_of_a_current_that_is_kept_are_told() -> None:
    neuron_ = ParametricLeakyIntegrateAndFire(
        Surrogate("sigmoid", (4.0,), strict=False),
        1.0,
        0.0,
        w=torch.tensor(0.0, requires_grad=True),
    )
    record = NeuronRecord()
    step(neuron_, torch.rand(4, 5, requires_grad=True), (torch.zeros(4, 5),), record)
    assert record.statistics.potential_bytes == 4 * 5 * 4

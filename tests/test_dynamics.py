"""The equations by themselves: the step is the host's, the inverse undoes it, the derivative is
what autograd finds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import snntorch as snn
import torch
from compare import assert_close, assert_exact
from hosts import PURE
from hypothesis import given
from hypothesis import strategies as st
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor

from snn_revplugin.bptt.anchors import steps_between_anchors
from snn_revplugin.bptt.record import NeuronRecord
from snn_revplugin.bptt.step import step
from snn_revplugin.neurons.differentiable import differentiable_sequence, differentiable_step
from snn_revplugin.neurons.integrate_and_fire import (
    IntegrateAndFire,
    LeakyIntegrateAndFire,
    ParametricLeakyIntegrateAndFire,
)
from snn_revplugin.neurons.leaky import Leaky
from snn_revplugin.neurons.one_state import OneStateNeuron
from snn_revplugin.neurons.surrogate import Surrogate
from snn_revplugin.neurons.transition import GraphNodes
from snn_revplugin.packed.spikes import PackedSpikes


@dataclass
class Case:
    """Equations, and the host's neuron that they are of.

    Args:
        host: one time step of the host's, ``(x, v)`` to ``(spikes, v')``.
        learned: the host's parameters in the order of ``neuron.parameters``.
    """

    neuron: OneStateNeuron
    host: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    learned: tuple[Tensor, ...] = ()


def _spikingjelly(node: neuron.BaseNode) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def step(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        node.v = v
        return node(x), node.v

    return step


def _by_factor(
    left_of: Callable[[Tensor], Tensor], v_reset: float | None, detach: bool
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """One time step as SpikingJelly 0.0.0.0.14 writes it for an input that does not decay, wherever
    another is installed."""
    fire = surrogate.Sigmoid(4.0)

    def step(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        h = left_of(v) + x
        s = fire(h - 0.8)
        d = s.detach() if detach else s
        return s, h - d * 0.8 if v_reset is None else (1.0 - d) * h + d * v_reset

    return step


def _leaky(reset: str, delayed: bool, vectors: bool, factor: float) -> Case:
    def values(low: float, high: float) -> Tensor:
        return torch.linspace(low, high, 6) if vectors else torch.tensor((low + high) / 2)

    host = snn.Leaky(
        beta=values(0.5, 0.95),
        threshold=values(0.6, 1.2),
        reset_mechanism=reset,
        reset_delay=delayed,
        learn_beta=True,
        learn_threshold=True,
        graded_spikes_factor=values(factor, factor + 0.5),
        learn_graded_spikes_factor=True,
    )
    learned = host.beta, host.threshold, host.graded_spikes_factor
    return Case(Leaky(Surrogate("atan", (2.0,)), *learned, reset, delayed), host, learned)


def _cases() -> dict[str, Callable[[], Case]]:
    cases: dict[str, Callable[[], Case]] = {}
    for reset, delayed, vectors in product(
        ("subtract", "zero", "none"), (True, False), (False, True)
    ):
        name = f"Leaky {reset}{'' if delayed else ' at once'}{' vectors' if vectors else ''}"
        cases[name] = lambda reset=reset, delayed=delayed, vectors=vectors: _leaky(
            reset, delayed, vectors, 0.7
        )
    sigmoid = Surrogate("sigmoid", (4.0,), strict=False)
    for v_reset, detach in product((None, 0.0, -0.3), (False, True)):
        kind = f"{'soft' if v_reset is None else f'hard {v_reset}'}{' detached' if detach else ''}"
        options = {
            "v_threshold": 0.8,
            "v_reset": v_reset,
            "detach_reset": detach,
            "surrogate_function": surrogate.Sigmoid(4.0),
        }
        cases[f"IF {kind}"] = lambda options=options, v_reset=v_reset, detach=detach: Case(
            IntegrateAndFire(sigmoid, 0.8, v_reset, detach), _spikingjelly(neuron.IFNode(**options))
        )
        for decay_input in (True, False):

            def lif(
                options=options, v_reset=v_reset, detach=detach, decay_input=decay_input
            ) -> Case:
                host = neuron.LIFNode(tau=1.7, decay_input=decay_input, **options)
                equations = LeakyIntegrateAndFire(
                    sigmoid,
                    0.8,
                    v_reset,
                    detach,
                    tau=1.7,
                    decay_input=decay_input,
                    by_factor=not PURE,
                )
                return Case(equations, _spikingjelly(host))

            def plif(
                options=options, v_reset=v_reset, detach=detach, decay_input=decay_input
            ) -> Case:
                host = neuron.ParametricLIFNode(init_tau=1.7, decay_input=decay_input, **options)
                others = {"decay_input": decay_input, "by_factor": not PURE, "w": host.w}
                equations = ParametricLeakyIntegrateAndFire(sigmoid, 0.8, v_reset, detach, **others)
                return Case(equations, _spikingjelly(host), (host.w,))

            cases[f"LIF {kind}{'' if decay_input else ' input kept'}"] = lif
            cases[f"PLIF {kind}{'' if decay_input else ' input kept'}"] = plif
        if not v_reset:
            w, factor = (
                torch.tensor(0.4, requires_grad=True),
                {"decay_input": False, "by_factor": True},
            )
            cases[f"LIF {kind} by factor"] = lambda v_reset=v_reset, detach=detach, factor=factor: (
                Case(
                    LeakyIntegrateAndFire(sigmoid, 0.8, v_reset, detach, tau=1.7, **factor),
                    _by_factor(lambda v: v * (1.0 - 1.0 / 1.7), v_reset, detach),
                )
            )
            cases[f"PLIF {kind} by factor"] = (
                lambda v_reset=v_reset, detach=detach, factor=factor, w=w: Case(
                    ParametricLeakyIntegrateAndFire(sigmoid, 0.8, v_reset, detach, w=w, **factor),
                    _by_factor(lambda v: v * (1.0 - w.sigmoid()), v_reset, detach),
                    (w,),
                )
            )
    return cases


CASES = _cases()
EVERY_CASE = pytest.mark.parametrize("name", CASES)


class Seen:
    """One time step, as a derivative sees it, of which everything is there."""

    def __init__(self, neuron: OneStateNeuron, x: Tensor, v: Tensor) -> None:
        with torch.no_grad():
            parts = neuron.begin(x, (v,))
            self.fired, self.spikes = parts.fire()
            self.fired, self.charged = self.fired.clone(), parts.charged
            (self.after,) = parts.states()
            self.silent = 1 - self.fired
            self.current, self.before = x.detach(), (v.detach(),)
            self.reset_signal = neuron.reset_signal_at(v.detach())


def draw(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A current and a potential ``[40, 6]``, around the threshold."""
    torch.manual_seed(seed)
    return (torch.randn(40, 6) * 1.5 + 0.3).requires_grad_(), (
        torch.randn(40, 6) + 0.4
    ).requires_grad_()


@EVERY_CASE
def test_the_step_is_the_hosts(name: str) -> None:
    case, (x, v) = CASES[name](), draw()
    seen = Seen(case.neuron, x, v)
    spikes, after = (each.detach() for each in case.host(x, v))
    assert_exact("spikes", spikes, seen.spikes)
    assert_exact("potential", after, seen.after)
    assert 0.05 < seen.fired.float().mean() < 0.95


INVERTIBLE = [name for name, case in CASES.items() if case().neuron.invertible]


def test_what_a_reset_does_not_overwrite_is_inverted() -> None:
    assert {"Leaky subtract", "Leaky none", "Leaky none at once"} <= set(INVERTIBLE)
    assert {name for name in CASES if "soft" in name} <= set(INVERTIBLE)


@pytest.mark.parametrize("name", INVERTIBLE)
def test_the_inverse_undoes_the_step(name: str) -> None:
    neuron_, (x, v) = CASES[name]().neuron, draw()
    seen = Seen(neuron_, x, v)
    with torch.no_grad():
        charged = neuron_.invert_reset(seen.after.clone(), PackedSpikes(seen.fired.bool()))
        torch.testing.assert_close(charged, seen.charged, rtol=0, atol=4e-7)
        before = neuron_.invert_charge(seen.charged.clone(), x.detach().clone(), seen.reset_signal)
    torch.testing.assert_close(before, v.detach(), rtol=0, atol=3e-6)


GRADIENTS = pytest.mark.parametrize("given_for", ["spikes", "potential", "both"])


@EVERY_CASE
@GRADIENTS
def test_the_derivative_is_what_autograd_finds_in_the_host(given_for: str, name: str) -> None:
    case, (x, v) = CASES[name](), draw()
    outputs = case.host(x, v)
    grads = [
        torch.randn(each.shape) if given_for in (which, "both") else None
        for which, each in zip(("spikes", "potential"), outputs, strict=True)
    ]
    roots, weights = zip(
        *((o, g) for o, g in zip(outputs, grads, strict=True) if g is not None), strict=True
    )
    expected = torch.autograd.grad(roots, (x, v, *case.learned), weights, allow_unused=True)
    seen, learned = Seen(case.neuron, x, v), (True,) * len(case.learned)
    with torch.no_grad():
        ours = case.neuron.gradient(*grads, seen, learned)
    for label, theirs, our in zip(
        ("x", "v", "first", "second", "third"), expected, (*ours[:2], *ours[2]), strict=False
    ):
        if theirs is not None and theirs.count_nonzero():
            assert_close(
                label, theirs, our, tolerance=3e-6, floor=1.0
            )  # a sum of many is measured against its terms
        else:  # autograd leaves out what a gradient of zero says
            assert our is None or not our.count_nonzero()
    with torch.no_grad():
        nothing = case.neuron.gradient(*grads, seen, (False,) * len(case.learned))[2]
    assert all(each is None for each in nothing)


@EVERY_CASE
def test_the_gradient_that_is_given_is_not_written_into(name: str) -> None:
    """Autograd hands the same tensor to others."""
    neuron_, (x, v) = CASES[name]().neuron, draw()
    grads = torch.randn(40, 6), torch.randn(40, 6)
    kept = [each.clone() for each in grads]
    seen = Seen(neuron_, x, v)
    potentials = {key: each.clone() for key, each in vars(seen).items() if torch.is_tensor(each)}
    with torch.no_grad():
        neuron_.gradient(*grads, seen, (True,) * len(neuron_.parameters))
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))
    for key, each in potentials.items():
        assert torch.equal(getattr(seen, key), each), key


def step_of(neuron: OneStateNeuron, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    spikes, (after,) = differentiable_step(neuron, x, (v,))
    return spikes, after


def reversible_step_of(neuron: OneStateNeuron, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    spikes, (after,) = step(neuron, x, (v,), NeuronRecord())
    return spikes, after


@EVERY_CASE
def test_the_plain_node_is_the_hosts(name: str) -> None:
    """What benchmarks and checks call the reference agrees with the host in values and
    gradients."""
    case, (x, v) = CASES[name](), draw()
    weights = torch.randn(40, 6), torch.randn(40, 6)
    seen = []
    for take in (case.host, lambda x, v: step_of(case.neuron, x, v)):
        outputs = take(x, v)
        seen.append(
            (
                outputs,
                torch.autograd.grad(outputs, (x, v, *case.learned), weights, allow_unused=True),
            )
        )
    for theirs, ours in zip(*(outputs for outputs, _ in seen), strict=True):
        assert torch.equal(theirs, ours)
    for i, (theirs, ours) in enumerate(zip(*(grads for _, grads in seen), strict=True)):
        if theirs is not None and ours is not None:
            assert_close(str(i), theirs, ours, tolerance=3e-6)
        else:
            assert theirs is None or not theirs.count_nonzero()


@pytest.mark.parametrize("v_reset", [None, 0.0, -0.3])
def test_fire_and_reset_as_nodes_of_their_own(v_reset: float | None) -> None:
    """The gradient at the spikes then has what comes through the reset, which a hook on them may
    change."""
    sigmoid, seen = Surrogate("sigmoid", (4.0,), strict=False), []
    neuron_ = IntegrateAndFire(sigmoid, 0.8, v_reset, nodes=GraphNodes.RESET)
    for take in (
        lambda x, v: step_of(neuron_, x, v),
        lambda x, v: reversible_step_of(neuron_, x, v),
    ):
        torch.manual_seed(0)
        x, v, given = torch.randn(7, 3, 4, requires_grad=True), torch.zeros(3, 4), []
        for t, current in enumerate(x * 2):
            spikes, v = take(current, v)
            if t == 3:
                spikes.register_hook(lambda grad: grad * 0.5)
            spikes.retain_grad()
            given.append(spikes)
        (torch.stack(given) * torch.randn(7, 3, 4)).sum().backward()
        seen.append((v, x.grad, torch.stack([each.grad for each in given])))
    (v, *theirs), (our_v, *ours) = seen
    assert torch.equal(v, our_v)
    for name, a, b in zip(("x", "spikes"), theirs, ours, strict=True):
        assert_close(name, a, b, tolerance=3e-6)


def test_the_plain_node_over_time() -> None:
    case, (x, v) = CASES["LIF soft"](), draw()
    currents = torch.stack([x, x * 0.5, -x])
    spikes, (last,), path = differentiable_sequence(case.neuron, currents, (v,))
    for t, current in enumerate(currents):
        s, v = case.host(current, v)
        assert torch.equal(spikes[t], s)
        assert torch.equal(path[t], v)
    assert torch.equal(last, v)


# ------------------------------------------------------------------------------------------ anchors


@given(decay=st.floats(0, 1), bits=st.floats(0, 20), most=st.integers(1, 200))
def test_the_distance_between_anchors_keeps_its_promise(
    decay: float, bits: float, most: int
) -> None:
    """K roundings, each grown since, stay below 2**bits; one more would not, or is more than was
    asked for."""
    steps = steps_between_anchors((decay,), bits, most)

    def lost(steps: int) -> float:
        return math.log2(math.fsum((1 / decay) ** (2 * k) for k in range(1, steps + 1))) / 2

    assert 0 <= steps <= most
    if steps:
        assert lost(steps) <= bits + 1e-6
    if steps < most and decay > 1e-3:
        assert lost(steps + 1) > bits - 1e-6


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=2),
    st.lists(st.floats(0, 20), min_size=2, max_size=2),
)
def test_slower_decay_and_more_bits_never_shorten_the_distance(
    decays: list[float], bits: list[float]
) -> None:
    assert steps_between_anchors((min(decays),), 6, 64) <= steps_between_anchors(
        (max(decays),), 6, 64
    )
    assert steps_between_anchors((0.9,), min(bits), 64) <= steps_between_anchors(
        (0.9,), max(bits), 64
    )


@pytest.mark.parametrize("decay", [0.0, -0.0, -1.0, 1e-30, 1e-300, float("nan")])
def test_a_decay_next_to_nothing_cannot_be_reversed(decay: float) -> None:
    assert steps_between_anchors((decay,), 6, 64) == 0


@pytest.mark.parametrize("decay", [0.3, 0.6, 0.9, 0.97, 1.0])
def test_reversing_loses_no_more_than_the_bits_that_were_allowed(decay: float) -> None:
    """Measured: K steps forward in float32, K back, against the potential that was there."""
    torch.manual_seed(0)
    neuron_ = Leaky(
        Surrogate("atan", (2.0,)),
        torch.tensor(decay),
        torch.tensor(1.0),
        torch.tensor(1.0),
        "none",
        graded=False,
    )
    for bits in (2.0, 4.0, 8.0):
        steps = steps_between_anchors((decay,), bits, 64)
        v = start = torch.randn(20_000)
        currents, largest = torch.randn(steps, 20_000), 0.0
        for x in currents:
            v = neuron_.charge(x, v, None)
            largest = max(largest, v.abs().max().item())
        for x in currents.flip(0):
            v = neuron_.invert_charge(v, x, None)
        rounding = 2.0 ** math.ceil(math.log2(largest)) * 2**-25  # half a unit in the last place
        assert (
            v - start
        ).abs().max() <= 5 * 2**bits * rounding  # a deviate of 5 among 20,000 would be no surprise

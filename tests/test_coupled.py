"""The split-coupled node: its equations, its inverse, its gradient against plain autograd, what it
keeps, both hosts' APIs.

The chain rule through its states is tried in ``test_trajectory.py``, leaks in ``test_leaks.py``.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import runpy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from compare import MakeNeuron, Observed, agree, assert_agree, assert_alive, assert_close
from hosts import only_pure
from pairs import every_pair
from snntorch import surrogate as snn_surrogate
from snntorch import utils
from spikingjelly.activation_based import base, functional, layer, neuron, surrogate
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import snn_revplugin
from snn_revplugin.adapters.snntorch import CoupledLeaky
from snn_revplugin.adapters.spikingjelly import CoupledLIFNode
from snn_revplugin.bptt.chain import LINK
from snn_revplugin.bptt.outputs import HeldOutputs, recovered_input
from snn_revplugin.bptt.record import NeuronRecord
from snn_revplugin.cli.comparison import Setup
from snn_revplugin.cli.workloads import WORKLOADS
from snn_revplugin.neurons.coupled import LARGEST_BETA, SMALLEST_ALPHA, SMALLEST_BETA, Coupled
from snn_revplugin.neurons.differentiable import differentiable_coupled_step
from snn_revplugin.neurons.surrogate import Surrogate
from snn_revplugin.packed.spikes import Block, PackedSpikes
from snn_revplugin.replay import FIRED, attach_recipes
from snn_revplugin.report.memory import LiveBytes
from snn_revplugin.swap.module import HAS_COMPILER, OLDEST_COMPILER
from snn_revplugin.torch_internals.pass_cache import pass_cache

pytestmark = pytest.mark.usefixtures("recompute_everything")

SHAPE = (3, 4, 5)
LONG = 300
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12}
NODES = {
    "hard": Coupled(),
    "hard to -0.2": Coupled(v_reset=-0.2, beta=0.5),
    "soft": Coupled(v_reset=None, tau=3.0),
    "another dimension": Coupled(split_dim=-2, beta=2.0),
    "error grows backwards only": Coupled(alpha=0.5),
    "error grows both ways": Coupled(alpha=1.0, v_reset=None),
    "no leak into the next step": Coupled(tau=1.0, alpha=1.0, beta=0.3),
    "low threshold": Coupled(v_threshold=0.3, alpha=0.1),
}
every_node = pytest.mark.parametrize("node", NODES.values(), ids=NODES)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def inputs(
    length: int, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE
) -> Tensor:
    return (torch.randn(length, *shape, dtype=torch.float64) * 1.5 + 0.3).to(dtype)


def steps(
    node: Coupled, x: Tensor, v: Tensor
) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """``x, v, y, v', fired`` of every step."""
    record = []
    for each in x:
        y, after, fired = node.step(each, v)
        record.append((each, v, y, after, fired))
        v = after
    return record


def error(found: Tensor, right: Tensor) -> float:
    return (found.double() - right.double()).abs().max().item()


class StraightThrough(torch.autograd.Function):
    """Spikes whose derivative is one."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class TestEquations:
    @every_node
    def test_a_step_is_what_the_documentation_says(self, node: Coupled) -> None:
        halves = partial(torch.chunk, chunks=2, dim=node.split_dim)

        def reset(m: Tensor, s: Tensor) -> Tensor:
            return (
                m - node.v_threshold * s if node.v_reset is None else (1 - s) * m + s * node.v_reset
            )

        record = steps(node, inputs(10), torch.randn(SHAPE, dtype=torch.float64))
        for x, v, y, after, fired in record:
            (x1, x2), (v1, v2) = halves(x), halves(v)
            m1 = v1 + (x1 - v1) / node.tau
            s1 = (m1 > node.v_threshold).double()
            y1, after1 = s1 + node.beta * x2, reset(m1, s1) + node.alpha * v2
            m2 = after1 + (y1 - after1) / node.tau
            s2 = (m2 > node.v_threshold).double()
            y2, after2 = s2 + node.beta * x1, reset(m2, s2) + node.alpha * v1
            torch.testing.assert_close(
                y, torch.cat([y1, y2], node.split_dim), rtol=1e-12, atol=1e-12
            )
            torch.testing.assert_close(
                after, torch.cat([after1, after2], node.split_dim), rtol=1e-12, atol=1e-12
            )
            assert torch.equal(fired.double(), torch.cat([s1, s2], node.split_dim))
        assert_alive(torch.stack([fired for *_, fired in record]))

    @every_node
    @pytest.mark.parametrize("detach_reset", [False, True])
    def test_the_derivative_is_autograds(self, node: Coupled, detach_reset: bool) -> None:
        node = replace(node, surrogate=Surrogate("straight_through"), detach_reset=detach_reset)
        x, v = (
            inputs(1)[0].requires_grad_(),
            torch.randn(SHAPE, dtype=torch.float64, requires_grad=True),
        )
        y, after, fired = node.step(x.detach(), v.detach())
        for given in (
            (torch.randn_like(y), torch.randn_like(y)),
            (torch.randn_like(y), None),
            (None, torch.randn_like(y)),
        ):
            halves = [
                None if each is None else node.halves(each)
                for each in (y, fired.double(), v.detach(), after, *given)
            ]
            charged = node.charge_first(*halves[:3]), node.charge_second(halves[0], halves[3][0])
            found = (
                torch.cat(each, node.split_dim)
                for each in node.gradient(charged, halves[1], *halves[4:])
            )
            outputs = differentiable_coupled_step(node, x, v, StraightThrough.apply)
            roots = [
                (output, grad)
                for output, grad in zip(outputs, given, strict=True)
                if grad is not None
            ]
            expected = torch.autograd.grad(
                [root for root, _ in roots], (x, v), [grad for _, grad in roots]
            )
            for ours, autograds in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, autograds, rtol=1e-12, atol=1e-12)

    @every_node
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_plain_version_gives_the_same_bits(self, node: Coupled, dtype: torch.dtype) -> None:
        v = torch.zeros(SHAPE, dtype=dtype)
        for x in inputs(50, dtype):
            plain = differentiable_coupled_step(node, x, v, lambda z: (z > 0).to(z.dtype))
            y, v, _ = node.step(x, v)
            assert torch.equal(y, plain[0]) and torch.equal(v, plain[1])

    def test_the_growth_is_that_of_silent_neurons(self) -> None:
        for node in NODES.values():
            silent = replace(node, v_threshold=1e30)
            v = torch.randn(SHAPE, dtype=torch.float64)
            for _ in range(60):
                v = v / v.norm()
                _, after, _ = silent.step(torch.zeros_like(v), v)
                y = torch.zeros_like(v)
                # With no spikes and no input the output is zero, and what is left is linear in v.
                growth, v = (after.norm() / v.norm()).item(), after
            assert growth == pytest.approx(silent.growth_forward, rel=1e-3)
            v = torch.randn_like(v)
            for _ in range(60):
                v = v / v.norm()
                _, before = silent.inverse(y, v, torch.zeros_like(v, dtype=torch.bool))
                growth, v = before.norm().item(), before
            assert growth == pytest.approx(silent.growth_backward, rel=1e-3)

    @pytest.mark.parametrize(
        ("alpha", "bounded"), [(0.3, True), (0.5, True), (0.6, False), (1.0, False)]
    )
    def test_potentials_stay_bounded_up_to_one_over_tau(self, alpha: float, bounded: bool) -> None:
        node = Coupled(tau=2.0, alpha=alpha)
        assert (node.growth_forward <= 1 + 1e-12) is bounded
        *_, (_, _, _, v, _) = steps(node, inputs(60) - 0.3, torch.zeros(SHAPE, dtype=torch.float64))
        assert (v.abs().max().item() < 100) is bounded


class TestInverse:
    @every_node
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_every_step_of_a_long_sequence_is_undone(
        self, node: Coupled, dtype: torch.dtype
    ) -> None:
        eps = torch.finfo(dtype).eps
        length = LONG if node.growth_forward < 1.1 else 150  # before potentials overflow
        for x, v, y, after, fired in steps(
            node, inputs(length, dtype), torch.zeros(SHAPE, dtype=dtype)
        ):
            assert after.isfinite().all()
            back_x, back_v = node.inverse(y, after, fired)
            largest = max(x.abs().max().item(), v.abs().max().item(), after.abs().max().item(), 1.0)
            assert error(back_x, x) <= 2 * eps * (1 + node.beta * x.abs().max().item()) / node.beta
            assert error(back_v, v) <= 8 * eps * largest / node.alpha**2

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("tau", [1.0, 1.001])
    def test_a_long_chain_where_errors_do_not_grow(self, tau: float, dtype: torch.dtype) -> None:
        """alpha 1 forgets nothing, and with tau near 1 nothing grows: the whole sequence comes back
        without an anchor."""
        node = Coupled(tau=tau, alpha=1.0)
        assert node.growth_backward < 1.0011
        record = steps(node, inputs(LONG, dtype), torch.zeros(SHAPE, dtype=dtype))
        _, _, _, v, _ = record[-1]
        largest = max(after.abs().max().item() for *_, after, _ in record)
        for x, before, y, _, fired in reversed(record):
            back_x, v = node.inverse(y, v, fired)
            assert error(v, before) <= LONG * torch.finfo(dtype).eps * largest
            assert error(back_x, x) < 1e-5

    @pytest.mark.parametrize("alpha", [0.05, 0.1, 0.25, 0.5, 0.7])
    def test_a_chain_loses_as_many_bits_a_step_as_documented(self, alpha: float) -> None:
        node = Coupled(alpha=alpha)
        record = steps(node, inputs(40), torch.zeros(SHAPE, dtype=torch.float64))
        v, after_steps = record[-1][3], {}
        for count, (_, before, y, _, fired) in enumerate(reversed(record), 1):
            _, v = node.inverse(y, v, fired)
            after_steps[count] = error(v, before)
        largest = max(after.abs().max().item() for *_, after, _ in record)
        bound = {
            count: 100 * 2.0**-52 * largest * node.growth_backward**count for count in after_steps
        }
        judged = [count for count in after_steps if bound[count] < 1]
        assert len(judged) >= 3
        assert all(after_steps[count] <= bound[count] for count in judged)
        assert (
            after_steps[40] > 1e3 * after_steps[1]
        )  # and it does grow: the inverse alone would not do for training

    @every_node
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
    def test_the_scan_that_training_uses_instead_is_exact(
        self, node: Coupled, dtype: torch.dtype
    ) -> None:
        growing = 10 if dtype is torch.float16 else 100  # before potentials overflow
        length = growing if node.growth_forward > 1.1 else LONG
        v = start = torch.randn(SHAPE).to(dtype)
        for x, _, y, after, fired in steps(node, inputs(length, dtype), start):
            assert error(node.inputs(y, fired.to(dtype)), x) <= 16 * torch.finfo(dtype).eps * max(
                1, 1 / node.beta
            )
            after_halves = node.step_again(*map(node.halves, (y, fired.to(dtype), v)))
            v = torch.cat(after_halves, node.split_dim)
            assert torch.equal(v, after)
        assert v.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_what_passes_on_comes_back_from_beside_a_spike(self, dtype: torch.dtype) -> None:
        """The one fact that the exact scan rests on, over all magnitudes that an input may have."""
        x = torch.randn(100_000, dtype=torch.float64) * 10 ** torch.empty(
            100_000, dtype=torch.float64
        ).uniform_(-8, 5)
        x = x[x.abs() < 0.1 / torch.finfo(dtype).eps].to(dtype)
        assert len(x) > 50_000
        for beta in (1.0, 0.7, 0.01):
            passed = Coupled(beta=beta).passed(x)
            assert torch.equal((passed + 1) - 1, passed)
            assert (
                (passed - beta * x).abs() <= torch.finfo(dtype).eps * (1 + (beta * x).abs())
            ).all()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
    "batch 1": lambda x: x[:1],
    "one pixel": lambda x: x[..., :1, :1],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_layout(layout: str, dtype: torch.dtype) -> None:
    node, frames = Coupled(), inputs(9, dtype, (3, 6, 5, 3))
    v = start = torch.randn(1).to(dtype).expand(LAYOUTS[layout](frames[0]).shape)
    for t, frame in enumerate(frames):
        x = LAYOUTS[layout](frame) if t % 3 else LAYOUTS[layout](frame).contiguous()
        y, v, fired = node.step(x, v)
        start = torch.cat(node.step_again(*map(node.halves, (y, fired.to(dtype), start))), 1)
        assert torch.equal(start, v)
        plain, _ = node.step(x.contiguous(), v.contiguous())[:2]
        assert torch.equal(plain, node.step(x, v)[0])


class TestRefusals:
    @pytest.mark.parametrize("tau", [0.0, 0.99, -2.0, math.inf, math.nan])
    def test_tau(self, tau: float) -> None:
        with pytest.raises(
            ValueError, match=rf"tau must be finite and at least 1 time step, got {tau}"
        ):
            Coupled(tau=tau)

    @pytest.mark.parametrize("alpha", [0.0, -0.5, SMALLEST_ALPHA / 2, 1.001, math.nan])
    def test_alpha(self, alpha: float) -> None:
        with pytest.raises(
            ValueError, match=rf"alpha must lie between .* and 1, got {alpha}: .* inverted"
        ):
            Coupled(alpha=alpha)

    @pytest.mark.parametrize(
        "beta", [0.0, -1.0, SMALLEST_BETA / 2, LARGEST_BETA * 2, math.inf, math.nan]
    )
    def test_beta(self, beta: float) -> None:
        with pytest.raises(
            ValueError, match=rf"beta must lie between .*, got {beta}: the input has to come back"
        ):
            Coupled(beta=beta)

    def test_thresholds_and_resets_that_are_no_numbers(self) -> None:
        with pytest.raises(ValueError, match="v_threshold must be finite, got nan"):
            Coupled(v_threshold=math.nan)
        with pytest.raises(ValueError, match="v_reset must be finite, got inf"):
            Coupled(v_reset=math.inf)

    @pytest.mark.parametrize(
        "make",
        [
            CoupledLeaky,
            CoupledLIFNode,
            partial(CoupledLIFNode, step_mode="m"),
            partial(CoupledLeaky, reversible=False),
        ],
    )
    def test_an_odd_size(self, make: Callable[[], nn.Module]) -> None:
        node = make()
        x = torch.randn(2, 5, 4, requires_grad=True)
        x = x.expand(3, 2, 5, 4) if getattr(node, "step_mode", "s") == "m" else x
        with pytest.raises(
            ValueError,
            match=(
                r"split_dim: dimension 1 .*shape \(2, 5, 4\), has the odd size 5; expected an even"
            ),
        ):
            node(x)

    def test_a_missing_dimension(self) -> None:
        with pytest.raises(
            ValueError, match=r"split_dim: .*shape \(4,\) for one time step has no dimension 1"
        ):
            CoupledLeaky()(torch.randn(4, requires_grad=True))

    @pytest.mark.parametrize(
        "bad", [{"alpha": 0.0}, {"beta": 0.0}, {"tau": 0.5}, {"reset_mechanism": "none"}]
    )
    def test_a_constructor_that_fails_leaves_nothing_behind(self, bad: dict) -> None:
        known = len(snn.SpikingNeuron.instances)
        with pytest.raises(ValueError, match=next(iter(bad))):
            CoupledLeaky(**bad)
        assert len(snn.SpikingNeuron.instances) == known
        snn.SpikingNeuron.instances[:] = [CoupledLeaky()]
        snn.Leaky.reset_hidden()

    @pytest.mark.parametrize("bad", [{"alpha": 0.0}, {"beta": 0.0}, {"tau": 0.5}])
    def test_spikingjelly(self, bad: dict) -> None:
        with pytest.raises(ValueError, match=next(iter(bad))):
            CoupledLIFNode(**bad)


PLAIN_LEAKY, PLAIN_LIF = (
    partial(CoupledLeaky, reversible=False),
    partial(CoupledLIFNode, reversible=False),
)
USERS = {
    "snnTorch": lambda: snn_surrogate.custom_surrogate(lambda z, grad, spikes: grad / (1 + z * z)),
    "SpikingJelly": lambda: lambda z: UsersSpike.apply(z),
}


class UsersSpike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return (z >= 0).to(z.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * (1 - ctx.saved_tensors[0].abs()).clamp(min=0)


COMMON: dict[str, dict] = {
    "defaults": {},
    "alpha": {"alpha": 0.5},
    "alpha 1": {"alpha": 1.0, "tau": 1.3},
    "beta": {"beta": 0.4},
    "tau": {"tau": 4.0, "beta": 3.0},
    "last dimension": {"split_dim": -1},
}
LEAKY = {
    **COMMON,
    "zero": {"reset_mechanism": "zero"},
    "zero, not detached": {"reset_mechanism": "zero", "detach_reset": False},
    "not detached": {"detach_reset": False},
    "threshold": {"threshold": 0.4},
    "fast sigmoid": {"spike_grad": snn_surrogate.fast_sigmoid(slope=5)},
    "user's surrogate": {"spike_grad": USERS["snnTorch"]()},
    "gradient handed on": {"spike_grad": StraightThrough.apply},
}
LIF = {
    **COMMON,
    "soft": {"v_reset": None},
    "soft, detached": {"v_reset": None, "detach_reset": True},
    "hard, detached": {"detach_reset": True},
    "reset": {"v_reset": -0.3},
    "threshold": {"v_threshold": 0.4},
    "atan": {"surrogate_function": surrogate.ATan()},
    "user's surrogate": {"surrogate_function": USERS["SpikingJelly"]()},
    "gradient handed on": {"surrogate_function": StraightThrough.apply, "detach_reset": True},
}


def two_layers(
    make: MakeNeuron, options: dict, dtype: torch.dtype, mode: str, length: int = 24
) -> Observed:
    """Two layers of nodes with a batch norm and a convolution between them, from a start that is
    not zero."""
    below, norm, weigh, node = (
        make(**options),
        nn.BatchNorm1d(6).to(dtype),
        nn.Conv1d(6, 4, 3).to(dtype),
        make(**options),
    )
    nets = nn.ModuleList([below, norm, weigh, node])
    x, v = (
        inputs(length, dtype, (3, 6, 8)).requires_grad_(),
        torch.randn(3, 4, 6, dtype=dtype, requires_grad=True),
    )
    if mode == "m":
        functional.set_step_mode(nets, "m")
        node.v = v * 1
        y = node(functional.seq_to_ann_forward(below(x), [norm, weigh]))
        last = node.v
    elif isinstance(node, snn.Leaky):
        record, mem, last = [], None, v
        for frame in x:
            s, mem = below(frame, mem)
            s, last = node(weigh(norm(s)), last)
            record.append(s)
        y = torch.stack(record)
    else:
        node.v = v * 1
        y = torch.stack([node(weigh(norm(below(frame)))) for frame in x])
        last = node.v
    (
        (y * torch.randn(y.shape, dtype=dtype)).sum()
        + (last * torch.randn(last.shape, dtype=dtype)).sum()
    ).backward()
    return Observed({"y": y, "v": last}).see_gradients(nets, x=x, start=v)


@pytest.mark.parametrize("dtype", TOLERANCES)
class TestGradients:
    @pytest.mark.parametrize("options", LEAKY)
    def test_leaky(self, options: str, dtype: torch.dtype) -> None:
        agree(
            partial(two_layers, options=LEAKY[options], dtype=dtype, mode="s"),
            PLAIN_LEAKY,
            CoupledLeaky,
            tolerance=TOLERANCES[dtype],
        )

    @pytest.mark.parametrize("mode", ["s", "m"])
    @pytest.mark.parametrize("options", LIF)
    def test_lif(self, options: str, mode: str, dtype: torch.dtype) -> None:
        agree(
            partial(two_layers, options=LIF[options], dtype=dtype, mode=mode),
            PLAIN_LIF,
            CoupledLIFNode,
            tolerance=TOLERANCES[dtype],
        )

    @pytest.mark.parametrize("alpha", [0.02, 0.25, 0.5])
    def test_long_sequences(self, alpha: float, dtype: torch.dtype) -> None:
        for mode in ("s", "m"):
            program = partial(
                two_layers, options={"alpha": alpha}, dtype=dtype, mode=mode, length=170
            )
            agree(program, PLAIN_LIF, CoupledLIFNode, tolerance=TOLERANCES[dtype])

    @pytest.mark.parametrize("mode", ["s", "m"])
    def test_one_step(self, mode: str, dtype: torch.dtype) -> None:
        program = partial(two_layers, options={}, dtype=dtype, mode=mode, length=1)
        agree(program, PLAIN_LIF, CoupledLIFNode, tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize("v_reset", [0.0, None])
def test_the_closed_form_has_the_bits_of_autograd(
    v_reset: float | None, detach_reset: bool, mode: str
) -> None:
    """Sums are taken in autograd's order. (Next to weights that are no powers of two a fused
    multiply-add rounds once.)"""

    def program(make: MakeNeuron) -> Observed:
        node = make(v_reset=v_reset, detach_reset=detach_reset, surrogate_function=surrogate.ATan())
        functional.set_step_mode(node, mode)
        x, v = inputs(12, torch.float32).requires_grad_(), torch.randn(SHAPE, requires_grad=True)
        node.v = v * 1
        y = node(x) if mode == "m" else torch.stack([node(frame) for frame in x])
        ((y * torch.randn(y.shape)).sum() + (node.v * torch.randn(node.v.shape)).sum()).backward()
        return Observed({"y": y}).see_gradients(node, x=x, start=v)

    agree(program, PLAIN_LIF, CoupledLIFNode, tolerance=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["s", "m"])
def test_short_mantissas(mode: str, dtype: torch.dtype) -> None:
    agree(partial(two_layers, options={}, dtype=dtype, mode=mode), PLAIN_LIF, CoupledLIFNode)


def test_a_potential_handed_from_one_neuron_to_another() -> None:
    """One that splits another dimension, one with other numbers, and back."""

    def program(make: MakeNeuron) -> Observed:
        nodes = make(), make(split_dim=-1, reset_mechanism="zero"), make(alpha=0.5)
        x, mem, outs = inputs(12, torch.float64, (2, 4, 6)).requires_grad_(), None, []
        for t, frame in enumerate(x):
            out, mem = nodes[t // 2 % 3](frame, mem)
            outs.append(out)
        seen = torch.stack(outs)
        ((seen * torch.randn(seen.shape)).sum() + (mem * torch.randn(mem.shape)).sum()).backward()
        return Observed({"y": seen, "v": mem}).see_gradients(x=x)

    agree(program, PLAIN_LEAKY, CoupledLeaky, tolerance=1e-12)


def test_incoming_gradients_are_left_as_they_are() -> None:
    for options in LIF.values():
        for mode in ("s", "m"):
            node, x = (
                CoupledLIFNode(step_mode=mode, **options),
                torch.randn(3, 2, 4, 6, requires_grad=True),
            )
            y = node(x if mode == "m" else x[0])
            grads = torch.randn_like(y), torch.randn_like(node.v)
            before = [each.clone() for each in grads]
            torch.autograd.backward([y, node.v], grads)
            assert all(map(torch.equal, before, grads))


def test_single_and_multi_step_agree() -> None:
    seen = []
    for mode in ("s", "m"):
        torch.manual_seed(0)
        seen.append(
            two_layers(CoupledLIFNode, {}, torch.float64, mode, length=1)
        )  # one step: the same batch for the norm
    assert_agree(*seen, tolerance=1e-12)


class TestMemory:
    """In float32, of one layer of 8 x 16 x 10 neurons; the leaf that the inputs come from counts
    for neither side."""

    count = 8 * 16 * 10

    def kept(self, make: Callable[[], nn.Module], length: int) -> tuple[int, int]:
        """Bytes alive after forward beside the outputs, and beside all gradients and outputs at the
        peak of backward."""
        node, grad = make(), torch.randn(length, 8, 16, 10)
        x = torch.randn(length, 8, 16, 10, requires_grad=True)
        frames = [torch.randn(8, 16, 10, requires_grad=True) for _ in range(length)]
        with LiveBytes() as live:
            if getattr(node, "step_mode", "s") == "m":
                outputs = [node(x)]
                roots = [grad]
            elif isinstance(node, snn.Leaky):
                outputs, mem = [], None
                for frame in frames:
                    out, mem = node(frame, mem)
                    outputs.append(out)
                del mem
                roots = list(grad)
            else:
                outputs, roots = [node(frame) for frame in frames], list(grad)
            after_forward = live.now() - 4 * length * self.count
            torch.autograd.backward(outputs, roots)
            return after_forward, live.peak() - 4 * length * self.count

    @pytest.mark.parametrize(
        ("make", "length", "alpha"),
        every_pair(
            product(
                (CoupledLeaky, CoupledLIFNode, partial(CoupledLIFNode, step_mode="m")),
                (4, 50, 200),
                (0.05, 0.5, 1.0),
            )
        ),
    )
    def test_bits_and_the_last_potential_are_kept_and_nothing_else(
        self, make: Callable[..., nn.Module], length: int, alpha: float
    ) -> None:
        after_forward, _ = self.kept(partial(make, alpha=alpha), length)
        rows = length if isinstance(make, partial) else self.rows(length)
        bits, last, first = rows * self.count // 8, 4 * self.count, 4
        assert after_forward == bits + last + first

    @staticmethod
    def rows(length: int) -> int:
        """The steps for whose bits a time loop has room: its blocks of memory double."""
        room, block = 0, 1
        while room < length:
            room, block = room + block, min(2 * block, Block.MOST_ROWS)
        return room

    def test_backward_stands_on_few_potentials_at_a_time(self) -> None:
        """Two stretches of about the root of T, and the temporaries of one step."""
        for length in (100, 256):
            _, peak = self.kept(CoupledLeaky, length)
            bits, gradient = self.rows(length) * self.count // 8, 4 * length * self.count
            allowed = 2 * max(12, math.isqrt(length)) + 2 + 12
            assert peak <= bits + gradient + allowed * 4 * self.count

    def test_the_node_keeps_far_less_than_the_hosts(self) -> None:
        host, _ = self.kept(neuron.LIFNode, 200)
        ours, _ = self.kept(CoupledLIFNode, 200)
        assert host / ours >= 58.65

    def test_a_batch_norm_and_a_convolution_between_two_nodes_keep_nothing_of_their_own(
        self,
    ) -> None:
        """What a convolution saved is the node's own output; the norm's input is recomputed
        from it."""

        def held(make: Callable[[], nn.Module]) -> int:
            nets = nn.Sequential(
                make(), nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16), make()
            )
            x = torch.randn(30, 8, 16, 10)
            with LiveBytes() as live:
                outputs = [nets(frame) for frame in x]
                found = live.now()
                del outputs
            return found

        torch.manual_seed(0)
        outputs, potentials = 2 * 30 * 4 * self.count, 2 * 4 * self.count
        statistics = 30 * 2 * 16 * 4 + 30 * 8  # of each batch, and the running count
        assert (
            held(CoupledLIFNode)
            <= outputs + potentials + 2 * self.rows(30) * self.count // 8 + statistics + 1024
        )
        assert held(PLAIN_LIF) > 2.5 * outputs


def test_the_benchmark_measures_what_the_documentation_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    benchmark = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "coupled_node.py"))
    host, ours = (
        benchmark["node_memory"](make, 60) for make in (neuron.LIFNode(), CoupledLIFNode())
    )
    assert host.kept == 12 * 60 + 4
    assert 60 / 8 + 4 <= ours.kept < 64 / 8 + 4.01  # a block of bits has room for a few steps more
    for length, is_enough in ((58, False), (59, True)):
        kept = benchmark["node_memory"](benchmark["node_of"](0.25, 2.0), length).kept
        assert (12 * length >= benchmark["PAPER"] * kept) is is_enough
    monkeypatch.setitem(benchmark["first_time_steps"].__globals__, "PAPER", 10)
    assert benchmark["first_time_steps"](0.25, 2.0) == 5
    found = benchmark["rounding"](CoupledLIFNode(alpha=0.5), 30)
    assert found.scanned == 0 and found.gradient < 1e-6
    assert found.inverted > 1 > 1e-6 > found.inputs
    assert (
        benchmark["anchor_distance"](1.0, 1.0) == 256
        and benchmark["anchor_distance"](0.5, 2.0) == 1
    )


class TestEdits:
    """Writes into what a node gave out or was given."""

    @pytest.mark.parametrize("mode", ["s", "m"])
    def test_an_output_written_into_raises(self, mode: str) -> None:
        node, x = CoupledLIFNode(step_mode=mode), torch.randn(2, 4, 3, requires_grad=True)
        y = node(x if mode == "s" else x.expand(5, 2, 4, 3))
        loss = (y * 2).sum()
        with torch.no_grad():
            y.add_(1)
        with pytest.raises(
            RuntimeError,
            match=(r"the input and the state of a coupled neuron \(its output\) has been modif"),
        ):
            loss.backward()

    def test_an_output_written_into_is_no_input_of_the_next_layer(self) -> None:
        """The layers above are not told that it is what the node gave out."""
        node, weigh, above = CoupledLeaky(), nn.Linear(4, 6), CoupledLeaky()
        x = torch.randn(3, 4, requires_grad=True)
        y, _ = node(x)
        with torch.no_grad():
            y.mul_(2)
        out, _ = above(weigh(y))
        (grad,) = torch.autograd.grad(out.sum(), weigh.weight)
        plain = PLAIN_LEAKY()
        expected = torch.autograd.grad(plain(weigh(y.detach()))[0].sum(), weigh.weight)[0]
        torch.testing.assert_close(grad, expected)

    def test_a_start_written_into_raises(self) -> None:
        node, start = CoupledLeaky(), torch.randn(2, 4)
        x = torch.randn(3, 2, 4, requires_grad=True)
        mem, outs = start, []
        for frame in x:
            out, mem = node(frame, mem)
            outs.append(out)
        loss = sum(each.sum() for each in outs)
        start.zero_()
        with pytest.raises(RuntimeError, match="the one that the sequence started from"):
            loss.backward()

    def test_a_second_backward_raises_as_in_autograd(self) -> None:
        for mode in ("s", "m"):
            node, x = CoupledLIFNode(step_mode=mode), torch.randn(4, 2, 6, 3, requires_grad=True)
            loss = node(x if mode == "m" else x[0]).sum()
            loss.backward(retain_graph=True)
            first = x.grad.clone()
            loss.backward()
            torch.testing.assert_close(x.grad, 2 * first)
            with pytest.raises(RuntimeError, match="retain_graph=True"):
                loss.backward()


class TestValues:
    """What a node offers to the layers above and below."""

    def test_the_outputs_are_at_hand(self) -> None:
        node, x = CoupledLeaky(), torch.randn(3, 4, requires_grad=True)
        y, _ = node(x)
        offered = getattr(y.grad_fn, FIRED)
        assert (
            isinstance(offered, HeldOutputs)
            and offered.derived
            and offered.cheap
            and offered.identity is None
        )
        assert offered.value().data_ptr() == y.data_ptr() and not offered.value().requires_grad
        assert offered.consume()[1] is False
        assert offered.compute().data_ptr() == y.data_ptr()
        assert not offered.were_edited()
        with torch.no_grad():
            y.add_(1)
        assert offered.were_edited()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            offered.value()

    def test_a_walk_ends_at_them(self) -> None:
        node, weigh, record = CoupledLeaky(), nn.Linear(4, 6), NeuronRecord()
        y, _ = node(torch.randn(3, 4, requires_grad=True))
        current = weigh(y)
        value = attach_recipes(current, record)
        assert torch.equal(value.value(), current)
        assert dict(record.statistics.operations) == {"AddmmBackward0": 1, "TBackward0": 1}
        assert not record.statistics.boundaries

    @pytest.mark.parametrize("time", [False, True])
    def test_a_rebuilt_input_is_shared_by_its_readers_and_dropped_by_the_last(
        self, time: bool
    ) -> None:
        node = Coupled(beta=0.5)
        x = inputs(4, torch.float32)
        record = steps(node, x, torch.zeros(SHAPE))
        y, fired = (
            torch.stack([each[2] for each in record]),
            torch.stack([each[4] for each in record]),
        )
        if not time:
            x, y, fired = x[0], y[0], fired[0]
        value = recovered_input(node, HeldOutputs(y), PackedSpikes(fired, y.dtype), time)
        torch.testing.assert_close(value.compute(), x, rtol=1e-6, atol=1e-6)
        for _ in range(2):
            value.add_reader()
        seen = []

        class Readers(torch.autograd.Function):
            @staticmethod
            def forward(ctx, z: Tensor) -> Tensor:
                return z.clone()

            @staticmethod
            def backward(ctx, grad: Tensor) -> Tensor:
                seen.append(value.value())
                seen.append(value in pass_cache())
                seen.append(value.value())
                seen.append(value in pass_cache())
                return grad

        Readers.apply(torch.ones(1, requires_grad=True)).backward()
        assert seen[0] is seen[2] and seen[1] and not seen[3]
        torch.testing.assert_close(seen[0], x, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("mode", ["s", "m"])
    def test_a_node_tells_its_input(self, mode: str) -> None:
        node, x = CoupledLIFNode(step_mode=mode), torch.randn(5, 2, 4, 3, requires_grad=True)
        x = x if mode == "m" else x[0]
        y = node(x)
        node = y.grad_fn
        kept = node.call if mode == "m" else getattr(node, LINK)
        packed = kept.packed if mode == "m" else kept.fired
        value = recovered_input(kept.transition, kept.outputs, packed, time=mode == "m")
        torch.testing.assert_close(value.value(), x.detach(), rtol=1e-6, atol=1e-6)


class TestPlain:
    """The plain path gives the same numbers, and the ledger says why it was taken."""

    def reasons(self, node: nn.Module) -> list[str]:
        assert node.record.statistics.steps == 0
        return list(node.record.statistics.reasons)

    @pytest.mark.parametrize(
        "make", [CoupledLeaky, CoupledLIFNode, partial(CoupledLIFNode, step_mode="m")]
    )
    def test_reasons(self, make: Callable[..., nn.Module]) -> None:
        x = torch.randn(3, 2, 4, 6)

        def y_of(node: nn.Module, x: Tensor) -> Tensor:
            out = node(x)
            return out[0] if isinstance(out, tuple) else out

        with torch.no_grad():
            node = make()
            expected = y_of(node, x)
            assert self.reasons(node) == ["no gradient is recorded"]
        x.requires_grad_()
        node = make(reversible=False)
        assert torch.equal(y_of(node, x), expected)
        assert self.reasons(node) == ["switched off (reversible=False)"]
        node = make()
        with snn_revplugin.use_settings(reversible=False):
            assert torch.equal(y_of(node, x), expected)
        assert self.reasons(node) == ["switched off (reversible=False)"]
        node = make()
        with torch.autograd.graph.save_on_cpu():
            assert torch.equal(y_of(node, x), expected)
        assert "another tool" in self.reasons(node)[0]

    def test_inside_a_checkpoint(self) -> None:
        node, weigh = CoupledLIFNode(step_mode="m"), nn.Linear(6, 6)
        x = torch.randn(3, 2, 4, 6, requires_grad=True)

        def run(x: Tensor) -> Tensor:
            functional.reset_net(node)
            return node(weigh(x))

        checkpoint(run, x, use_reentrant=False).sum().backward()
        inside, x.grad = x.grad, None
        run(x).sum().backward()
        torch.testing.assert_close(inside, x.grad, rtol=1e-6, atol=1e-6)

    def test_a_surrogate_that_is_no_step(self) -> None:
        for node in (
            CoupledLeaky(spike_grad=torch.sigmoid),
            CoupledLIFNode(surrogate_function=nn.Sigmoid()),
        ):
            out = node(torch.randn(2, 4, requires_grad=True))
            (out[0] if isinstance(out, tuple) else out).sum().backward()
            assert "Heaviside" in self.reasons(node)[0]

    def test_explain(self) -> None:
        node = CoupledLIFNode()
        node(torch.randn(2, 4, 8, requires_grad=True))
        text = str(snn_revplugin.explain(node))
        assert (
            "keeps: its outputs, 1 bit per spike, the first potential of a sequence: 0.125 bytes"
            " per neuron and step" in text
        )
        with torch.no_grad():
            node(torch.randn(2, 4, 8))
        assert "no gradient is recorded" in str(snn_revplugin.explain(node))


class TestSnnTorch:
    def test_it_is_a_leaky(self) -> None:
        node = CoupledLeaky(init_hidden=True)
        assert isinstance(node, snn.Leaky) and node in snn.SpikingNeuron.instances
        assert sorted(node.state_dict()) == [
            "alpha",
            "beta",
            "graded_spikes_factor",
            "reset_mechanism_val",
            "tau",
            "threshold",
        ]

    def test_init_hidden_and_output(self) -> None:
        x = torch.randn(2, 4, requires_grad=True)
        out, mem = CoupledLeaky()(x)
        alone = CoupledLeaky(init_hidden=True)
        assert torch.equal(alone(x), out) and torch.equal(alone.mem, mem)
        both = CoupledLeaky(init_hidden=True, output=True)(x)
        assert torch.equal(both[0], out) and torch.equal(both[1], mem)
        assert mem.shape == x.shape
        with pytest.raises(TypeError, match="init_hidden=True"):
            alone(x, mem)

    def test_the_stored_potential_goes_on_without_mem(self) -> None:
        x, node = torch.randn(2, 4, requires_grad=True), CoupledLeaky()
        node(x)
        _, mem = node(x)
        other = CoupledLeaky()
        _, expected = other(x, other(x)[1])
        assert torch.equal(mem, expected)
        assert not node.reset_mem().any()

    def test_a_potential_of_another_shape_or_dtype(self) -> None:
        x, node = torch.randn(2, 4, requires_grad=True), CoupledLeaky()
        assert torch.equal(node(x, torch.ones(3, 4))[1], node(x, torch.zeros(2, 4))[1])
        assert node(x, torch.ones(2, 4, dtype=torch.float64))[1].dtype is torch.float32

    def test_utils_reset_and_detach_hidden(self) -> None:
        net = nn.Sequential(nn.Linear(4, 6), CoupledLeaky(init_hidden=True))
        net(torch.randn(2, 4)).sum().backward()
        snn.Leaky.detach_hidden()
        assert net[1].mem.any() and net[1].mem.grad_fn is None
        net(torch.randn(2, 4)).sum().backward()
        utils.reset(net)
        assert not net[1].mem.any() and net[1].mem.grad_fn is None
        net(torch.randn(2, 4))
        snn.Leaky.reset_hidden()
        assert not net[1].mem.any()

    def test_numbers_are_loaded_and_take_effect(self) -> None:
        x = torch.randn(2, 4, requires_grad=True)
        source, target = (
            CoupledLeaky(tau=3.0, alpha=0.125, beta=0.5, threshold=0.25),
            CoupledLeaky(),
        )
        first, _ = target(x, torch.zeros(2, 4))
        target.load_state_dict(source.state_dict())
        expected, _ = source(x, torch.zeros(2, 4))
        assert torch.equal(target(x, torch.zeros(2, 4))[0], expected) and not torch.equal(
            first, expected
        )

    def test_the_reset_mechanism_may_change(self) -> None:
        x, node = torch.full((2, 4), 5.0), CoupledLeaky()
        node.reset_mechanism = "zero"
        assert torch.equal(
            node(x, torch.zeros(2, 4))[1], CoupledLeaky(reset_mechanism="zero")(x)[1]
        )


class TestSpikingJelly:
    def test_it_is_found_beside_the_hosts(self) -> None:
        assert neuron.CoupledLIFNode is CoupledLIFNode and issubclass(
            CoupledLIFNode, neuron.BaseNode
        )
        node = CoupledLIFNode(v_reset=-0.5)
        assert list(node._memories) == ["v"] and node.v == -0.5 and not node.state_dict()
        assert "tau=2.0, alpha=0.25, beta=1.0, v_threshold=1.0" in repr(node)

    def test_reset_detach_and_step_mode(self) -> None:
        net = nn.Sequential(layer.Linear(4, 6), CoupledLIFNode())
        x = torch.randn(5, 2, 4)
        one_by_one = torch.stack([net(frame) for frame in x])
        assert net[1].v.grad_fn is not None
        functional.detach_net(net)
        assert net[1].v.grad_fn is None
        functional.reset_net(net)
        assert net[1].v == 0.0
        functional.set_step_mode(net, "m")
        assert torch.equal(net(x), one_by_one)
        functional.detach_net(net)
        assert net[1].v.shape == (2, 6)

    @pytest.mark.parametrize("mode", [pytest.param("s", marks=only_pure), "m"])
    def test_the_potentials_of_every_step(self, mode: str) -> None:
        def program(make: MakeNeuron) -> Observed:
            node, x = (
                make(step_mode=mode, store_v_seq=True),
                torch.randn(5, 2, 4, requires_grad=True),
            )
            y = node(x) if mode == "m" else torch.stack([node(frame) for frame in x])
            (y * torch.randn(y.shape) + node.v_seq * torch.randn(y.shape)).sum().backward()
            return Observed({"y": y, "v": node.v_seq}).see_gradients(x=x)

        agree(program, PLAIN_LIF, CoupledLIFNode, tolerance=1e-6)

    @only_pure
    def test_pure_transitions(self) -> None:
        net = nn.Sequential(layer.Linear(4, 6), CoupledLIFNode(), CoupledLIFNode())
        functional.set_step_mode(net, "m")
        run, x = base.to_functional_forward(net), torch.randn(5, 2, 4)
        start = (torch.randn(2, 6), torch.randn(2, 6))
        (y,), after = run((x,), start)
        assert net[1].v == 0.0
        net[1].v, net[2].v = start
        assert torch.equal(net(x), y)
        assert torch.equal(net[1].v, after[0]) and torch.equal(net[2].v, after[1])

    def test_a_gradient_reaches_the_first_potential(self) -> None:
        def program(make: MakeNeuron) -> Observed:
            node, v = make(step_mode="m"), torch.randn(2, 4, requires_grad=True)
            node.v = v
            y = node(torch.randn(5, 2, 4))
            (y.sum() + node.v.sum()).backward()
            return Observed({"y": y}).see_gradients(v=v)

        agree(program, PLAIN_LIF, CoupledLIFNode, tolerance=1e-6)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda node: pickle.loads(pickle.dumps(node)),
    "torch.save": lambda node: saved_and_loaded(node),
}


def saved_and_loaded(node: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(node, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("mode", ["s", "m"])
def test_copies(way: str, mode: str) -> None:
    node, x = CoupledLIFNode(alpha=0.5, step_mode=mode), torch.randn(3, 2, 4, requires_grad=True)
    node(x)
    functional.detach_net(node)
    other = COPIES[way](node)
    assert torch.equal(other(x), node(x))
    assert other.record is not node.record and other.record.statistics.calls == 1


def test_leaky_is_copied_too() -> None:
    node, x = CoupledLeaky(alpha=0.5, init_hidden=True, spike_grad=step_function), torch.randn(2, 4)
    with torch.no_grad():
        node(x)
        for way in COPIES.values():
            other = way(node)
            state = node.mem
            assert torch.equal(other(x), node(x))
            node.mem = state


def step_function(z: Tensor) -> Tensor:
    return UsersSpike.apply(z)


def test_the_check_finds_its_potentials_again() -> None:
    for node in (CoupledLeaky(alpha=0.5), CoupledLIFNode(alpha=0.1, step_mode="m")):
        found = snn_revplugin.check_reversible(node)
        assert found.error == 0 and found.largest > 1
        assert found.invertible and not found.reversed
        assert "rebuilt forward from an anchor every 100 of 100 steps" in str(found)


def test_conversion_leaves_it_alone() -> None:
    net = nn.Sequential(CoupledLeaky(), CoupledLIFNode(), snn.Leaky(beta=0.9))
    report = snn_revplugin.convert(net)
    assert list(report.swapped) == ["2"]
    assert report.left == {"0": "it is reversible already", "1": "it is reversible already"}
    assert list(snn_revplugin.restore(net).swapped) == ["2"]
    assert isinstance(net[0], CoupledLeaky) and isinstance(net[1], CoupledLIFNode)


@pytest.mark.skipif(
    not HAS_COMPILER,
    reason=f"the compiler of torch before {OLDEST_COMPILER} does not trace the plain code",
)
def test_compiled() -> None:
    node, weigh = CoupledLIFNode(step_mode="m"), nn.Linear(6, 6)
    x = torch.randn(3, 2, 4, 6)

    expected = torch.autograd.grad(node(weigh(x)).square().sum(), weigh.weight)[0]
    functional.reset_net(node)
    calls = node.record.statistics.calls
    compiled = torch.compile(lambda x: node(weigh(x)), backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x).square().sum(), weigh.weight)[0]
    assert node.record.statistics.calls == calls
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class TestBatchNorm:
    """A batch norm in front of a coupled node is inverted: its input comes from the node's, not
    from the layers below."""

    @staticmethod
    def net(
        reversible: bool, make: Callable[..., nn.Module] = CoupledLIFNode, shift: float = 1.0
    ) -> nn.Sequential:
        torch.manual_seed(0)
        net = nn.Sequential(
            layer.Conv2d(3, 8, 3, bias=False, step_mode="m"),
            layer.BatchNorm2d(8, step_mode="m"),
            make(step_mode="m", reversible=reversible),
            layer.MaxPool2d(2, step_mode="m"),
            layer.Conv2d(8, 4, 3, bias=False, step_mode="m"),
            layer.BatchNorm2d(4, step_mode="m"),
            make(step_mode="m", reversible=reversible),
        )
        for norm in (net[1], net[5]):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -shift, shift)
        return net

    @staticmethod
    def gradients(net: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        torch.manual_seed(1)
        x = torch.randn(5, 2, 3, 10, 10).to(dtype)
        out = net.to(dtype)(x)
        (out * torch.randn(out.shape).to(dtype)).sum().backward()
        return [each.grad for each in net.parameters()]

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)]
    )
    def test_gradients_are_those_of_plain_autograd(
        self, dtype: torch.dtype, tolerance: float
    ) -> None:
        plain, ours = (self.gradients(self.net(reversible), dtype) for reversible in (False, True))
        for i, (a, b) in enumerate(zip(plain, ours, strict=True)):
            assert_close(str(i), a, b, tolerance, floor=1.0)

    def test_no_convolution_runs_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        net, runs = self.net(True), []
        convolution = torch.convolution
        monkeypatch.setattr(
            torch, "convolution", lambda *args: runs.append(1) or convolution(*args)
        )
        self.gradients(net)
        assert not runs
        assert all(
            each.record.statistics.operations["inverse of NativeBatchNormBackward0"] == 1
            for each in (net[2], net[6])
        )

    def test_running_statistics_are_updated_once(self) -> None:
        plain, ours = self.net(False), self.net(True)
        for net in (plain, ours):
            self.gradients(net)
        assert torch.equal(plain[1].running_mean, ours[1].running_mean)
        assert torch.equal(plain[5].running_var, ours[5].running_var)

    def test_where_a_bias_is_large_next_to_its_weight_the_convolution_runs_again(self) -> None:
        nets = [self.net(reversible, shift=50.0) for reversible in (False, True)]
        for i, (a, b) in enumerate(zip(*(self.gradients(net) for net in nets), strict=True)):
            assert_close(str(i), a, b, 2e-6, floor=1.0)
        assert "inverse of NativeBatchNormBackward0" not in nets[1][6].record.statistics.operations

    def test_a_norms_output_that_was_written_into_is_not_inverted(self) -> None:
        """Unrecorded, so that the node below still is the norm's."""

        def gradients(reversible: bool) -> list[Tensor]:
            torch.manual_seed(2)
            norm, node = nn.BatchNorm1d(4), CoupledLIFNode(reversible=reversible)
            x = torch.randn(8, 4, requires_grad=True)
            current = norm(1.5 * x)
            with torch.no_grad():
                current.clamp_(min=-0.2)
            out = node(current)
            (out * torch.randn(out.shape)).sum().backward()
            return [x.grad, norm.weight.grad, norm.bias.grad]

        for i, (a, b) in enumerate(zip(gradients(False), gradients(True), strict=True)):
            assert_close(str(i), a, b, 2e-6, floor=1.0)

    def test_a_norm_in_evaluation_is_not_inverted(self) -> None:
        nets = [self.net(reversible).eval() for reversible in (False, True)]
        for i, (a, b) in enumerate(zip(*(self.gradients(net) for net in nets), strict=True)):
            assert_close(str(i), a, b, 2e-6, floor=1.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-12)])
def test_the_fast_backward_gives_the_usual_ones_gradients(
    dtype: torch.dtype, tolerance: float
) -> None:
    benchmark = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "fast_backward.py"))
    setup = Setup.usual(WORKLOADS["vgg"], time_steps=2, batch=2, dtype=dtype)
    rows = benchmark["rows"](setup, 1)
    assert [row[1] for row in rows] == ["ours", "usual", "usual, layer", "plain"]
    assert all(float(row[-2]) <= tolerance for row in rows if row[1] != "usual")
    if dtype is torch.float32:
        ours, usual, *_ = (float(row[-1]) for row in rows)
        assert ours <= 1.1 * usual, "as near to what float64 gives for the same spikes"

"""The fused kernels of the coupled node: the same bits forward, and gradients to rounding, as the
plain torch code.

In the interpreter and on a GPU, and compiled ahead of time, as in ``test_kernels.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn as nn
from compare import assert_alive, assert_exact
from on_kernels import (
    COMPILES_BESIDE_THE_INTERPRETER,
    ON_EVERY_DEVICE,
    assert_trains_alike,
    launches,
    trained,
)
from pairs import each_with, every_pair
from torch import Tensor

from snn_revplugin import explain, use_settings
from snn_revplugin.adapters.snntorch import CoupledLeaky
from snn_revplugin.adapters.spikingjelly import CoupledLIFNode
from snn_revplugin.bptt.record import NeuronRecord
from snn_revplugin.bptt.sequence import sequence
from snn_revplugin.bptt.step import step
from snn_revplugin.kernels import backend, launch
from snn_revplugin.kernels.fuse import fuse
from snn_revplugin.kernels.self_test import take_step
from snn_revplugin.kernels.triton_coupled import TritonCoupled
from snn_revplugin.neurons.coupled import Coupled
from snn_revplugin.neurons.surrogate import Surrogate

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("kernels_on")

SIGMOID, ATAN = (
    Surrogate("sigmoid", (4.0,), strict=False),
    Surrogate("atan", (2.0,), keeps_dtype=False),
)
ODD = {
    "tau": 1.7,
    "alpha": 0.37,
    "beta": 0.7,
    "v_threshold": 0.8,
}  # no power of two among them: every product rounds


def name_of_node(v_reset: float | None, detached: bool, fires: Surrogate) -> str:
    reset = "soft" if v_reset is None else f"hard {v_reset}"
    return reset + " detached" * detached + " strict" * (fires is ATAN)


NODES = {
    name_of_node(v_reset, detached, fires): Coupled(
        **ODD, v_reset=v_reset, detach_reset=detached, surrogate=fires
    )
    for v_reset, detached, fires in product((None, 0.0, -0.3), (False, True), (SIGMOID, ATAN))
} | {"as it comes": Coupled(), "no leak": Coupled(tau=1.0, alpha=1.0, v_reset=None)}
EVERY_NODE = pytest.mark.parametrize("node", NODES.values(), ids=NODES)


def options_of(node: Coupled) -> tuple:
    return node.tau, node.v_reset, node.detach_reset, node.surrogate


FEW = "hard -0.3", "soft strict", "as it comes"
EACH_OF_A_FEW = pytest.mark.parametrize("node", [NODES[name] for name in FEW], ids=FEW)
# Halves that do not fill whole bytes, and such that do; the last are more than one program takes.
SHAPES = [(1, 2), (3, 6, 1), (2, 4, 3), (1, 16), (3, 2, 8), (2, 210, 5), (2, 16, 67)]
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)
LENGTHS_AND_SHAPES = [(1, (3, 2)), (2, (3, 16)), (5, (2, 6, 3))]
BY_STEPS_OR_WHOLE = pytest.mark.parametrize("whole", [False, True], ids=["step by step", "whole"])


def nodes_and(*others: Iterable[Any], together: int = 3) -> list:
    """Every node, with other options: every three (or two) options meet, those of the nodes among
    them."""
    rows = each_with(
        NODES, *others, options=lambda name: options_of(NODES[name]), together=together
    )
    return [
        pytest.param(NODES[name], *rest, id="-".join(map(str, (name, *rest))))
        for name, *rest in rows
    ]


def draw(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """An input and a potential around the threshold."""
    torch.manual_seed(len(shape) + shape[0])
    x, v = torch.randn(shape) * 1.5 + 0.4, torch.randn(shape) + 0.4
    return x.to(device, dtype), v.to(device, dtype)


def fused(node: Coupled) -> TritonCoupled:
    return fuse(node, backend.INTERPRETED)


def assert_same_step(node: Coupled, x: Tensor, v: Tensor) -> Tensor:
    """A step by a kernel, and its repetition, have the bits, dtypes and strides of the plain
    ones."""
    with use_settings(backend="torch"):
        plain = take_step(node, x, (v,))
        plain.packed.dtype = x.dtype
    ours = take_step(fused(node), x, (v,))
    packed, expected = ours.packed, plain.packed
    assert torch.equal(packed.bits, expected.bits)
    assert (packed.shape, packed.strides, packed.dtype) == (
        expected.shape,
        expected.strides,
        expected.dtype,
    )
    assert_exact("y", plain.outputs, ours.outputs)
    assert_exact("after", plain.after[0], ours.after[0])
    _, (again,) = node.again(plain, (v,))
    _, (our_again,) = fused(node).again(ours, (v,))
    assert_exact("again", again.contiguous(), our_again.contiguous())
    return expected.fired()


@ON_EVERY_DEVICE
@pytest.mark.parametrize(("node", "shape"), nodes_and(SHAPES))
def test_a_step_is_the_plain_one(node: Coupled, shape: tuple[int, ...], device: str) -> None:
    x, v = draw(*shape, device=device)
    fired = assert_same_step(node, x, v)
    if x.numel() > 1000:
        assert_alive(fired)


@ON_EVERY_DEVICE
@pytest.mark.parametrize(
    ("node", "dtype", "shape"),
    nodes_and((torch.float16, torch.bfloat16), ((2, 42, 5), (2, 16, 7))),
)
def test_a_step_of_short_dtypes_is_the_plain_one(
    node: Coupled, dtype: torch.dtype, shape: tuple[int, ...], device: str
) -> None:
    assert_alive(assert_same_step(node, *draw(*shape, dtype=dtype, device=device)))


@ON_EVERY_DEVICE
@pytest.mark.parametrize("strict", [False, True])
@EVERY_NODE
def test_potentials_on_the_threshold_and_one_ulp_beside_it(
    node: Coupled, strict: bool, device: str
) -> None:
    """Of either half in turn, by potentials and by inputs that go through the threshold in single
    ulps."""
    node = replace(node, split_dim=0, surrogate=replace(node.surrogate, strict=strict))
    ulps = torch.arange(-20, 21, device=device, dtype=torch.int32)
    x1 = (torch.tensor(0.83, device=device).view(torch.int32) + ulps).view(torch.float32)
    x, v = torch.stack([x1, x1 * 0.9]), torch.full((2, 41), 0.31, device=device)
    for half in (0, 1):
        y, after, fired = replace(node, v_threshold=1e9).step(x, v)
        spikes = fired.float()
        charged = (
            node.charge_first(node.halves(y), node.halves(spikes), node.halves(v)),
            node.charge_second(node.halves(y), node.halves(after)[0]),
        )
        on_it = replace(node, v_threshold=charged[half][0, 20].item())
        ours = assert_same_step(on_it, x, v)
        assert half == 1 or 0 < ours[half].sum() < 41


@ON_EVERY_DEVICE
@EVERY_NODE
def test_infinities_and_zeros(node: Coupled, device: str) -> None:
    odd = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e38, -1e38, 1e-30, -1e-30, 1.0],
        device=device,
    )
    x, v = (each.contiguous() for each in torch.meshgrid(odd, odd, indexing="ij"))
    for dim in (0, 1):
        assert_same_step(replace(node, split_dim=dim), x, v)
        assert_same_step(replace(node, split_dim=dim), x, v.roll(3, 0))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "a slice": lambda t: torch.cat([t, t], 1)[:, ::2],
    "expanded": lambda t: t[:1, :1, :1, :1].expand_as(t),
    "contiguous": lambda t: t,
}


@ON_EVERY_DEVICE
@pytest.mark.parametrize(
    ("of_x", "of_v", "split_dim"), every_pair(product(LAYOUTS, LAYOUTS, (0, 1, 2, -1)))
)
def test_every_layout_split_along_any_dimension(
    of_x: str, of_v: str, split_dim: int, device: str
) -> None:
    x, v = draw(2, 16, 6, 8, device=device)
    x, v = LAYOUTS[of_x](x), LAYOUTS[of_v](v)
    x = x + 0 if of_x == "expanded" else x
    assert_same_step(Coupled(**ODD, surrogate=SIGMOID, split_dim=split_dim), x, v)


@ON_EVERY_DEVICE
@EVERY_SHAPE
@EACH_OF_A_FEW
def test_the_inverse_is_the_plain_one(node: Coupled, shape: tuple[int, ...], device: str) -> None:
    x, v = draw(*shape, device=device)
    y, after, fired = node.step(x, v)
    for ours, plain, right in zip(
        fused(node).inverse(y, after, fired), node.inverse(y, after, fired), (x, v), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------- training


def program(
    node: Coupled,
    T: int,
    shape: tuple[int, ...],
    device: str,
    *,
    whole: bool,
    dtype: torch.dtype = torch.float32,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
) -> Any:
    """T steps of two layers of nodes, in one call each or step by step, with a batch norm in
    between that is inverted."""
    torch.manual_seed(1)
    data, start = torch.randn(T, *shape) * 1.5 + 0.4, torch.randn(shape)
    data, start = (each.to(device, dtype).requires_grad_() for each in (data, start))
    norm = nn.BatchNorm1d(shape[1], device=device, dtype=dtype)

    def run() -> tuple[list[Tensor], list[Tensor]]:
        one, other, outputs = NeuronRecord(), NeuronRecord(), []
        leaves = [data, start, *norm.parameters()]
        if whole:
            y, (v,), _ = sequence(node, layout(data * 1), (start,), one)
            normed = norm(y.reshape(T * shape[0], shape[1], -1)).view(T, *shape)
            z, (u,), _ = sequence(node, normed, (start,), other)
            return [y, v, z, u], leaves
        v = u = start
        for x in data:
            y, (v,) = step(node, layout(x * 1), (v,), one)
            normed = norm(y.reshape(shape[0], shape[1], -1)).view(shape)
            z, (u,) = step(node, normed, (u,), other)
            outputs += [y, z]
        return [*outputs, v, u], leaves

    return run


@ON_EVERY_DEVICE
@pytest.mark.parametrize(
    ("node", "sizes", "whole"), nodes_and(LENGTHS_AND_SHAPES, (False, True), together=2)
)
def test_training_is_the_plain_one(
    node: Coupled, sizes: tuple[int, tuple[int, ...]], whole: bool, device: str
) -> None:
    T, shape = sizes
    assert_trains_alike(program(node, T, shape, device, whole=whole))


@ON_EVERY_DEVICE
@EACH_OF_A_FEW
def test_a_chain_that_is_scanned_in_several_stretches(node: Coupled, device: str) -> None:
    with use_settings(rebuild_interval=3):
        assert_trains_alike(program(node, 8, (1, 6, 2), device, whole=False))


@ON_EVERY_DEVICE
@EACH_OF_A_FEW
def test_more_than_one_program(node: Coupled, device: str) -> None:
    assert_trains_alike(program(node, 4, (2, 16, 67), device, whole=True))


@ON_EVERY_DEVICE
@pytest.mark.parametrize(
    ("name", "dtype", "whole"),
    every_pair(product(FEW, (torch.float16, torch.bfloat16), (False, True))),
)
def test_short_dtypes(name: str, dtype: torch.dtype, whole: bool, device: str) -> None:
    """Gradients to what rounding once, where the plain code rounds after every operation, makes of
    them."""
    assert_trains_alike(program(NODES[name], 2, (4, 16), device, whole=whole, dtype=dtype), 0.1)


@ON_EVERY_DEVICE
@pytest.mark.parametrize(
    ("name", "split_dim", "whole"),
    every_pair(product(("turned", "a slice", "expanded"), (0, 1, -1), (False, True))),
)
def test_training_in_any_layout(name: str, split_dim: int, whole: bool, device: str) -> None:
    """Among them a sequence whose time steps do not lie one after the other."""
    layout: Callable[[Tensor], Tensor] = {
        "turned": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        "a slice": lambda t: torch.cat([t, t], -1)[..., ::2],
        "expanded": lambda t: t.narrow(0, 0, 1).expand_as(t),
    }[name]
    node = Coupled(**ODD, surrogate=SIGMOID, split_dim=split_dim)
    assert_trains_alike(program(node, 2, (4, 16), device, whole=whole, layout=layout))


@ON_EVERY_DEVICE
@BY_STEPS_OR_WHOLE
@pytest.mark.parametrize(
    "wanted", [slice(0, 1), slice(-1, None)], ids=["one output", "the last potential"]
)
def test_a_loss_on_a_part(wanted: slice, whole: bool, device: str) -> None:
    run = program(NODES["hard -0.3"], 4, (2, 6), device, whole=whole)

    def part() -> tuple[list[Tensor], list[Tensor]]:
        outputs, leaves = run()
        return outputs[wanted], leaves[:2]  # the norm's parameters may get no gradient

    assert_trains_alike(part)


@BY_STEPS_OR_WHOLE
def test_an_empty_batch_takes_the_plain_code(whole: bool) -> None:
    data, start = torch.zeros(2, 0, 4, requires_grad=True), torch.zeros(0, 4, requires_grad=True)
    if whole:
        y, (v,), _ = sequence(Coupled(), data * 1, (start,), NeuronRecord())
    else:
        v, record = start, NeuronRecord()
        for x in data:
            y, (v,) = step(Coupled(), x * 1, (v,), record)
    (y.sum() + v.sum()).backward()
    assert data.grad.shape == data.shape and start.grad.shape == start.shape


def test_no_torch_code_in_a_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("torch code computed a time step")

    for name in ("step_into", "step_again", "inputs", "gradient", "charge"):
        monkeypatch.setattr(Coupled, name, forbidden)
    for whole in (False, True):
        outputs, grads = trained(program(Coupled(), 4, (2, 6), "cpu", whole=whole), "triton")
        assert outputs[0].isfinite().all()
        assert all(each.isfinite().all() and each.any() for each in grads)


# ----------------------------------------------------------------------------------------- decision


def test_what_no_kernel_can_take() -> None:
    x, v = draw(2, 4)
    for node, each, reason in (
        (Coupled(), x.double(), "float64"),
        (
            Coupled(surrogate=Surrogate("squarewave_fourier_series", (2, 8))),
            x,
            "'squarewave_fourier_series'",
        ),
        (Coupled(), x.half(), "several dtypes"),
    ):
        with (
            use_settings(backend="triton"),
            pytest.raises(RuntimeError, match=f"'triton' was asked for.*{reason}"),
        ):
            states = (v.to(each.dtype) if reason == "float64" else v,)
            NeuronRecord().backend.select(node, each, states)
    with use_settings(backend="torch"):
        assert NeuronRecord().backend.select(node, x, (v,)) is node


def test_one_for_each_node() -> None:
    """A chain of time steps goes by identity."""
    (x, v), node, record = draw(2, 4), Coupled(), NeuronRecord()
    first, second = (record.backend.select(node, x, (v,)) for _ in range(2))
    assert first is second
    assert record.statistics.backend == "Triton kernels in the interpreter"


@pytest.mark.parametrize(
    "make", [lambda: CoupledLeaky(init_hidden=True), lambda: CoupledLIFNode(step_mode="m")]
)
def test_explain_says_what_computed(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    neuron = make()
    neuron(torch.ones(2, 2, 4, requires_grad=True))
    assert "arithmetic: Triton kernels in the interpreter" in str(explain(neuron))
    monkeypatch.setattr(backend, "INTERPRETED", False)
    neuron = make()
    neuron(torch.ones(2, 2, 4, requires_grad=True))
    assert "arithmetic: torch code: the tensors are not on CUDA" in str(explain(neuron))


# ------------------------------------------------------------------------------------ ahead of time


@pytest.mark.ahead_of_time
@COMPILES_BESIDE_THE_INTERPRETER
@pytest.mark.parametrize(
    ("name", "dtype", "shape", "neurons", "capability"),
    [
        ("hard -0.3", torch.float32, (2, 16), 2**31 + 32, 80),
        ("soft strict", torch.float32, (3, 2), 2**20, 90),
        ("as it comes", torch.bfloat16, (2, 16), 1024, 80),
        ("soft detached", torch.float16, (2, 6), 2**31 + 32, 90),
    ],
    ids=str,
    indirect=["capability"],
)
def test_compiling_ahead_of_time(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    neurons: int,
    capability: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each launch of a training step as it was made, and the inverse, compiled but not started."""

    def run() -> None:
        node = NODES[name]
        for whole in (False, True):
            trained(program(node, 2, shape, "cpu", whole=whole, dtype=dtype), "triton")
        y, after, fired = node.step(*draw(*shape, dtype=dtype))
        fused(node).inverse(y, after, fired)

    made = launches(monkeypatch, run)
    ours = [each for each in made.values() if "half" in each.arguments]
    assert {each.kernel for each in ours} == {"forward_kernel", "inverse_kernel", "backward_kernel"}
    assert {each.constants.get("AGAIN") for each in ours} == {None, False, True}
    for each in ours:
        arguments, constants = dict(each.arguments), dict(each.constants)
        constants |= {"NEURON": replace(constants["NEURON"], on_cuda=True), "WIDE": neurons > 2**31}
        arguments["N"] = neurons
        ptx = (
            getattr(launch.kernels(False, "coupled"), each.kernel)
            .warmup(*arguments.values(), grid=(1,), **constants)
            .asm["ptx"]
        )
        assert f".target sm_{capability}" in ptx
        if each.kernel == "forward_kernel":
            assert "fma." not in ptx, "a multiplication and an addition were fused"
            assert ".ftz" not in ptx, "small potentials are flushed to zero"
            assert "ld.global.v" in ptx or not constants["BITS"], "loads are not vectors"

"""The fused kernels: the same bits forward, and gradients to rounding, as the plain torch code.

On every machine the kernels run in Triton's interpreter and are compiled for sm_80 and sm_90, which
takes no GPU. Tests with the marker ``gpu`` are the same comparisons on a CUDA device. Every output
is poisoned before a launch, so that an element that is not written shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn as nn
from calls import Calls
from compare import assert_alive, assert_close, assert_exact
from on_kernels import (
    COMPILES_BESIDE_THE_INTERPRETER,
    ON_EVERY_DEVICE,
    assert_trains_alike,
    launches,
    trained,
)
from pairs import each_with, every_pair
from torch import Tensor

from snn_revplugin import check_reversible, explain, use_settings
from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.adapters.spikingjelly import RevLIFNode
from snn_revplugin.bptt.record import NeuronRecord
from snn_revplugin.bptt.sequence import sequence
from snn_revplugin.bptt.step import step
from snn_revplugin.cli.comparison import Setup
from snn_revplugin.cli.workloads import HOST, OURS, WORKLOADS
from snn_revplugin.kernels import backend, launch
from snn_revplugin.kernels.fuse import fuse
from snn_revplugin.kernels.self_test import SampleInputs, SampleStep, take_step
from snn_revplugin.kernels.surrogate_constants import SURROGATES
from snn_revplugin.kernels.triton_neuron import BackwardTensors, TritonNeuron
from snn_revplugin.neurons.integrate_and_fire import (
    IntegrateAndFire,
    LeakyIntegrateAndFire,
    ParametricLeakyIntegrateAndFire,
)
from snn_revplugin.neurons.kernel_limits import KERNEL_DTYPES
from snn_revplugin.neurons.leaky import Leaky
from snn_revplugin.neurons.one_state import OneStateNeuron
from snn_revplugin.neurons.surrogate import Surrogate, surrogate_of
from snn_revplugin.neurons.transition import KeptSequence, SequenceGradients
from snn_revplugin.packed.codec import NumpyCodec
from snn_revplugin.packed.spikes import PackedSpikes
from snn_revplugin.replay import Normed

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("kernels_on")

SHAPES = [(1,), (7,), (2, 4), (3, 3), (5, 205)]
ATAN, SIGMOID = (
    Surrogate("atan", (2.0,), keeps_dtype=False),
    Surrogate("sigmoid", (4.0,), strict=False),
)

# relative error of gradients in float16 and bfloat16: the kernels round once, the plain code after
# every operation
SHORT = 0.1

Make = Callable[
    [str, torch.dtype, int], OneStateNeuron
]  # device, dtype, neurons in the last dimension


def _leaky(kind: str, delayed: bool, vectors: bool, graded: bool, learn: bool = True) -> Make:
    def make(device: str, dtype: torch.dtype, last: int) -> OneStateNeuron:
        def values(low: float, high: float) -> Tensor:
            each = (
                torch.linspace(low, high, last)
                if vectors and last > 1
                else torch.tensor((low + high) / 2)
            )
            return each.to(device).requires_grad_(learn)

        factor = values(0.7, 1.3) if graded else torch.tensor(1.0, device=device)
        return Leaky(ATAN, values(0.5, 0.95), values(0.6, 1.1), factor, kind, delayed, graded)

    return make


def _spikingjelly(kind: type, v_reset: float | None, detached: bool, **options: Any) -> Make:
    def make(device: str, dtype: torch.dtype, last: int) -> OneStateNeuron:
        if kind is ParametricLeakyIntegrateAndFire:
            options["w"] = torch.tensor(-0.4, dtype=dtype, device=device, requires_grad=True)
        return kind(SIGMOID, 0.8, v_reset, detached, **options)

    return make


def _cases() -> dict[str, Make]:
    cases: dict[str, Make] = {}
    for kind, delayed, vectors, graded in product(
        ("subtract", "zero", "none"), (True, False), (False, True), (False, True)
    ):
        words = [
            kind,
            "" if delayed else "at once",
            "vectors" if vectors else "",
            "graded" if graded else "",
        ]
        cases[" ".join(["Leaky", *filter(None, words)])] = _leaky(kind, delayed, vectors, graded)
    for v_reset, detached in product((None, 0.0, -0.3), (False, True)):
        reset = (
            f"{'soft' if v_reset is None else f'hard {v_reset}'}{' detached' if detached else ''}"
        )
        cases[f"IF {reset}"] = _spikingjelly(IntegrateAndFire, v_reset, detached)
        for decay_input, words in ((True, ""), (False, " input kept")):
            options = {"decay_input": decay_input}
            cases[f"LIF {reset}{words}"] = _spikingjelly(
                LeakyIntegrateAndFire, v_reset, detached, tau=1.7, **options
            )
            cases[f"PLIF {reset}{words}"] = _spikingjelly(
                ParametricLeakyIntegrateAndFire, v_reset, detached, **options
            )
    return cases


CASES = _cases()
EVERY_CASE = pytest.mark.parametrize("name", CASES)
IN_SEQUENCES = [name for name in CASES if "at once" not in name or "none" in name]
FEW = [
    "Leaky subtract",
    "Leaky subtract vectors graded",
    "Leaky zero graded",
    "Leaky subtract at once graded",
    "IF soft",
    "LIF hard -0.3",
    "LIF hard 0.0 detached input kept",
    "PLIF soft",
    "PLIF hard -0.3 input kept",
]


def words_of(name: str) -> tuple[str, ...]:
    """The options of a case by its name, a column each; those of Leaky are no other neuron's."""
    kind, reset, *words = name.split()
    if kind != "Leaky":
        value = words.pop(0) if reset == "hard" else ""
        return kind, f"{reset} {value}", "", *("detached" in words, "kept" in words, "")
    return kind, "", reset, *(word in words for word in ("once", "vectors", "graded"))


def cases_and(names: Iterable[str], *others: Iterable[Any], together: int = 2) -> list[tuple]:
    """Every case of these names, with other options: every two (or three) options meet, those of
    the cases among them."""
    return each_with(names, *others, options=words_of, together=together)


def fused(neuron: OneStateNeuron) -> TritonNeuron:
    return fuse(neuron, backend.INTERPRETED)


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A current and a potential around the threshold."""
    torch.manual_seed(seed)
    x, v = torch.randn(shape) * 1.5 + 0.4, torch.randn(shape) + 0.4
    return x.to(device, dtype), v.to(device, dtype)


def assert_same_step(neuron: OneStateNeuron, x: Tensor, v: Tensor) -> Tensor:
    """One step forward by a kernel has the bits, dtypes and strides of the plain one; the plain
    spikes come back."""
    with torch.no_grad(), use_settings(backend="torch"):
        plain = take_step(neuron, x, (v,))
    with torch.no_grad():
        ours = take_step(fused(neuron), x, (v,))
    assert_exact("spikes", plain.outputs, ours.outputs)
    assert_exact("charged", plain.charged, ours.charged)
    assert_exact("after", plain.after[0], ours.after[0])
    if neuron.has_reset_signal:
        assert torch.equal(plain.packed_signal.bits, ours.packed_signal.bits)
    packed, expected = ours.packed, plain.packed
    expected.factor = neuron.graded_factor
    assert torch.equal(packed.bits, expected.bits)
    assert (packed.shape, packed.strides, packed.dtype) == (
        expected.shape,
        expected.strides,
        expected.dtype,
    )
    assert_exact("unpacked", expected.spikes(), packed.spikes())
    return expected.fired()


def view_of(neuron: OneStateNeuron, h: Tensor) -> SampleStep:
    """A time step whose charged potential is ``h``."""
    with torch.no_grad():
        fired = neuron.fires(h)
    return SampleStep(h, (h,), fired, (h,), PackedSpikes(fired.bool()), h, None)


# ------------------------------------------------------------------------------------------ forward


@ON_EVERY_DEVICE
@pytest.mark.parametrize(("name", "shape"), cases_and(CASES, SHAPES, together=3), ids=str)
def test_a_step_forward_is_the_plain_one(name: str, shape: tuple[int, ...], device: str) -> None:
    fired = assert_same_step(
        CASES[name](device, torch.float32, shape[-1]), *draw(shape, torch.float32, device)
    )
    if len(shape) == 2 and shape[-1] > 100:
        assert_alive(fired)


@ON_EVERY_DEVICE
@pytest.mark.parametrize(
    ("name", "dtypes"),
    cases_and(CASES, [(torch.float16,) * 2, (torch.bfloat16,) * 2, (torch.float16, torch.float32)]),
    ids=str,
)
def test_a_step_forward_of_short_dtypes_is_the_plain_one(
    name: str, dtypes: tuple[torch.dtype, torch.dtype], device: str
) -> None:
    if "Leaky" not in name and dtypes[0] is not dtypes[1]:
        dtypes = (torch.float32, torch.float32)  # SpikingJelly's neurons take the host's path there
    neuron = CASES[name](device, dtypes[0], 205)
    x, v = draw((5, 205), torch.float32, device)
    assert_alive(assert_same_step(neuron, x.to(dtypes[0]), v.to(dtypes[1])))


@ON_EVERY_DEVICE
@pytest.mark.parametrize(("name", "strict"), cases_and(CASES, (False, True)), ids=str)
def test_potentials_on_the_threshold_and_one_ulp_beside_it(
    name: str, strict: bool, device: str
) -> None:
    """Currents that go through the threshold in single ulps; and potentials that do, for the reset
    that was left to do."""
    neuron = CASES[name](device, torch.float32, 1)
    neuron = replace(neuron, surrogate=replace(neuron.surrogate, strict=strict))
    ulps = torch.arange(-20, 21, device=device, dtype=torch.int32)
    x = (torch.tensor(0.83, device=device).view(torch.int32) + ulps).view(torch.float32)
    v = torch.full_like(x, 0.31)
    with torch.no_grad():
        h = neuron.charge(x, v, neuron.reset_signal_at(v))[20]
    threshold = h if isinstance(neuron.threshold, Tensor) else h.item()
    on_it = replace(neuron, threshold=threshold)
    if neuron.has_reset_signal or not isinstance(neuron, Leaky):
        fired = assert_same_step(on_it, x, v)
        assert 0 < fired.sum() < fired.numel()
    v = (
        torch.as_tensor(threshold, device=device, dtype=torch.float32).view(torch.int32) + ulps
    ).view(torch.float32)
    assert_same_step(on_it, x * 0.1, v)


@ON_EVERY_DEVICE
def test_what_lies_beside_the_last_neuron(device: str) -> None:
    """The rest of its byte is empty, though a neuron without current would fire there; and it adds
    to no sum, were it NaN."""
    assert_same_step(IntegrateAndFire(SIGMOID, -0.5, None), *draw((9,), torch.float32, device))
    steep = Surrogate("sigmoid_of_exp", (200.0,), keeps_dtype=False)
    beta, threshold, one = (
        torch.tensor(each, device=device, requires_grad=True) for each in (0.9, 1.0, 1.0)
    )
    h = torch.linspace(0.95, 1.05, 9, device=device)
    leaky = Leaky(steep, beta, threshold, one, "none")
    _, (_, expected, _) = leaky.vjp_of_fire(view_of(leaky, h), h, (True,) * 3)
    _, (_, ours, _) = fused(leaky).vjp_of_fire(view_of(leaky, h), h, (True,) * 3)
    assert_close("threshold", expected, ours)


@ON_EVERY_DEVICE
@EVERY_CASE
def test_infinities_and_zeros(name: str, device: str) -> None:
    odd = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e38, -1e38, 1e-40, -1e-40], device=device
    )
    v, x = torch.meshgrid(odd, odd, indexing="ij")
    assert_same_step(CASES[name](device, torch.float32, 9), x.contiguous(), v.contiguous())


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "a slice": lambda t: torch.cat([t, t], 1)[:, ::2],
    "expanded": lambda t: t[:1, :1, :1, :1].expand_as(t),
    "contiguous": lambda t: t,
}


def per_channel(shape: tuple[int, ...]) -> Make:
    """A neuron whose decay and threshold have this shape."""

    def make(device: str, dtype: torch.dtype, last: int) -> OneStateNeuron:
        count = torch.Size(shape).numel()
        beta, threshold = (
            torch.linspace(low, low + 0.3, count, device=device).view(shape) for low in (0.6, 0.8)
        )
        one = torch.tensor(1.0, device=device)
        return Leaky(ATAN, beta, threshold, one, "subtract", graded=False)

    return make


SHAPES_OF_PARAMETERS = [
    (), (1,), (4, 1, 1), (5,), (3, 5), (4, 3, 5), (4, 1, 5), (2, 1, 1, 1)
]  # fmt: skip
IN_ANY_LAYOUT = {
    **{f"Leaky {shape}": per_channel(shape) for shape in SHAPES_OF_PARAMETERS},
    "IF": lambda device, dtype, last: IntegrateAndFire(SIGMOID, 0.8, 0.0),
    "LIF": lambda device, dtype, last: LeakyIntegrateAndFire(SIGMOID, 0.8, -0.1),
}


@ON_EVERY_DEVICE
@pytest.mark.parametrize(
    ("of_x", "of_v", "name"), every_pair(product(LAYOUTS, LAYOUTS, IN_ANY_LAYOUT))
)
def test_every_layout(of_x: str, of_v: str, name: str, device: str) -> None:
    x, v = draw((2, 4, 3, 5), torch.float32, device)
    x, v = LAYOUTS[of_x](x), LAYOUTS[of_v](v)
    x = x + 0 if of_x == "expanded" else x
    assert_same_step(IN_ANY_LAYOUT[name](device, torch.float32, 5), x, v)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.bool, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 1023, 1025, 4099])
def test_packing(count: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(count)
    fired, code = (torch.rand(count, device=device) < 0.4), launch.kernels(backend.INTERPRETED)
    bits = torch.empty((2, -(-count // 8)), dtype=torch.uint8, device=device)[
        1
    ]  # a row of a block, aligned to nothing
    launch.pack(code, fired.to(dtype), bits)
    assert_exact("bits", PackedSpikes(fired.cpu()).bits.to(device), bits)
    assert_exact("ones", fired.to(dtype), launch.unpack(code, bits, count, dtype))


# ----------------------------------------------------------------------------------------- backward


def network(
    T: int, shape: tuple[int, ...], device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Data for T steps, a layer's weight, and a first potential."""
    torch.manual_seed(1)
    drawn = torch.randn(T, *shape), torch.tensor([[[1.6]]]), torch.randn(shape)
    data, weight, start = (each.to(device, dtype) for each in drawn)
    return data.requires_grad_(), weight.requires_grad_(), start.requires_grad_()


def layer(data: Tensor, weight: Tensor) -> Tensor:
    """A convolution with one tap: what comes of it can be recomputed."""
    return torch.conv1d(data.reshape(1, 1, -1), weight).view(data.shape)


def steps(
    neuron: OneStateNeuron,
    T: int,
    shape: tuple[int, ...],
    device: str,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A program of T single steps whose currents come from a layer, so that they can be recomputed
    and time be reversed."""
    data, weight, start = network(T, shape, device, dtype)

    def run() -> tuple[list[Tensor], list[Tensor]]:
        record, v, outputs = NeuronRecord(), start, []
        for x in data:
            spikes, (v,) = step(neuron, layer(x, weight), (v,), record)
            outputs.append(spikes)
        return [*outputs, v], [
            weight,
            data,
            start,
            *(each for each in neuron.parameters if each.requires_grad),
        ]

    return run


@ON_EVERY_DEVICE
@pytest.mark.parametrize(
    ("name", "sizes"), cases_and(CASES, [(1, (9,)), (2, (7,)), (5, (3, 5))]), ids=str
)
def test_steps_backward_give_the_plain_gradients(
    name: str, sizes: tuple[int, tuple[int, ...]], device: str
) -> None:
    T, shape = sizes
    assert_trains_alike(steps(CASES[name](device, torch.float32, shape[-1]), T, shape, device))


@ON_EVERY_DEVICE
@pytest.mark.parametrize("name", FEW)
def test_many_steps_backward_give_the_plain_gradients(name: str, device: str) -> None:
    """In more than one program, and rebuilt in several stretches where they are not reversed."""
    with use_settings(rebuild_interval=3):
        assert_trains_alike(steps(CASES[name](device, torch.float32, 1025), 8, (1025,), device))


@ON_EVERY_DEVICE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_steps_backward_of_short_dtypes(name: str, dtype: torch.dtype, device: str) -> None:
    assert_trains_alike(steps(CASES[name](device, dtype, 40), 3, (3, 40), device, dtype), SHORT)


@ON_EVERY_DEVICE
@pytest.mark.usefixtures("recompute_everything")
def test_time_is_reversed_in_the_kernel_that_takes_the_gradient(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No second launch, no torch code for the reversal of charge and reset: of 9 steps 8 hand their
    potential down."""
    reversals = []
    original = TritonNeuron._launch_backward

    def seen(self: TritonNeuron, part: str, *args: Any) -> Any:
        (given,) = (each for each in args if isinstance(each, BackwardTensors))
        reversals.append(given.before_out is not None)
        return original(self, part, *args)

    def forbidden(*_: Any) -> None:
        raise AssertionError("torch code reversed a step")

    monkeypatch.setattr(TritonNeuron, "_launch_backward", seen)
    for name in ("invert_charge", "invert_reset", "charge", "reset"):
        monkeypatch.setattr(IntegrateAndFire, name, forbidden)
    neuron = IntegrateAndFire(SIGMOID, 0.8, None)
    with use_settings(backend="triton"):
        outputs, _ = steps(neuron, 9, (2, 5), device)()
        sum(each.sum() for each in outputs).backward()
    assert reversals == [True] * 8 + [False]


# How code reads the gradient at a potential: what it holds for that; what its hooks are given.
SEES = {
    "the last": lambda mem, told: None,
    "the tensor": lambda mem, told: mem,
    "an edge": lambda mem, told: torch.autograd.graph.get_gradient_edge(mem),
    "a saved tensor": lambda mem, told: (mem * mem).sum(),
    "a hook": lambda mem, told: mem.register_hook(told.append) and None,
    "a hook of the node": lambda mem, told: (
        mem.grad_fn.register_prehook(lambda grads: told.append(grads[0])) and None
    ),
    "a hook after the node": lambda mem, told: (
        mem.grad_fn.register_hook(lambda _, grads: told.append(grads[0])) and None
    ),
}


@ON_EVERY_DEVICE
@pytest.mark.usefixtures("recompute_everything")
@pytest.mark.parametrize("what", SEES)
def test_fire_and_charge_backward_are_one_launch(
    what: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no code can read the gradient at the potential between them."""
    parts: list[str] = []
    original = TritonNeuron._launch_backward

    def seen(self: TritonNeuron, part: str, *args: Any) -> Any:
        parts.append(part)
        return original(self, part, *args)

    monkeypatch.setattr(TritonNeuron, "_launch_backward", seen)
    found = []
    for used in ("torch", "triton"):
        neuron = CASES["Leaky subtract graded"](device, torch.float32, 5)
        data, weight, mem = network(4, (2, 5), device, torch.float32)
        record, outputs, told, held = NeuronRecord(), [], [], []
        with use_settings(backend=used):
            for x in data:
                spikes, (mem,) = step(neuron, layer(x, weight), (mem,), record)
                outputs.append(spikes)
                held.append(SEES[what](mem, told))
            loss = sum(i * (each * each.detach().cos()).sum() for i, each in enumerate(outputs, 1))
            grads = torch.autograd.grad(loss, (data, weight, *neuron.parameters), retain_graph=True)
            if what in ("the tensor", "an edge"):
                told += torch.autograd.grad(loss, held, retain_graph=True)
            loss.backward()
        found.append([*outputs, *grads, *told])
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        assert_close(f"{what}, {i}", a, b)
    # of 4 steps in each of two passes; the last potential is the user's
    assert parts.count("step") == (6 if what == "the last" else 0)
    assert len(parts) - parts.count("step") >= (4 if what == "the last" else 16)


def whole(
    neuron: OneStateNeuron,
    T: int,
    shape: tuple[int, ...],
    device: str,
    *,
    dtype: torch.dtype = torch.float32,
    scanned: bool = True,
    with_path: bool = False,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
) -> Any:
    """A program of one call of T steps; ``scanned`` if its currents can be recomputed."""
    data, weight, start = network(T, shape, device, dtype)

    def run() -> tuple[list[Tensor], list[Tensor]]:
        currents = layer(data, weight)
        currents = layout(currents if scanned else currents.sin() * 1.5)  # a sine is not recomputed
        spikes, (last,), path = sequence(neuron, currents, (start,), NeuronRecord(), with_path)
        return [spikes, last, *([path] if with_path else [])], [
            weight, data, start, *(each for each in neuron.parameters if each.requires_grad)
        ]  # fmt: skip

    return run


@ON_EVERY_DEVICE
@pytest.mark.parametrize(
    ("name", "program"),
    cases_and(
        IN_SEQUENCES,
        [
            (1, (9,), True, False),
            (2, (8,), False, True),
            (5, (3, 3), True, True),
            (11, (1,), True, False),
            (2, (1025,), False, False),
            (launch.AT_ONCE, (8,), True, False),
            (launch.AT_ONCE + 3, (8,), True, True),
            (3 * launch.STRETCH, (3,), True, False),
            (launch.AT_ONCE + 1, (8,), False, False),
        ],
    ),
    ids=str,
)
def test_a_sequence_is_the_plain_one(
    name: str, program: tuple[int, tuple[int, ...], bool, bool], device: str
) -> None:
    T, shape, scanned, with_path = program
    neuron = CASES[name](device, torch.float32, shape[-1])
    assert_trains_alike(whole(neuron, T, shape, device, scanned=scanned, with_path=with_path))


@ON_EVERY_DEVICE
@pytest.mark.parametrize(("T", "count"), product((1, 2, 9), (1, 7, 8, 1025)), ids=str)
def test_the_bits_of_a_sequence(T: int, count: int, device: str) -> None:
    """A step's last byte is the next one's first unless the neurons fill whole bytes."""
    neuron, (x, _) = IntegrateAndFire(SIGMOID, 0.8, 0.0), draw((T, count), torch.float32, device)
    packed, spikes, *_ = fused(neuron).scan(x, (torch.zeros_like(x[0]),))
    with use_settings(backend="torch"):
        expected = PackedSpikes(spikes.bool())
    assert (packed.shape, packed.strides, packed.dtype) == (
        expected.shape,
        expected.strides,
        expected.dtype,
    )
    assert torch.equal(packed.bits, expected.bits)


def normed(
    neuron: OneStateNeuron,
    T: int,
    shape: tuple[int, ...],
    device: str,
    *,
    training: bool = True,
    affine: bool = True,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
) -> Any:
    """A program of one call of T steps whose currents a batch norm gives out."""
    torch.manual_seed(2)
    weigh, norm = (
        nn.Conv1d(2, shape[1], 3, padding=1, device=device),
        nn.BatchNorm1d(shape[1], affine=affine, device=device),
    )
    data, start = (
        torch.randn(T, shape[0], 2, shape[2], device=device) + 0.5,
        torch.randn(shape, device=device),
    )
    if affine:
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    norm.train(training)

    def run() -> tuple[list[Tensor], list[Tensor]]:
        currents = norm(layout(weigh(data.flatten(0, 1)) * 3 + 2)).unflatten(0, (T, shape[0]))
        spikes, (last,), _ = sequence(neuron, currents, (start,), NeuronRecord())
        assert_alive(spikes)
        leaves = [weigh.weight, *norm.parameters(), *neuron.parameters]
        return [spikes, last], [each for each in leaves if each.requires_grad]

    return run


@pytest.fixture
def norms_read(monkeypatch: pytest.MonkeyPatch) -> list[Normed]:
    """The batch norms whose input a kernel has read in the place of their output."""
    read, channels = [], Normed.channels

    def seen(self: Normed) -> tuple[Tensor, Tensor, Tensor]:
        read.append(self)
        return channels(self)

    def forbidden(self: Normed) -> None:
        raise AssertionError("the norm's output was recomputed")

    monkeypatch.setattr(Normed, "channels", seen)
    monkeypatch.setattr(Normed, "value", forbidden)
    return read


@ON_EVERY_DEVICE
@pytest.mark.parametrize(
    ("name", "sizes"),
    cases_and(
        (name for name in IN_SEQUENCES if "vectors" not in name),
        [
            (1, (2, 4, 6)),
            (2, (2, 3, 4)),
            (5, (2, 4, 5)),
            (launch.AT_ONCE + 3, (4, 2, 4)),
            (4, (1, 3, 5)),
        ],
    ),
    ids=str,
)
def test_a_sequence_reads_the_norms_input(
    name: str, sizes: tuple[int, tuple[int, ...]], device: str, norms_read: list[Normed]
) -> None:
    T, shape = sizes
    # The currents differ in their last bits, and the bias's gradient is a sum over all neurons and
    # steps, which may cancel.
    assert_trains_alike(
        normed(CASES[name](device, torch.float32, shape[-1]), T, shape, device), 5e-5
    )
    assert len(norms_read) == 1


@ON_EVERY_DEVICE
@pytest.mark.parametrize("options", [
    {"training": False}, {"affine": False}, {"training": False, "affine": False},
    {"layout": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)},
], ids=["evaluation", "no weight", "evaluation, no weight", "channels last"])  # fmt: skip
@pytest.mark.parametrize("name", ["PLIF soft", "LIF hard -0.3"])
def test_a_sequence_reads_any_norms_input(
    name: str, options: dict[str, Any], device: str, norms_read: list[Normed]
) -> None:
    assert_trains_alike(
        normed(CASES[name](device, torch.float32, 5), 5, (2, 4, 5), device, **options)
    )
    assert len(norms_read) == 1


JUMPING = {
    "triangular": (2.5,),
    "heaviside": (),
    "sparse_fast_sigmoid": (25.0, 0.25),
    "piecewise_leaky_relu": (0.5, 0.01),
    "s2nn": (4.0, 2.0),
    "leaky_k_relu": (0.1, 1.5),
    "log_tailed_relu": (2.5,),
    "rect": (2.5,),
}


@ON_EVERY_DEVICE
@pytest.mark.parametrize("name", JUMPING)
def test_a_derivative_that_jumps_is_taken_at_the_very_potential(
    name: str, device: str, norms_read: list[Normed]
) -> None:
    neuron = IntegrateAndFire(Surrogate(name, JUMPING[name], strict=False), 0.8, 0.0)
    assert_trains_alike(normed(neuron, 4, (2, 4, 5), device))
    assert not norms_read


@ON_EVERY_DEVICE
def test_spikes_are_not_decided_again_by_the_norms_input(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Potentials on the threshold, and an input that is a little off: gradients are those of the
    spikes that were given."""
    off = 1 + 1e-6
    monkeypatch.setattr(
        Normed,
        "channels",
        lambda self, known=Normed.channels: tuple(each * off for each in known(self)),
    )
    neuron = IntegrateAndFire(SIGMOID, 1.0, 0.0)
    norm, data = nn.BatchNorm1d(2, device=device).eval(), torch.ones(5, 4, 2, device=device)
    norm.running_var.fill_(1 - norm.eps)

    def run() -> tuple[list[Tensor], list[Tensor]]:
        currents = norm(data.flatten(0, 1)).view_as(
            data
        )  # exactly one: every neuron fires at every step
        start = (torch.zeros_like(data[0]),)
        spikes, (last,), _ = sequence(neuron, currents, start, NeuronRecord())
        return [spikes, last], list(norm.parameters())

    assert_trains_alike(run)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("count", [7, 8], ids=["bits beside bytes", "whole bytes"])
@pytest.mark.parametrize("name", ["IF hard 0.0", "IF soft", "Leaky subtract", "Leaky zero"])
def test_a_sequence_decides_no_spike_in_backward(name: str, count: int, device: str) -> None:
    """Potentials on the threshold, and inputs that are recomputed a little off: the gradients are
    those of the spikes that forward gave."""
    neuron = CASES[name](device, torch.float32, count)
    one, threshold = torch.tensor(1.0, device=device), 1.0
    if name.startswith("Leaky"):
        one, threshold = one.requires_grad_(), one * (1 - 1e-7)
    neuron = replace(neuron, threshold=threshold)
    if isinstance(neuron, Leaky):
        neuron = replace(neuron, beta=one)
    x, kernels = torch.ones(6, count, device=device), fused(neuron)
    start = (torch.zeros(count, device=device),)
    needed = tuple(each.requires_grad for each in neuron.parameters)
    with torch.no_grad():
        packed = neuron.scan(x, start).fired
        assert packed.fired().any()
        gradients = SequenceGradients(draw(tuple(x.shape), x.dtype, device)[0], (None,))
        found = []
        for transition, inputs in ((neuron, x), (kernels, x), (kernels, x * (1 - 1e-6))):
            kept = KeptSequence(start, x.dtype, inputs=SampleInputs(inputs), packed=packed)
            grad_x, (grad_start,), grads = transition.vjp_of_scan(kept, gradients, needed)
            found.append((grad_x, grad_start, *grads))
    for plain, exact, off in zip(*found, strict=True):
        assert_close("exact", plain, exact)
        assert_close("off", plain, off)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("name", ["Leaky subtract", "Leaky zero"])
def test_a_step_decides_no_reset_signal_in_backward(name: str, device: str) -> None:
    """The potential before is over the threshold by a rounding, but the reset did not act."""
    neuron, (x, v) = CASES[name](device, torch.float32, 9), draw((9,), torch.float32, device)
    v = torch.full_like(v, neuron.threshold.item() * (1 - 1e-6))
    with torch.no_grad():
        view = take_step(neuron, x, (v,))
        assert not view.packed_signal.fired().any()
        view.before = (v * (1 + 1e-5),)
        expected = neuron.vjp_of_charge(view, (x,), (True,) * 3)
        ours = fused(neuron).vjp_of_charge(view, (x,), (True,) * 3)
    for name_, i in (("input", 0), ("before", 1), ("parameters", 2)):
        pairs = zip(*(each[i] if i else (each[i],) for each in (expected, ours)), strict=True)
        for a, b in pairs:
            assert_close(name_, a, b)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("w", [-90.0, -15.0])
@pytest.mark.parametrize("name", ["PLIF soft", "PLIF hard -0.3", "PLIF soft input kept"])
def test_a_learned_rate_next_to_zero(name: str, w: float, device: str) -> None:
    """Its gradient takes no quotient by the rate: it is no NaN, and as precise as any other."""
    neuron = CASES[name](device, torch.float32, 8)
    neuron = replace(neuron, w=torch.tensor(w, device=device, requires_grad=True))
    for run in (steps(neuron, 5, (8,), device), whole(neuron, 5, (8,), device)):
        (_, grads), (_, ours) = trained(run, "torch"), trained(run, "triton")
        for i, (a, b) in enumerate(zip(grads, ours, strict=True)):
            assert b.isfinite().all()
            assert_close(f"leaf {i}", a, b)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in FEW if name in IN_SEQUENCES])
def test_a_sequence_of_short_dtypes(name: str, dtype: torch.dtype, device: str) -> None:
    assert_trains_alike(
        whole(CASES[name](device, dtype, 40), 4, (2, 40), device, dtype=dtype, with_path=True),
        SHORT,
    )


@ON_EVERY_DEVICE
@pytest.mark.parametrize("name", ["channels last", "a slice"])
def test_a_sequence_in_any_layout(name: str, device: str) -> None:
    def layout(currents: Tensor) -> Tensor:
        return LAYOUTS[name](currents.flatten(0, 1)).unflatten(0, (3, -1))

    neuron = LeakyIntegrateAndFire(SIGMOID, 0.8, 0.0)
    assert_trains_alike(whole(neuron, 3, (2, 4, 3, 5), device, layout=layout))


@ON_EVERY_DEVICE
def test_currents_that_two_layers_share_are_not_written_into(device: str) -> None:
    data, weight, start = network(3, (9,), device, torch.float32)

    def run() -> tuple[list[Tensor], list[Tensor]]:
        currents, outputs = layer(data, weight), []
        for threshold in (0.5, 0.9):
            neuron = IntegrateAndFire(SIGMOID, threshold, 0.0)
            spikes, (last,), _ = sequence(neuron, currents, (start,), NeuronRecord())
            outputs += [spikes, last]
        return outputs, [weight, data, start]

    assert_trains_alike(run)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("wanted", ["spikes", "last"])
@pytest.mark.parametrize("name", FEW)
def test_a_loss_on_spikes_or_on_the_last_potential_alone(
    name: str, wanted: str, device: str
) -> None:
    neuron = CASES[name](device, torch.float32, 9)
    programs = [steps(neuron, 3, (9,), device)]
    if name in IN_SEQUENCES:
        programs.append(whole(neuron, 3, (9,), device))
    for run in programs:

        def part(run: Any = run) -> tuple[list[Tensor], list[Tensor]]:
            outputs, leaves = run()
            return outputs[:-1] if wanted == "spikes" else outputs[-1:], leaves

        (_, grads), (_, ours) = trained(part, "torch"), trained(part, "triton")
        largest = max(each.abs().max().item() for each in grads if each is not None)
        for i, (a, b) in enumerate(zip(grads, ours, strict=True)):
            assert_close(f"leaf {i}", a, b, floor=largest)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates(name: str, device: str) -> None:
    """At and around every point where one of them is pieced together."""
    given = {
        "triangular": (0.8,),
        "spike_rate_escape": (1.5, 5.0),
        "sparse_fast_sigmoid": (25.0, 0.25),
        "piecewise_leaky_relu": (0.5, 0.01),
        "s2nn": (4.0, 1.0),
        "leaky_k_relu": (0.1, 1.5),
        "straight_through": (),
        "heaviside": (),
    }.get(name, (2.5,))
    surrogate = Surrogate(name, given)
    points = torch.tensor(
        [0.0, *(sign * p for p in (0.2, 0.25, 0.4, 0.5, 1.0, 2.5) for sign in (1, -1))]
    )
    beside = [
        points,
        torch.nextafter(points, points + 1),
        torch.nextafter(points, points - 1),
        torch.linspace(-3, 3, 1001),
    ]
    z = torch.cat(beside).to(device)
    grad = torch.linspace(-1, 2, z.numel(), device=device)
    zero, one = (
        torch.zeros((), device=device),
        torch.ones((), device=device),
    )  # a threshold of zero, so that h is z
    neuron, learned = Leaky(surrogate, one, zero, one, "none", graded=False), (False,) * 3
    view = view_of(neuron, z)
    expected, _ = neuron.vjp_of_fire(view, grad, learned)
    ours, _ = fused(neuron).vjp_of_fire(view, grad, learned)
    torch.testing.assert_close(ours, expected, rtol=3e-6, atol=1e-6)


@ON_EVERY_DEVICE
def test_sums_are_the_same_every_time(device: str) -> None:
    run = whole(CASES["PLIF soft"](device, torch.float32, 1), 2, (3000,), device)
    first, again = (trained(run, "triton")[1][3] for _ in range(2))
    assert torch.equal(first, again)


# ----------------------------------------------------------------------------------------- decision


def refusal(neuron: OneStateNeuron, x: Tensor, v: Tensor) -> str:
    with (
        use_settings(backend="triton"),
        pytest.raises(RuntimeError, match="'triton' was asked for") as refused,
    ):
        NeuronRecord().backend.select(neuron, x, (v,))
    record = NeuronRecord()
    assert record.backend.select(neuron, x, (v,)) is neuron
    assert record.statistics.backend.startswith("torch code: ")
    return str(refused.value)


def test_what_no_kernel_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    x, v = draw((4,), torch.float32, "cpu")
    lif = IntegrateAndFire(SIGMOID, 1.0, None)
    assert "float64" in refusal(lif, x.double(), v.double())
    assert "'squarewave_fourier_series'" in refusal(
        replace(lif, surrogate=Surrogate("squarewave_fourier_series", (2, 8))), x, v
    )
    users = surrogate_of(lambda z: (z > 0).to(z))
    assert "of the user's" in refusal(replace(lif, surrogate=users), x, v)
    assert "several dtypes" in refusal(lif, x.half(), v)

    class Other(IntegrateAndFire):  # a subclass may have equations of its own
        pass

    assert "no kernel for Other" in refusal(Other(SIGMOID, 1.0, None), x, v)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    assert "TRITON_INTERPRET=1" in refusal(lif, x, v)
    monkeypatch.setattr(backend, "_installed", lambda: False)
    assert "not installed" in refusal(lif, x, v)


def test_the_setting_overrules() -> None:
    neuron, (x, v) = IntegrateAndFire(SIGMOID, 1.0, None), draw((4,), torch.float32, "cpu")
    record = NeuronRecord()
    backend_, statistics = record.backend, record.statistics
    taken = backend_.select(neuron, x, (v,))
    assert isinstance(taken, TritonNeuron)
    assert statistics.backend == "Triton kernels in the interpreter"
    assert backend_.select(neuron, x, (v,)) is taken, (
        "another instance would break the chain of time steps"
    )
    with use_settings(backend="torch"):
        assert backend_.select(neuron, x, (v,)) is neuron
        assert "backend='torch'" in statistics.backend
    with (
        pytest.raises(ValueError, match=r"backend must be one of .*got 'cuda'"),
        use_settings(backend="cuda"),
    ):
        pass


@pytest.mark.parametrize(
    "neuron", [lambda: RevLeaky(beta=0.9, init_hidden=True), lambda: RevLIFNode(step_mode="m")]
)
def test_explain_says_what_computed(
    neuron: Callable[[], torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    neuron = neuron()
    neuron(torch.ones(2, 3, requires_grad=True))
    assert "arithmetic: Triton kernels in the interpreter" in str(explain(neuron))
    monkeypatch.setattr(backend, "INTERPRETED", False)
    neuron = neuron.__class__(
        **({"beta": 0.9, "init_hidden": True} if isinstance(neuron, RevLeaky) else {})
    )
    neuron(torch.ones(2, 3, requires_grad=True))
    assert "arithmetic: torch code: the tensors are not on CUDA" in str(explain(neuron))


def test_a_reversible_neuron_in_the_interpreter() -> None:
    assert check_reversible(RevLeaky(beta=0.9), torch.randn(6, 2, 5) * 2).error < 1e-5


def test_launches_of_a_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of work 1, beside the host's operations. Spikes that a kernel reads are not unpacked for it:
    only for the convolution and the linear layer above, and numpy does so here."""
    setup = Setup.usual(WORKLOADS["csnn"], time_steps=3, batch=1)
    batch, calls = setup.data(), Counter()
    with Calls() as host:
        setup.loss(setup.net(HOST), batch).backward()

    def count(kind: type, name: str) -> None:
        original = getattr(kind, name)

        def counted(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(kind, name, counted)

    count(type(launch.kernels(True).forward_kernel), "run")
    count(NumpyCodec, "pack_array")
    count(NumpyCodec, "unpack_array")
    with use_settings(backend="triton", recompute_min_bytes=0):
        setup.loss(setup.net(OURS), batch).backward()
    neurons, layers = 3 * 3, 2 * 3  # calls; of them those with a layer above
    assert calls["run"] <= 2 * neurons + 3 * 2  # the last step's fire and charge are apart
    assert calls["pack_array"] <= 3  # the first step's reset signal
    assert calls["unpack_array"] <= 2 * layers  # for the current and the weight's gradient
    assert calls.total() <= 0.4 * host.count.total()


# ------------------------------------------------------------------------------------ ahead of time


@pytest.mark.ahead_of_time
@COMPILES_BESIDE_THE_INTERPRETER
@pytest.mark.parametrize(
    ("name", "dtype", "neurons", "capability"),
    [
        ("Leaky subtract vectors graded", torch.float32, 2**31 + 16, 80),
        ("Leaky zero at once graded", torch.float32, 1, 90),
        ("PLIF soft", torch.bfloat16, 7, 80),
        ("LIF hard -0.3", torch.float32, 2**20, 90),
        ("LIF soft", torch.float32, 2**31 + 16, 80),
        ("IF soft", torch.float16, 2**31 + 16, 90),
    ],
    ids=str,
    indirect=["capability"],
)
def test_compiling_ahead_of_time(
    name: str, dtype: torch.dtype, neurons: int, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each launch of a training step as it was made, compiled but not started; for one neuron up to
    more than 2**31."""
    neuron = CASES[name]("cpu", dtype, 8)

    def run() -> None:
        trained(steps(neuron, 2, (2, 8), "cpu", dtype), "triton")
        if name in IN_SEQUENCES:
            trained(whole(neuron, 2, (2, 8), "cpu", dtype=dtype, with_path=True), "triton")
        if name in IN_SEQUENCES and dtype is torch.float32:
            trained(normed(neuron, 2, (3, 2, 8), "cpu"), "triton")
        if name == "LIF hard -0.3":  # in several stretches
            trained(whole(neuron, launch.AT_ONCE + 1, (2, 8), "cpu", dtype=dtype), "triton")
        if name in IN_SEQUENCES and "vectors" not in name:  # bits that fill no whole bytes
            trained(whole(neuron, 2, (3, 3), "cpu", dtype=dtype), "triton")
        code = launch.kernels(True)
        bits = torch.empty(1, dtype=torch.uint8)
        launch.pack(code, torch.ones(8), bits)
        launch.unpack(code, bits, 8, torch.float32)

    made = launches(monkeypatch, run)
    assert any(each.constants.get("FROM_AFTER") for each in made.values()) == (name == "LIF soft")
    kernels = {each.kernel for each in made.values()}
    assert kernels >= {"forward_kernel", "step_backward_kernel", "pack_kernel", "unpack_kernel"}
    for each in made.values():
        arguments, constants = dict(each.arguments), dict(each.constants)
        if "NEURON" in constants:
            constants["NEURON"] = replace(constants["NEURON"], on_cuda=True)
        arguments["N"] = neurons
        constants |= {"WIDE": neurons > 2**31} if "WIDE" in constants else {}
        ptx = (
            getattr(launch.kernels(False), each.kernel)
            .warmup(*arguments.values(), grid=(1,), **constants)
            .asm["ptx"]
        )
        assert f".target sm_{capability}" in ptx
        if each.kernel == "forward_kernel":
            assert "fma." not in ptx, "a multiplication and an addition were fused"
            assert ".ftz" not in ptx, "small potentials are flushed to zero"
            assert "ld.global.v" in ptx or neurons % 16, "loads are not vectors"

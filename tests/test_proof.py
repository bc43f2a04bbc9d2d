"""Kernels are tried out beside the plain code before they are taken; here in Triton's
interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from snn_revplugin import Settings
from snn_revplugin.bptt.statistics import CallStatistics
from snn_revplugin.kernels import backend
from snn_revplugin.kernels import self_test as proof
from snn_revplugin.kernels.backend import select_backend, takes_triton
from snn_revplugin.kernels.self_test import failure, packing_failure
from snn_revplugin.kernels.triton_coupled import TritonCoupled
from snn_revplugin.kernels.triton_neuron import TritonNeuron
from snn_revplugin.neurons.coupled import Coupled
from snn_revplugin.neurons.integrate_and_fire import (
    LeakyIntegrateAndFire,
    ParametricLeakyIntegrateAndFire,
)
from snn_revplugin.neurons.leaky import Leaky
from snn_revplugin.neurons.surrogate import Surrogate

pytest.importorskip("triton", reason="Triton is not installed")

SIGMOID = Surrogate("sigmoid", (4.0,), strict=False)
ATAN = Surrogate("atan", (2.0,), keeps_dtype=False)
CPU = torch.device("cpu")


def leaky(**options: object) -> Leaky:
    beta, threshold = (
        torch.linspace(0.5, 0.9, 6).requires_grad_(),
        torch.tensor(1.0, requires_grad=True),
    )
    return replace(
        Leaky(ATAN, beta, threshold, torch.tensor(1.0), "subtract", True, False), **options
    )


def plif() -> ParametricLeakyIntegrateAndFire:
    return ParametricLeakyIntegrateAndFire(
        SIGMOID, 1.0, 0.0, False, w=torch.tensor(-0.4, requires_grad=True)
    )


NEURONS = {
    "Leaky": leaky,
    "Leaky that resets at once": lambda: leaky(delayed=False),
    "LIF": lambda: LeakyIntegrateAndFire(SIGMOID, 1.0, None, False, tau=2.0),
    "PLIF": plif,
    "coupled": lambda: Coupled(split_dim=-1, surrogate=SIGMOID),
}


@pytest.fixture(autouse=True)
def _nothing_tried_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend, "INTERPRETED", True)
    monkeypatch.setattr(proof, "_verdicts", {})
    yield


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.zeros(2, 6, dtype=dtype), torch.zeros(2, 6, dtype=dtype)


def test_the_default_is_to_take_kernels_that_pass() -> None:
    assert Settings().backend == "auto"


@pytest.mark.parametrize("name", NEURONS)
def test_right_kernels_pass(name: str) -> None:
    dynamics = NEURONS[name]()
    assert failure(dynamics, *tensors()) is None
    assert all(each.grad is None for each in dynamics.parameters), (
        "a sample's gradients are nobody else's"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_right_kernels_of_short_dtypes_pass(dtype: torch.dtype) -> None:
    assert failure(LeakyIntegrateAndFire(SIGMOID, 1.0, 0.0, True, tau=2.0), *tensors(dtype)) is None


def mistaken(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[TritonNeuron | TritonCoupled], None]
) -> None:
    """Let every kernel be launched with something changed."""
    for kind in (TritonNeuron, TritonCoupled):

        def make(
            self: TritonNeuron | TritonCoupled, *given: Any, made: Callable = kind.__init__
        ) -> None:
            made(self, *given)
            change(self)

        monkeypatch.setattr(kind, "__init__", make)


@pytest.mark.parametrize("name", NEURONS)
def test_a_kernel_whose_spikes_differ_is_not_taken(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def higher_threshold(kernels: TritonNeuron | TritonCoupled) -> None:
        if isinstance(kernels, TritonCoupled):
            kernels._numbers = (
                *kernels._numbers[:5],
                kernels.plain.v_threshold * 1.01,
                kernels._numbers[6],
            )
        else:
            decay, threshold, factor = kernels._given(
                kernels._spec(torch.float32, torch.float32, torch.zeros(1))
            )
            kernels._given = lambda spec: (decay, threshold * 1.01, factor)

    mistaken(monkeypatch, higher_threshold)
    assert "spikes or potentials differ" in failure(NEURONS[name](), *tensors())


@pytest.mark.parametrize("name", NEURONS)
def test_a_kernel_whose_gradients_differ_is_not_taken(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steeper_surrogate(kernels: TritonNeuron | TritonCoupled) -> None:
        kernels._constants = (kernels._constants[0] * 1.01, *kernels._constants[1:])

    mistaken(monkeypatch, steeper_surrogate)
    assert "gradients differ" in failure(NEURONS[name](), *tensors())


def test_a_kernel_that_fails_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError("no compiler for this device\nand a long trace")

    monkeypatch.setattr("snn_revplugin.kernels.triton_neuron.launch", failing)
    assert (
        failure(plif(), *tensors())
        == "the kernel failed on cpu: OSError: no compiler for this device"
    )


def test_a_neuron_is_tried_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever instance of it comes, with whatever values, in whatever surroundings; and random
    numbers stay as they were."""
    tried = []
    compare = proof._compare
    monkeypatch.setattr(proof, "_compare", lambda *given: tried.append(given) or compare(*given))
    before = torch.random.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu"):
        assert failure(plif(), *tensors()) is None
    assert failure(replace(plif(), threshold=0.5), *tensors()) is None
    assert len(tried) == 1
    assert torch.equal(before, torch.random.get_rng_state())


def test_below_autograd_a_neuron_is_tried_out_all_the_same() -> None:
    """An operator of ``torch.compile`` runs where nothing is recorded."""
    with torch._C._AutoDispatchBelowAutograd():
        assert failure(leaky(), *tensors()) is None


def test_below_autograd_nothing_is_tried_out_in_backward() -> None:
    """A second thread could wait there for the first one's device for ever."""
    said = []

    def look(_: Tensor) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            said.append(failure(leaky(), *tensors()))

    x = torch.ones(1, requires_grad=True)
    x.register_hook(look)
    x.sum().backward()
    assert said == [proof.IN_BACKWARD] and not proof._verdicts


def test_the_decision_asks_for_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the interpreter; with a device that is not there, so that the kernels fail."""
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(backend, "why_not", lambda tensor=None: None)
    monkeypatch.setattr(backend, "NO_CUDA", "")
    dynamics, statistics = leaky(), CallStatistics()

    class OnCuda:
        """As much of a CUDA tensor as the decision looks at."""

        dtype, is_cuda, device = torch.float32, True, torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr("snn_revplugin.kernels.kernel_spec.why_no_kernel", lambda *_: None)
    assert select_backend(dynamics, OnCuda(), OnCuda(), statistics) is dynamics
    assert statistics.backend.startswith("torch code: the kernel failed on cuda:0: ")


def test_nothing_is_tried_out_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert packing_failure(torch.device("cuda", 0)) == proof.CAPTURING
    assert not proof._verdicts, "the next call may try"


def test_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU numpy packs, so that what is tried here is what becomes of a kernel that is
    wrong."""
    assert packing_failure(CPU) is None and takes_triton(torch.zeros(1))
    monkeypatch.setattr(proof, "_verdicts", {})
    monkeypatch.setattr(
        "snn_revplugin.packed.spikes.np.packbits",
        lambda flat, bitorder: np.zeros(-(-flat.size // 8), "uint8"),
    )
    assert "packed spikes differ" in packing_failure(CPU)

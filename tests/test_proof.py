"""Kernels are tried out beside the plain code before they are taken; here in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from snn_revplugin import Settings
from snn_revplugin.coupled import Coupled
from snn_revplugin.dynamics import Leaky, LeakyIntegrateAndFire, ParametricLeakyIntegrateAndFire
from snn_revplugin.kernels import backend, proof
from snn_revplugin.kernels.backend import arithmetic, takes_triton
from snn_revplugin.kernels.fused import Fused
from snn_revplugin.kernels.fused_coupled import FusedCoupled
from snn_revplugin.kernels.proof import objection, objection_to_packing
from snn_revplugin.ledger import Ledger
from snn_revplugin.surrogate import Surrogate

pytest.importorskip("triton", reason="Triton is not installed")

SIGMOID = Surrogate("sigmoid", (4.0,), strict=False)
ATAN = Surrogate("atan", (2.0,), keeps_dtype=False)
CPU = torch.device("cpu")


def leaky(**options: object) -> Leaky:
    beta, threshold = torch.linspace(0.5, 0.9, 6).requires_grad_(), torch.tensor(1.0, requires_grad=True)
    return replace(Leaky(ATAN, beta, threshold, torch.tensor(1.0), "subtract", True, False), **options)


def plif() -> ParametricLeakyIntegrateAndFire:
    return ParametricLeakyIntegrateAndFire(SIGMOID, 1.0, 0.0, False, w=torch.tensor(-0.4, requires_grad=True))


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
    assert objection(dynamics, *tensors()) is None
    assert all(each.grad is None for each in dynamics.parameters), "a sample's gradients are nobody else's"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_right_kernels_of_short_dtypes_pass(dtype: torch.dtype) -> None:
    assert objection(LeakyIntegrateAndFire(SIGMOID, 1.0, 0.0, True, tau=2.0), *tensors(dtype)) is None


def mistaken(monkeypatch: pytest.MonkeyPatch, change: Callable[[Fused | FusedCoupled], None]) -> None:
    """Let every kernel be launched with something changed."""
    for kind in (Fused, FusedCoupled):

        def make(self: Fused | FusedCoupled, *given: Any, made: Callable = kind.__init__) -> None:
            made(self, *given)
            change(self)

        monkeypatch.setattr(kind, "__init__", make)


@pytest.mark.parametrize("name", NEURONS)
def test_a_kernel_whose_spikes_differ_is_not_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def higher_threshold(kernels: Fused | FusedCoupled) -> None:
        if isinstance(kernels, FusedCoupled):
            kernels._numbers = (*kernels._numbers[:5], kernels.plain.v_threshold * 1.01, kernels._numbers[6])
        else:
            decay, threshold, factor = kernels._given(kernels._form(torch.float32, torch.float32, torch.zeros(1)))
            kernels._given = lambda form: (decay, threshold * 1.01, factor)

    mistaken(monkeypatch, higher_threshold)
    assert "spikes or potentials differ" in objection(NEURONS[name](), *tensors())


@pytest.mark.parametrize("name", NEURONS)
def test_a_kernel_whose_gradients_differ_is_not_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def steeper_surrogate(kernels: Fused | FusedCoupled) -> None:
        kernels._constants = (kernels._constants[0] * 1.01, *kernels._constants[1:])

    mistaken(monkeypatch, steeper_surrogate)
    assert "gradients differ" in objection(NEURONS[name](), *tensors())


def test_a_kernel_that_fails_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError("no compiler for this device\nand a long trace")

    monkeypatch.setattr("snn_revplugin.kernels.fused.launch", failing)
    assert objection(plif(), *tensors()) == "the kernel failed on cpu: OSError: no compiler for this device"


def test_a_neuron_is_tried_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever instance of it comes, with whatever values, in whatever surroundings; and random numbers stay as they were."""
    tried = []
    compare = proof._compare
    monkeypatch.setattr(proof, "_compare", lambda *given: tried.append(given) or compare(*given))
    before = torch.random.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu"):
        assert objection(plif(), *tensors()) is None
    assert objection(replace(plif(), threshold=0.5), *tensors()) is None
    assert len(tried) == 1
    assert torch.equal(before, torch.random.get_rng_state())


def test_below_autograd_a_neuron_is_tried_out_all_the_same() -> None:
    """An operator of ``torch.compile`` runs where nothing is recorded."""
    with torch._C._AutoDispatchBelowAutograd():
        assert objection(leaky(), *tensors()) is None


def test_below_autograd_nothing_is_tried_out_in_backward() -> None:
    """A second thread could wait there for the first one's device for ever."""
    said = []

    def look(_: Tensor) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            said.append(objection(leaky(), *tensors()))

    x = torch.ones(1, requires_grad=True)
    x.register_hook(look)
    x.sum().backward()
    assert said == [proof.IN_BACKWARD] and not proof._verdicts


def test_the_decision_asks_for_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the interpreter; with a device that is not there, so that the kernels fail."""
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(backend, "why_not", lambda tensor=None: None)
    monkeypatch.setattr(backend, "NO_CUDA", "")
    dynamics, ledger = leaky(), Ledger()

    class OnCuda:
        """As much of a CUDA tensor as the decision looks at."""

        dtype, is_cuda, device = torch.float32, True, torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr("snn_revplugin.kernels.form.why_none", lambda *_: None)
    assert arithmetic(dynamics, OnCuda(), OnCuda(), ledger) is dynamics
    assert ledger.backend.startswith("torch code: the kernel failed on cuda:0: ")


def test_nothing_is_tried_out_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert objection_to_packing(torch.device("cuda", 0)) == proof.CAPTURING
    assert not proof._verdicts, "the next call may try"


def test_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU numpy packs, so that what is tried here is what becomes of a kernel that is wrong."""
    assert objection_to_packing(CPU) is None and takes_triton(torch.zeros(1))
    monkeypatch.setattr(proof, "_verdicts", {})
    monkeypatch.setattr("snn_revplugin.spikes.np.packbits", lambda flat, bitorder: np.zeros(-(-flat.size // 8), "uint8"))
    assert "packed spikes differ" in objection_to_packing(CPU)

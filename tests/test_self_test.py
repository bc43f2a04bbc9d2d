"""Kernels are compared with the plain code before they are used; here in Triton's interpreter."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from snn_revplugin import Settings, use_settings
from snn_revplugin.bptt.record import NeuronRecord
from snn_revplugin.bptt.step import step
from snn_revplugin.kernels import backend, launch, self_test
from snn_revplugin.kernels.backend import takes_triton
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
    "Leaky with an immediate reset": lambda: leaky(delayed=False),
    "LIF": lambda: LeakyIntegrateAndFire(SIGMOID, 1.0, None, False, tau=2.0),
    "PLIF": plif,
    "coupled": lambda: Coupled(split_dim=-1, surrogate=SIGMOID),
}


@pytest.fixture(autouse=True)
def _nothing_tested_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend, "INTERPRETED", True)
    monkeypatch.setattr(self_test, "_verdicts", {})
    yield


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, tuple[Tensor]]:
    return torch.zeros(2, 6, dtype=dtype), (torch.zeros(2, 6, dtype=dtype),)


def test_the_default_is_to_take_kernels_that_pass() -> None:
    assert Settings().backend == "auto"


@pytest.mark.parametrize("name", NEURONS)
def test_right_kernels_pass(name: str) -> None:
    neuron = NEURONS[name]()
    assert failure(neuron, *tensors()) is None
    assert all(each.grad is None for each in neuron.parameters)


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
            *others, threshold, v_reset = kernels._numbers
            kernels._numbers = (*others, threshold * 1.01, v_reset)
        else:
            numbers = kernels._numbers
            kernels._numbers = lambda spec: numbers(spec)._replace(
                threshold=numbers(spec).threshold * 1.01
            )

    mistaken(monkeypatch, higher_threshold)
    with pytest.warns(
        RuntimeWarning, match="plain torch code.*spikes or potentials differ"
    ) as said:
        assert "spikes or potentials differ" in failure(NEURONS[name](), *tensors())
        assert "spikes or potentials differ" in failure(NEURONS[name](), *tensors())
    ours = [each for each in said if "plain torch code" in str(each.message)]
    assert len(ours) == 1, "the second call warns again"


@pytest.mark.parametrize("name", NEURONS)
def test_a_kernel_whose_gradients_differ_is_not_taken(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steeper_surrogate(kernels: TritonNeuron | TritonCoupled) -> None:
        kernels._constants = (kernels._constants[0] * 1.01, *kernels._constants[1:])

    mistaken(monkeypatch, steeper_surrogate)
    with pytest.warns(RuntimeWarning, match="gradients differ"):
        assert "gradients differ" in failure(NEURONS[name](), *tensors())


def test_a_kernel_that_fails_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError("no compiler for this device\nand a long trace")

    monkeypatch.setattr("snn_revplugin.kernels.triton_neuron.launch", failing)
    with pytest.warns(RuntimeWarning, match="OSError: no compiler for this device$"):
        assert (
            failure(plif(), *tensors())
            == "the kernel failed on cpu: OSError: no compiler for this device"
        )


def test_a_neuron_is_tested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all its instances and values, with gradients or autocast on or off; the random numbers of
    the user are not drawn."""
    tried, compare = [], self_test._compare
    monkeypatch.setattr(
        self_test, "_compare", lambda *given: tried.append(given) or compare(*given)
    )
    before = torch.random.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu"):
        assert failure(plif(), *tensors()) is None
    assert failure(replace(plif(), threshold=0.5), *tensors()) is None
    assert len(tried) == 1
    assert torch.equal(before, torch.random.get_rng_state())


def test_below_autograd_a_neuron_is_tested() -> None:
    """An operator of ``torch.compile`` runs where nothing is recorded."""
    with torch._C._AutoDispatchBelowAutograd():
        assert failure(leaky(), *tensors()) is None


def test_in_backward_a_neuron_is_tested() -> None:
    """No graph is recorded and no thread is started, so none can wait for another."""
    said = []

    def look(_: Tensor) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            said.append(failure(leaky(), *tensors()))

    x = torch.ones(1, requires_grad=True)
    x.register_hook(look)
    x.sum().backward()
    assert said == [None]


def test_the_decision_runs_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the interpreter; on a device that does not exist, so that the kernels fail."""
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(backend, "why_not", lambda tensor=None: None)
    monkeypatch.setattr(backend, "NO_CUDA", "")
    neuron, record = leaky(), NeuronRecord()

    class OnCuda:
        """As much of a CUDA tensor as the decision looks at."""

        dtype, is_cuda, device = torch.float32, True, torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Leaky, "why_no_kernel", lambda *_: None)
    with pytest.warns(RuntimeWarning, match="the kernel failed on cuda:0: "):
        assert record.backend.select(neuron, OnCuda(), (OnCuda(),)) is neuron
    assert record.statistics.backend.startswith("torch code: the kernel failed on cuda:0: ")


def test_nothing_is_tested_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert packing_failure(torch.device("cuda", 0)) == self_test.CAPTURING
    assert not self_test._verdicts, "the next call may test"


def test_packing_that_is_right() -> None:
    assert packing_failure(CPU) is None and takes_triton(torch.zeros(1))


def test_packing_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = launch.pack
    monkeypatch.setattr(launch, "pack", lambda code, fired, bits: pack(code, ~fired, bits))
    with pytest.warns(RuntimeWarning, match="packed spikes differ"):
        assert "packed spikes differ" in packing_failure(CPU)


def test_unpacking_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = launch.unpack
    monkeypatch.setattr(launch, "unpack", lambda *given: 1 - unpack(*given))
    with pytest.warns(RuntimeWarning, match="packed spikes differ"):
        assert "packed spikes differ" in packing_failure(CPU)


def test_the_environment_is_not_written_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """... neither by the first use of kernels nor by a training step."""
    for name in [each for each in sys.modules if each.startswith(f"{launch.__package__}.")]:
        if name.split(".")[2] in (launch.INTERPRETED, launch.COMPILED):
            monkeypatch.delitem(sys.modules, name)
    fresh = cache(launch.kernels.__wrapped__)
    monkeypatch.setattr(launch, "kernels", fresh)
    monkeypatch.setattr("snn_revplugin.kernels.triton_transition.kernels", fresh)

    def forbidden(*_: object) -> None:
        raise AssertionError("os.environ was written into")

    x, (v,) = tensors()
    record, neuron = NeuronRecord(), plif()
    with monkeypatch.context() as patched, use_settings(backend="triton"):
        for name in ("__setitem__", "__delitem__"):
            patched.setattr(type(os.environ), name, forbidden)
        spikes, (v,) = step(neuron, x + 2.0, (v.requires_grad_(),), record)
        (spikes.sum() + v.sum()).backward()
        assert fresh(False) is not fresh(True)
    assert record.statistics.backend == "Triton kernels in the interpreter"

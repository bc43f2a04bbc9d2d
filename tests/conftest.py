"""What all tests share: one thread, the hosts' global registers restored after each test, and the
kernels. With ``TRITON_INTERPRET=1`` in the environment every neuron of the suite that a kernel can
run does so in Triton's interpreter. Lines at the end of a run say what ran where, and what this
machine lacks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hosts import PURE
from torch import Tensor

# The tensors of these tests are tiny: several threads would spend their time waiting for each
# other, and slow down other processes.
torch.set_num_threads(1)

# These need the models, layers and tools of SpikingJelly 2, most of them from their imports on.
FOR_SPIKINGJELLY_2 = [
    "test_distributed.py",
    "test_docs.py",
    "test_every_neuron.py",
    "test_fake_cuda.py",
    "test_norms_over_time.py",
    "test_spikingjelly_layers.py",
    "test_spikingjelly_models.py",
    "test_spikingjelly_simple.py",
    "test_spikingjelly_tools.py",
    "test_training_setups.py",
]
FOR_SPIKINGJELLY_0 = [
    "test_spikingjelly_stateful.py"
]  # 0.0.0.0.14, whose neurons write their state
collect_ignore = FOR_SPIKINGJELLY_0 if PURE else FOR_SPIKINGJELLY_2

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS = {
    **({"gpu": "on a GPU"} if GPU else {}),
    "interpreter": "in Triton's interpreter",
    "ahead_of_time": "compiled ahead of time",
}  # marker: where its tests run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a CUDA device, the tests that need one are not collected."""
    if not GPU:
        items[:] = [each for each in items if each.get_closest_marker("gpu") is None]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many tests of the kernels ran where, also in the processes of pytest-xdist, and which
    tests this machine cannot run."""
    counts = []
    for marker, where in KERNELS.items():
        ran = skipped = 0
        for outcome in ("passed", "failed", "error", "skipped"):
            reports = terminalreporter.stats.get(outcome, ())
            number = sum(marker in getattr(each, "keywords", ()) for each in reports)
            ran, skipped = (ran, number) if outcome == "skipped" else (ran + number, skipped)
        counts.append(f"{ran} {where}{f' ({skipped} skipped)' * bool(skipped)}")
    absent = [] if GPU else ["CUDA (tests marked gpu)"]
    absent.append(f"SpikingJelly {'0.0.0.0.14' if PURE else '2'} ({', '.join(collect_ignore)})")
    terminalreporter.ensure_newline()
    terminalreporter.write_line(f"kernel tests: {', '.join(counts)}")
    terminalreporter.write_line(f"not collected, because absent here: {'; '.join(absent)}")
    if INTERPRETED:
        terminalreporter.write_line(
            "TRITON_INTERPRET=1: the neurons of all other tests ran in the interpreter too, where a"
            " kernel exists"
        )


@pytest.fixture
def recompute_everything() -> Iterator[None]:
    """Layers are recomputed however small they are.

    By default a time step of up to 1024 bytes keeps what autograd saved, and the tensors of most
    tests are that small. Tests that are about recomputation or reversal ask for this fixture; all
    others run with the default settings.
    """
    from snn_revplugin import use_settings

    with use_settings(recompute_min_bytes=0):
        yield


@pytest.fixture(autouse=True)
def _forget_snntorch_neurons() -> Iterator[None]:
    """snnTorch registers every neuron for ever and resets all of them together: a test must not
    reset those of another test."""
    try:
        from snntorch import SpikingNeuron
    except ImportError:
        yield
        return
    known = list(SpikingNeuron.instances)
    yield
    SpikingNeuron.instances[:] = known


@pytest.fixture
def kernels_on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels in the interpreter unless the test is on a GPU; outputs full of NaN."""
    from snn_revplugin import use_settings
    from snn_revplugin.kernels import backend, launch
    from snn_revplugin.kernels import triton_coupled as fused_coupled
    from snn_revplugin.kernels import triton_neuron as fused

    on_gpu = (
        getattr(request.node, "callspec", None) is not None
        and request.node.callspec.params.get("device") == "cuda"
    )
    monkeypatch.setattr(backend, "INTERPRETED", not on_gpu)
    make = launch.empty

    def poisoned(*args: Any) -> Tensor:
        tensor = make(*args)
        return tensor.fill_(0xA5 if tensor.dtype is torch.uint8 else float("nan"))

    for module in (launch, fused, fused_coupled):
        monkeypatch.setattr(module, "empty", poisoned)
    with use_settings(backend="auto"):
        yield


@pytest.fixture
def capability(
    request: pytest.FixtureRequest, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[int]:
    """Triton compiles for this compute capability."""
    from on_kernels import NoDevice
    from triton.runtime.driver import driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    before = driver.active if torch.cuda.is_available() else None
    driver.set_active(NoDevice(request.param))
    yield request.param
    driver.set_active(before)

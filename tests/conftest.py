"""What every test needs: one thread, and the hosts' global registers left as they were found. And
the kernels: with ``TRITON_INTERPRET=1`` in the environment every neuron of the suite that a kernel
can take runs in Triton's interpreter; a line at the end of a run tells what ran where.
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
# other, and a test run beside another one many times its own.
torch.set_num_threads(1)


# For SpikingJelly 2 from their imports on; 0.0.0.0.14 has neither these models, layers and tools
# nor pure transitions.
FOR_SPIKINGJELLY_2 = [
    "test_distributed.py",
    "test_docs.py",
    "test_norms_over_time.py",
    "test_spikingjelly_layers.py",
    "test_spikingjelly_models.py",
    "test_spikingjelly_tools.py",
    "test_suite.py",
    "test_training_setups.py",
]
collect_ignore = [] if PURE else FOR_SPIKINGJELLY_2

AS_USERS_DO = {
    "test_cli",
    "test_docs",
    "test_examples",
    "test_small",
}  # in the settings as they are
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS = {
    "gpu": "on a GPU",
    "interpreter": "in Triton's interpreter",
    "ahead_of_time": "compiled ahead of time",
}  # marker: where its tests run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tell how many tests of the kernels ran where; of those of other processes (pytest-xdist) as
    well."""
    told = []
    for marker, where in KERNELS.items():
        counts = {}
        for outcome in ("passed", "failed", "error", "skipped"):
            reports = terminalreporter.stats.get(outcome, ())
            counts[outcome] = sum(marker in getattr(each, "keywords", ()) for each in reports)
        skipped = counts.pop("skipped")
        told.append(f"{sum(counts.values())} {where}{f' ({skipped} skipped)' * bool(skipped)}")
    terminalreporter.ensure_newline()
    terminalreporter.write_line("kernel tests: " + ", ".join(told))
    if collect_ignore:
        terminalreporter.write_line(
            f"SpikingJelly 0.0.0.0.14, so not collected: {', '.join(collect_ignore)}"
        )
    if INTERPRETED:
        terminalreporter.write_line(
            "TRITON_INTERPRET=1: the neurons of all other tests too, where a kernel could take them"
        )


@pytest.fixture(autouse=True)
def _compute_everything_again(request: pytest.FixtureRequest) -> Iterator[None]:
    """The tensors of these tests are so small that a user's neurons would keep most of them as they
    are."""
    from snn_revplugin import use_settings

    if request.module.__name__ in AS_USERS_DO:
        yield
        return
    with use_settings(recompute_min_bytes=0):
        yield


@pytest.fixture(autouse=True)
def _forget_snntorch_neurons() -> Iterator[None]:
    """snnTorch remembers every neuron for ever and resets all of them at once: a test must not meet
    those of another."""
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

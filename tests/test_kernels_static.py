"""What the kernels are by their own assembly, see ``benchmarks/kernels_static.py``: no GPU is
needed. The bounds are what they were when they were last looked at, rounded up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from on_kernels import COMPILES_BESIDE_THE_INTERPRETER, STATIC

from snn_revplugin.kernels import launch

pytestmark = [pytest.mark.ahead_of_time, COMPILES_BESIDE_THE_INTERPRETER]
TIME_STEPS = 16
ONCE = 12 / TIME_STEPS  # bytes a time step for what a call reads and writes once
# name: bytes a neuron-step, registers, warps on a multiprocessor, barriers
BOUNDS = {
    "LIF, forward of 16 steps": (8.125 + ONCE, 48, 40, 0),
    "LIF, backward of 4 steps": (12.25 + 12 / 4, 48, 40, 1),
    "LIF, backward of 16 steps": (12.5 + ONCE, 88, 20, 1),
    "LIF, backward of 64 steps": (16 + 8 / 8 + 0.5 + ONCE / 4, 64, 32, 2),
    "LIF behind a batch norm, backward of 4 steps": (13 + 12 / 4, 48, 40, 0),
    "LIF with a soft reset, backward of a step": (28.25, 32, 64, 0),
    "Leaky, forward of a step": (16.125, 32, 64, 0),
    "Leaky, backward of charge": (20.25, 32, 64, 0),
    "packing": (4.125, 18, 64, 0),
}


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("name", BOUNDS)
def test_a_kernel_stays_within_its_bounds(name: str) -> None:
    most, registers, warps, barriers = BOUNDS[name]
    static = STATIC["static_of"](name, 90, TIME_STEPS)
    assert static.bytes <= most
    assert static.registers <= registers and static.warps >= warps
    assert static.spills == 0 and static.barriers <= barriers
    assert static.shared == 0, "threads exchange data"
    widest = 8 if static.registers > 48 else 16  # of many registers a thread takes half as many
    assert max(static.vectors["load"]) == widest, "no load is as wide as it could be"


class Started(STATIC["NoDevice"]):
    """A device that is told of launches, and starts none."""

    def __init__(self) -> None:
        super().__init__(90)
        self.launches: list[tuple] = []
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (None, None, 0, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 2**20},
            unload_module=lambda _: None,
        )

    def launcher_cls(self, *_: Any) -> Any:
        return lambda *given: self.launches.append(given)


def test_a_kernel_is_launched_again_without_triton_looking_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once for each kind of arguments: a pointer that is absent or not aligned has its own."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    device, looked_for, run = Started(), [], JITFunction.run
    before = driver.active if torch.cuda.is_available() else None
    monkeypatch.setattr(
        JITFunction, "run", lambda self, *a, **k: looked_for.append(1) or run(self, *a, **k)
    )
    driver.set_active(device)
    try:
        launch.forget_compiled()
        code, bits, ones = launch.kernels(False), torch.zeros(4).byte(), torch.zeros(40)
        for _ in range(3):
            launch.pack(code, ones[:32], bits)
        assert (len(looked_for), len(device.launches)) == (1, 3)
        first, *_, last = device.launches
        assert [type(each) for each in first[9:]] == [type(each) for each in last[9:]]
        assert first[0] == last[0] and first[9] is last[9] and first[10] is last[10]
        launch.pack(code, ones[1:33], bits)  # no vector can be read from here
        assert len(looked_for) == 2
    finally:
        launch.forget_compiled()
        driver.set_active(before)


def test_forward_moves_less_than_spikingjellys() -> None:
    pytest.importorskip("spikingjelly._ops.lif.triton", reason="SpikingJelly before 2 has none")
    ours, theirs = (
        STATIC["static_of"](name, 80, TIME_STEPS)
        for name in ("LIF, forward of 16 steps", "SpikingJelly's LIF, forward of 16 steps")
    )
    assert ours.bytes < 0.75 * theirs.bytes
    assert min(ours.vectors["load"]) > max(theirs.vectors["load"])

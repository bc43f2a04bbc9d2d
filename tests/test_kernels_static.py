"""What the kernels are by their own assembly, see ``benchmarks/kernels_static.py``: no GPU is
needed. The bounds are what they were when they were last looked at, rounded up."""

from __future__ import annotations

from typing import Any

import pytest
from on_kernels import COMPILES_BESIDE_THE_INTERPRETER, STATIC

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


def test_forward_moves_less_than_spikingjellys() -> None:
    pytest.importorskip("spikingjelly._ops.lif.triton", reason="SpikingJelly before 2 has none")
    ours, theirs = (
        STATIC["static_of"](name, 80, TIME_STEPS)
        for name in ("LIF, forward of 16 steps", "SpikingJelly's LIF, forward of 16 steps")
    )
    assert ours.bytes < 0.75 * theirs.bytes
    assert min(ours.vectors["load"]) > max(theirs.vectors["load"])

"""What the kernels are by their own assembly, see ``benchmarks/kernels_static.py``: no GPU is
needed. The bounds are what they were when they were last looked at, rounded up."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from on_kernels import COMPILES_BESIDE_THE_INTERPRETER, STATIC

from snn_revplugin.kernels import launch

triton = pytest.importorskip("triton", reason="Triton is not installed")
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
    "Leaky, backward of fire and charge": (28.25, 32, 64, 0),
    "Leaky, backward of fire and charge, not reversed": (20.25, 32, 64, 0),
    "packing": (4.125, 18, 64, 0),
}
# Triton's releases bring a ptxas each, which shares registers out by its own rules.
MOST_SPILLS = {}
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
    BOUNDS["LIF, backward of 64 steps"] = (16 + 8 / 8 + 0.5 + ONCE / 4, 72, 28, 2)
    MOST_SPILLS["LIF, backward of 16 steps"] = 8


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("name", BOUNDS)
def test_a_kernel_stays_within_its_bounds(name: str) -> None:
    most, registers, warps, barriers = BOUNDS[name]
    static = STATIC["static_of"](name, 90, TIME_STEPS)
    assert static.bytes <= most
    assert static.registers <= registers and static.warps >= warps
    assert static.spills <= MOST_SPILLS.get(name, 0) and static.barriers <= barriers
    assert static.shared == 0, "threads exchange data"
    widest = 8 if static.registers > 48 else 16  # of many registers a thread takes half as many
    assert max(static.vectors["load"]) == widest, "no load is as wide as it could be"


class Started(STATIC["NoDevice"]):
    """A device that is told of launches, and starts none.

    Attributes:
        launches: of each the kernel's binary, its grid, and its arguments: addresses of tensors
            made meanwhile differ, their dtypes do not.
    """

    def __init__(self) -> None:
        super().__init__(90)
        self.launches: list[tuple] = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, *_: (None, hash(binary), 0, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 2**20},
            unload_module=lambda _: None,
        )

    def get_current_device(self) -> int:
        return id(self)  # what another one has loaded is not launched here

    def launcher_cls(self, *_: Any) -> Any:
        def started(*given: Any) -> None:
            programs, _, _, stream, binary, metadata, launch_metadata, enter, _, *arguments = given
            if enter is not None:
                enter(launch_metadata)
            kinds = (each.dtype if isinstance(each, torch.Tensor) else each for each in arguments)
            self.launches.append((programs, stream, binary, metadata, *kinds))

        return started


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    """A device that is told of launches; ``looked_for`` counts those by ``kernel[grid]``."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    device, run = Started(), JITFunction.run
    device.looked_for = 0

    def counted(*args: Any, **options: Any) -> Any:
        device.looked_for += 1
        return run(*args, **options)

    monkeypatch.setattr(JITFunction, "run", counted)
    before = driver.active if torch.cuda.is_available() else None
    driver.set_active(device)
    launch.forget_compiled()
    yield device
    launch.forget_compiled()
    driver.set_active(before)


def launch_variants() -> None:
    """Launches that differ in a dtype, in an alignment, in a pointer that is absent, in a size that
    is one, a multiple of 16 or neither, in a constant, and in the neuron."""
    code, bits, ones = launch.kernels(False), torch.zeros(9).byte(), torch.zeros(80)
    for count in (32, 33, 1):
        for start in (0, 1):
            launch.pack(code, ones[start : count + start], bits)
            launch.pack(code, ones.half()[start : count + start], bits)
            launch.unpack(code, bits[start:], count, torch.bool)
    with torch.no_grad():
        for neuron in (STATIC["leaky"](), STATIC["lif"](v_reset=None), STATIC["lif"]()):
            STATIC["step_forward"](neuron)
            for with_path in (False, True):
                neuron.scan(torch.zeros(2, 64), (torch.zeros(64),), with_path=with_path)
        for part in ("fire", "charge", "both"):
            STATIC["leaky_backward"](part)


def test_a_kernel_is_launched_again_without_triton_looking_for_it(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is the kernel that Triton would have taken, with the same arguments. The launcher of a
    Triton that is not known is left to it."""
    launch_variants()
    first, looked_for = list(started.launches), started.looked_for
    assert len(set(first)) > 20
    started.launches.clear()
    launch_variants()
    assert started.looked_for == looked_for
    assert started.launches == first
    started.launches.clear()
    monkeypatch.setattr(launch, "knows_launcher", lambda: False)
    launch.forget_compiled()
    launch_variants()
    assert started.looked_for == looked_for + len(first)
    assert started.launches == first


def test_a_profilers_hooks_see_every_launch(started: Started) -> None:
    from triton import knobs

    seen: list[str] = []

    def hook(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        for _ in range(3):
            launch.pack(launch.kernels(False), torch.zeros(32), torch.zeros(4).byte())
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert seen == ["pack_kernel"] * 3
    assert started.looked_for == 1


def test_forward_moves_less_than_spikingjellys() -> None:
    pytest.importorskip("spikingjelly._ops.lif.triton", reason="SpikingJelly before 2 has none")
    ours, theirs = (
        STATIC["static_of"](name, 80, TIME_STEPS)
        for name in ("LIF, forward of 16 steps", "SpikingJelly's LIF, forward of 16 steps")
    )
    assert ours.bytes < 0.75 * theirs.bytes
    assert min(ours.vectors["load"]) > max(theirs.vectors["load"])

"""Prints what the kernels are, by their own assembly: no GPU is needed, and nothing is measured.

Run ``python benchmarks/kernels_static.py``. Triton compiles the kernels for a compute capability
ahead of time; its ptxas and nvdisasm say what came of them, for this library's kernels and for
those that SpikingJelly has for the same neuron. The columns:

* bytes: what a neuron moves in a time step, of a call of T steps, if nothing stays in cache. They
  are counted in Triton's intermediate code, masks aside, and contain what is read and written once
  in a call (a potential before and after takes 8 / T);
* registers, and spills: bytes of a thread's registers that did not fit;
* warps: how many of 64 fit on a multiprocessor by registers and shared memory;
* shared: bytes of shared memory of a program; barriers: in its code;
* vectors: the widths in bytes of loads and stores.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snn_revplugin.kernels import launch
from snn_revplugin.kernels.fuse import fuse
from snn_revplugin.kernels.self_test import SampleInputs, take_step
from snn_revplugin.neurons.coupled import Coupled
from snn_revplugin.neurons.integrate_and_fire import LeakyIntegrateAndFire
from snn_revplugin.neurons.leaky import Leaky
from snn_revplugin.neurons.surrogate import Surrogate
from snn_revplugin.neurons.transition import KeptSequence, SequenceGradients, Transition
from snn_revplugin.replay import Normed

NEURONS = 2**14
CHANNELS = 64
WARPS, REGISTERS, SHARED = 64, 2**16, 2**16  # of a multiprocessor; its shared memory at least
ATAN = Surrogate("atan", (2.0,), keeps_dtype=False)
COLUMNS = ("kernel", "bytes", "registers", "spills", "warps", "shared", "barriers", "vectors")


class NoDevice:
    """All that Triton asks of a device when it compiles for one."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # what is compiled is remembered by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiled(capability: int) -> Iterator[list[Any]]:
    """Every launch of a kernel is compiled in this block, and not started. The list grows."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    made, run = [], JITFunction.run
    before = driver.active if torch.cuda.is_available() else None

    def compile_only(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        made.append(run(self, *args, warmup=True, **options))
        return made[-1]

    launch.forget_compiled()
    driver.set_active(NoDevice(capability))
    JITFunction.run = compile_only
    try:
        with torch.no_grad():
            yield made
    finally:
        launch.forget_compiled()
        JITFunction.run = run
        driver.set_active(before)


@dataclass
class Static:
    """What a compiled kernel is, see the head of this file."""

    bytes: float
    registers: int
    spills: int
    warps: int
    shared: int
    barriers: int
    vectors: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, kernel: Any, trips: Iterable[int], steps: int, share: float = 1) -> Static:
        """
        Args:
            kernel: as Triton compiled it.
            trips: how often each of its loops runs, in their order.
            steps: the time steps of a call.
            share: of the widest tensor of a program, the neurons that have one element.
        """
        usage, assembly = _disassembled(kernel.asm["cubin"])
        registers, stack, shared, local = map(
            int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage).groups()
        )
        return cls(
            _bytes_moved(kernel.asm["ttir"], list(trips)) / steps / share,
            registers,
            stack + local,
            _warps(registers, shared, kernel.metadata.num_warps),
            shared,
            len(re.findall(r"\bBAR\.", assembly)),
            {
                name: tuple(sorted({_width(each) for each in re.findall(code, assembly)}))
                for name, code in (("load", r"\bLDG\.E\S*"), ("store", r"\bSTG\.E\S*"))
            },
        )

    def cells(self) -> tuple[str, ...]:
        """The columns after the first."""
        vectors = "; ".join(
            f"{name} {', '.join(map(str, widths))}" for name, widths in self.vectors.items()
        )
        numbers = self.registers, self.spills, self.warps, self.shared, self.barriers
        return f"{self.bytes:.2f}", *map(str, numbers), vectors


def _disassembled(cubin: bytes) -> tuple[str, str]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        commands = (
            [knobs.nvidia.cuobjdump.path, "-res-usage", str(file)],
            [knobs.nvidia.nvdisasm.path, "-c", str(file)],
        )
        usage, assembly = (
            subprocess.run(each, check=True, capture_output=True, text=True).stdout
            for each in commands
        )
    return usage, assembly


def _warps(registers: int, shared: int, warps: int) -> int:
    """How many warps fit on a multiprocessor, in programs of so many warps."""
    programs = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    if shared:
        programs = min(programs, SHARED // shared)
    return min(programs * warps, WARPS)


def _width(code: str) -> int:
    """The bytes of a load or a store in the assembly."""
    for part in code.split("."):
        if part in ("64", "128"):
            return int(part) // 8
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:]) // 8
    return 4


def _bytes_moved(code: str, trips: list[int]) -> float:
    """The bytes that a program moves for each element of its widest tensor."""
    total, widest, weights = 0, 1, [1]
    for line in code.splitlines():
        if "scf.for" in line:
            weights.append(trips.pop(0))
        elif "scf.yield" in line or "scf.if" in line:
            weights = weights if "scf.if" in line or len(weights) == 1 else weights[:-1]
        elif " tt.load " in line or "tt.store " in line:
            found = re.search(r"tensor<([\dx]+)x!tt\.ptr<[a-z]*(\d+)>", line)
            if found is None:  # one number
                continue
            count = 1
            for size in found[1].split("x"):
                count *= int(size)
            widest = max(widest, count)
            total += count * -(-int(found[2]) // 8) * weights[-1]
    return total / widest


# ------------------------------------------------------------------------------------ this library


class BehindNorm(Normed):
    """Inputs that a batch norm gives out, of neurons in channels."""

    def __init__(self, inputs: Tensor) -> None:
        self.input = SampleInputs(inputs)
        self.geometry = NEURONS // CHANNELS, CHANNELS

    def channels(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros(CHANNELS), torch.ones(CHANNELS), torch.zeros(CHANNELS)


def lif(tau: float = 2.0, v_reset: float | None = 0.0) -> Transition:
    """The LIF neuron of most published models."""
    return fuse(LeakyIntegrateAndFire(ATAN, 1.0, v_reset, True, tau=tau), False)


def sequence_forward(neuron: Transition, steps: int) -> None:
    neuron.scan(torch.zeros(steps, NEURONS), (torch.zeros(NEURONS),))


def sequence_backward(neuron: Transition, steps: int, behind_norm: bool = False) -> None:
    x, v = torch.zeros(steps, NEURONS), torch.zeros(NEURONS)
    packed = neuron.plain.scan(x, (v,)).fired
    inputs = BehindNorm(x) if behind_norm else SampleInputs(x)
    kept = KeptSequence((v,), x.dtype, packed=packed, inputs=inputs)
    neuron.vjp_of_scan(kept, SequenceGradients(x, (v,), None), ())


def step_forward(neuron: Transition) -> None:
    neuron.begin(torch.zeros(NEURONS), (torch.zeros(NEURONS),))


def step_backward(neuron: Transition) -> None:
    """A step that is reversed."""
    v = torch.zeros(NEURONS)
    step = take_step(neuron.plain, v, (v,))
    step.reverses = True
    neuron.vjp(step, v, (v,), ())


def leaky() -> Transition:
    numbers = torch.tensor(0.9), torch.tensor(1.0), torch.tensor(1.0)
    return fuse(Leaky(ATAN, *numbers, "subtract", graded=False), False)


def leaky_backward(part: str, reverses: bool = True) -> None:
    neuron, v, needed = leaky(), torch.zeros(NEURONS), (False,) * 3
    step = take_step(neuron.plain, v, (v,))
    step.reverses = reverses
    if part == "fire":
        neuron.vjp_of_fire(step, v, needed)
    elif part == "charge":
        neuron.vjp_of_charge(step, (v,), needed)
    else:
        neuron.vjp(step, v, (v,), needed)


def coupled_forward(steps: int) -> None:
    neuron = fuse(Coupled(split_dim=-1, surrogate=ATAN), False)
    neuron.scan(torch.zeros(steps, 2 * NEURONS), (torch.zeros(2 * NEURONS),))


def coupled_backward(steps: int) -> None:
    neuron = fuse(Coupled(split_dim=-1, surrogate=ATAN), False)
    y, v = torch.zeros(steps, 2 * NEURONS), torch.zeros(2 * NEURONS)
    packed = neuron.plain.scan(y, (v,)).fired
    kept = KeptSequence((v,), y.dtype, packed=packed, outputs=y)
    neuron.vjp_of_scan(kept, SequenceGradients(y, (v,), None), ())


def packing() -> None:
    launch.pack(launch.kernels(False), torch.zeros(NEURONS), torch.zeros(NEURONS // 8).byte())


def unpacking() -> None:
    launch.unpack(launch.kernels(False), torch.zeros(NEURONS // 8).byte(), NEURONS, torch.float32)


# ------------------------------------------------------------------------------------- SpikingJelly


def spikingjelly_forward(steps: int) -> None:
    from spikingjelly._ops.lif.triton import _forward_kernel

    x, v = torch.zeros(steps, NEURONS), torch.zeros(NEURONS)
    _forward_kernel[(1,)](
        x, v, x, v, x, steps, NEURONS, 2.0, 1.0, 0.0, True, False, False, 256, None,
        enable_fp_fusion=False,
    )  # fmt: skip


def spikingjelly_backward(steps: int) -> None:
    from spikingjelly._ops.lif.triton import _backward_kernel

    x, v = torch.zeros(steps, NEURONS), torch.zeros(NEURONS)
    _backward_kernel[(1,)](
        x, v, x, x, v, steps, NEURONS, 2.0, 1.0, 0.0, 2.0, True, False, True, 1, False, 1, 256,
        None, enable_fp_fusion=False,
    )  # fmt: skip


def cases(steps: int) -> dict[str, tuple[Any, list[int], int, float]]:
    """By name: what launches a kernel; how often its loops run; its time steps; its share."""
    long = 4 * steps
    stretches = long // launch.STRETCH
    return {
        f"LIF, forward of {steps} steps": (
            lambda: sequence_forward(lif(), steps), [steps], steps, 1,
        ),
        f"LIF of tau 1.7, forward of {steps} steps": (
            lambda: sequence_forward(lif(1.7), steps), [steps], steps, 1,
        ),
        f"SpikingJelly's LIF, forward of {steps} steps": (
            lambda: spikingjelly_forward(steps), [steps], steps, 1,
        ),
        "LIF, backward of 4 steps": (lambda: sequence_backward(lif(), 4), [], 4, 1),
        "LIF of tau 1.7, backward of 4 steps": (lambda: sequence_backward(lif(1.7), 4), [], 4, 1),
        f"LIF, backward of {steps} steps": (
            lambda: sequence_backward(lif(), steps), [], steps, 1,
        ),
        f"LIF, backward of {long} steps": (
            lambda: sequence_backward(lif(), long), [stretches - 1, stretches], long, 1,
        ),
        "LIF behind a batch norm, backward of 4 steps": (
            lambda: sequence_backward(lif(), 4, behind_norm=True), [], 4, 1,
        ),
        f"SpikingJelly's LIF, backward of {steps} steps": (
            lambda: spikingjelly_backward(steps), [steps], steps, 1,
        ),
        "LIF with a soft reset, forward of a step": (
            lambda: step_forward(lif(v_reset=None)), [1], 1, 1,
        ),
        "LIF with a soft reset, backward of a step": (
            lambda: step_backward(lif(v_reset=None)), [], 1, 1,
        ),
        "Leaky, forward of a step": (lambda: step_forward(leaky()), [1], 1, 1),
        "Leaky, backward of fire and charge": (lambda: leaky_backward("both"), [], 1, 1),
        "Leaky, backward of fire and charge, not reversed": (
            lambda: leaky_backward("both", reverses=False), [], 1, 1,
        ),
        "Leaky, backward of fire": (lambda: leaky_backward("fire"), [], 1, 1),
        "Leaky, backward of charge": (lambda: leaky_backward("charge"), [], 1, 1),
        f"coupled, forward of {steps} steps": (lambda: coupled_forward(steps), [steps], steps, 2),
        f"coupled, backward of {steps} steps": (
            lambda: coupled_backward(steps), [steps, steps], steps, 2,
        ),
        "packing": (packing, [], 1, 1),
        "unpacking": (unpacking, [], 1, 1),
    }  # fmt: skip


def static_of(name: str, capability: int, steps: int = 16) -> Static:
    """What a kernel is, of those in :func:`cases`."""
    run, trips, of_steps, share = cases(steps)[name]
    with compiled(capability) as made:
        run()
    (kernel,) = made
    return Static.of(kernel, trips, of_steps, share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--capability", type=int, default=90, help="80 is an A100, 90 an H100")
    parser.add_argument("--time-steps", type=int, default=launch.AT_ONCE)
    options = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for name in cases(options.time_steps):
        cells = static_of(name, options.capability, options.time_steps).cells()
        print(f"| {' | '.join((name, *cells))} |", flush=True)


if __name__ == "__main__":
    main()

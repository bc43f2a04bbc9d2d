"""A kernel shows what it can before it is trusted: on a small sample, beside the plain torch code,
on the device at hand.

Spikes and potentials have to have the same bits, gradients have to agree to rounding. It happens
once in a process for each :class:`.form.Form` of a neuron and each device, at the neuron's first
call; what fails is computed by the plain code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..neurons.coupled import Coupled
from ..settings import use_settings
from ..torch_internals import backward_pass
from .kernel_spec import KernelSpec, spec_of

if TYPE_CHECKING:
    from ..neurons.transition import Dynamics

    Equations = Dynamics | Coupled

STEPS = 5
# of the sample's dimensions where a parameter does not say: even, but no multiple of a byte's bits
WIDTH = 38
ROWS = 29  # together with WIDTH more than one program's share of a launch
ROUNDING = {
    torch.float32: 1e-4
}  # largest difference of gradients, in units of the largest gradient
ROUNDING_OF_SHORT = (
    0.1  # the plain code rounds to the short dtype after every operation, a kernel once
)
CAPTURING = (
    "a CUDA graph is being captured, and its kernel has not been tried out yet: take a training"
    " step before"
)
IN_BACKWARD = "its kernel has not been tried out yet, and is not in backward"
NOT_YET = CAPTURING, IN_BACKWARD  # the next call may find otherwise

_verdicts: dict[tuple[KernelSpec | str, torch.device], str | None] = {}


def failure(dynamics: Equations, current: Tensor, potential: Tensor) -> str | None:
    """What is wrong with the kernels of these dynamics on this device, or None if they have passed.

    Args:
        dynamics: of a kind that :func:`.form.why_none` has nothing against.
        current, potential: the tensors of a call; their dtypes and device count, and whether they
            are CUDA's.
    """
    spec = spec_of(dynamics, current.dtype, potential.dtype, current.is_cuda)
    return _verdict(
        (spec, current.device),
        lambda: _compare(dynamics, current.dtype, potential.dtype, current.device),
    )


def packing_failure(device: torch.device) -> str | None:
    """What is wrong with packing and unpacking spikes by kernels on this device, or None."""
    return _verdict(("packing", device), lambda: _compare_packing(device))


def _verdict(
    key: tuple[KernelSpec | str, torch.device], compare: Callable[[], str | None]
) -> str | None:
    if key not in _verdicts:
        if key[1].type == "cuda" and torch.cuda.is_current_stream_capturing():
            return CAPTURING
        if _is_below_autograd() and backward_pass.current_pass() != backward_pass.NO_PASS:
            return IN_BACKWARD
        try:
            _verdicts[key] = _above_autograd(compare)
        # a driver, a compiler or a device that Triton cannot deal with: the plain code can
        except Exception as error:
            _verdicts[key] = (
                f"the kernel failed on {key[1]}: {type(error).__name__}:"
                f" {str(error).partition(chr(10))[0]}"
            )
    return _verdicts[key]


def _is_below_autograd() -> bool:
    """Whether no operation is recorded, as in the operators of :mod:`snn_revplugin.operators`."""
    with torch.enable_grad():
        return not (torch.ones((), requires_grad=True) * 1).requires_grad


def _above_autograd(compare: Callable[[], str | None]) -> str | None:
    """What is compared, where its operations are recorded: in a thread of its own, if they are not
    in this one."""
    if not _is_below_autograd():
        return compare()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(compare).result()


def _compare(
    dynamics: Equations, current: torch.dtype, potential: torch.dtype, device: torch.device
) -> str | None:
    given = {each.name: getattr(dynamics, each.name) for each in fields(dynamics)}
    leaves = {
        name: each.detach().clone().requires_grad_(each.requires_grad)
        for name, each in given.items()
        if isinstance(each, Tensor)
    }
    dynamics = replace(
        dynamics, **leaves, **({"split_dim": 1} if isinstance(dynamics, Coupled) else {})
    )
    learned = [each for each in dynamics.parameters if each.requires_grad]
    shape = (
        ROWS,
        *(
            WIDTH if n == 1 else n
            for n in torch.broadcast_shapes((1,), *(each.shape for each in leaves.values()))
        ),
    )
    drawn = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        return (torch.randn(shape, generator=drawn) + 0.4).to(device, dtype)

    data, start = draw(STEPS, *shape, dtype=current), draw(*shape, dtype=potential).requires_grad_()
    weight = torch.full((1, 1), 1.5, dtype=current, device=device, requires_grad=True)
    upwards = [draw(*shape, dtype=torch.float32) for _ in range(STEPS + 1)]
    rounding = (
        ROUNDING.get(current, ROUNDING_OF_SHORT) if current == potential else ROUNDING_OF_SHORT
    )
    looks_back = not isinstance(dynamics, Coupled) and dynamics.reset_needs_signal
    ways = ("single steps",) if looks_back else ("single steps", "a sequence")
    for way in ways:
        results = []
        for backend in ("torch", "triton"):
            with use_settings(backend=backend), _recording(device.type):
                outputs = _outputs(way, dynamics, data, weight, start)
                loss = sum(
                    (each.float() * up).sum() for each, up in zip(outputs, upwards, strict=True)
                )
                leaves = [weight, start, *learned]
                results.append((outputs, torch.autograd.grad(loss, leaves, allow_unused=True)))
        (outputs, gradients), (ours, our_gradients) = results
        if not all(map(_same_bits, outputs, ours)):
            return (
                f"the kernel's spikes or potentials differ from the plain code's on {device}"
                f" ({way})"
            )
        if not all(_close(a, b, rounding) for a, b in zip(gradients, our_gradients, strict=True)):
            return f"the kernel's gradients differ from the plain code's on {device} ({way})"
    return None


def _outputs(
    way: str, dynamics: Equations, data: Tensor, weight: Tensor, start: Tensor
) -> list[Tensor]:
    """The spikes of every step and the last potential. The currents come from a layer, so that time
    can be reversed."""
    from ..bptt.coupled_sequence import coupled_sequence
    from ..bptt.coupled_step import coupled_step
    from ..bptt.record import NeuronRecord
    from ..bptt.sequence import sequence
    from ..bptt.step import step

    def layer(given: Tensor) -> Tensor:
        return torch.nn.functional.linear(given.reshape(-1, 1), weight).view(given.shape)

    record, is_coupled = NeuronRecord(), isinstance(dynamics, Coupled)
    if way == "a sequence":
        spikes, last, *_ = (coupled_sequence if is_coupled else sequence)(
            dynamics, layer(data), start, record
        )
        return [*spikes.unbind(0), last]
    spikes_of, v = [], start
    for x in data:
        spikes, v = (coupled_step if is_coupled else step)(dynamics, layer(x), v, record)
        spikes_of.append(spikes)
    return [*spikes_of, v]


@contextmanager
def _recording(device_type: str) -> Iterator[None]:
    """Gradients on and autocast off, whatever the caller's surroundings."""
    with torch.enable_grad(), torch.autocast(device_type, enabled=False):
        yield


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.stride() == b.stride()
        and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


def _close(a: Tensor | None, b: Tensor | None, rounding: float) -> bool:
    if a is None or b is None:
        return a is b
    largest = a.abs().max().item()
    return not math.isfinite(largest) or torch.allclose(
        a.float(), b.float(), rtol=0, atol=rounding * largest, equal_nan=True
    )


def _compare_packing(device: torch.device) -> str | None:
    from ..packed.spikes import PackedSpikes

    fired = torch.rand(ROWS * WIDTH * 9, generator=torch.Generator().manual_seed(0)).lt(0.3)
    with use_settings(backend="triton"):
        packed = PackedSpikes(fired.to(device))
        same = torch.equal(packed.bits.cpu(), PackedSpikes(fired).bits) and torch.equal(
            packed.binary().cpu(), fired.float()
        )
    return None if same else f"the kernel's packed spikes differ from the plain code's on {device}"

"""What a fused kernel has to know of a neuron when it is compiled. Each neuron describes itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

ROUNDINGS = (
    "left",
    "decayed",
    "summed",
    "due",
    "charged",
    "difference_before",
    "difference",
    "spikes",
    "product",
    "after",
)


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """The constants of a compilation. A dtype is a ``torch.dtype`` here and Triton's in the kernel.

    Attributes:
        charge: "leaky" (snnTorch), "integrate" (IF), "decay_input" or "decay" (LIF with and without
            ``decay_input``), "coupled".
        reset: "subtract", "zero", "none" (snnTorch), "soft", "hard" (SpikingJelly).
        delayed: whether the reset waits for the next charge.
        detached: whether the reset carries no gradient.
        surrogate: the name of a surrogate with a derivative in closed form.
        strict: whether a potential on the threshold stays silent.
        graded: whether spikes are multiplied by a factor.
        divides: whether a leak divides by tau; otherwise it multiplies with a rate.
        rests: whether the leak's rest is other than zero.
        to_zero: whether a hard reset goes to zero.
        on_cuda: whose rules the host's arithmetic follows where torch's differ between devices.
        decay_held, threshold_held, factor_held: as a "number", a "scalar" in memory, or "each"
            neuron's own.
        left, decayed, summed, due, charged, difference_before, difference, spikes, product, after:
            dtypes of intermediate results, in the order in which they come.
    """

    charge: str
    reset: str
    delayed: bool = False
    detached: bool
    surrogate: str
    strict: bool
    graded: bool = False
    divides: bool = False
    rests: bool = False
    to_zero: bool = True
    on_cuda: bool
    decay_held: str = "number"
    threshold_held: str = "number"
    factor_held: str = "number"
    left: Any
    decayed: Any
    summed: Any
    due: Any
    charged: Any
    difference_before: Any
    difference: Any
    spikes: Any
    product: Any
    after: Any


class KernelNumbers(NamedTuple):
    """The numbers of a neuron with one state, as its kernel takes them: Python's, or tensors that
    broadcast with the current. The neuron's ``parameters`` stand in the order of the first three.
    """

    decay: Tensor | float
    threshold: Tensor | float
    factor: Tensor | float = 1.0
    v_reset: float = 0.0
    rest: float = 0.0

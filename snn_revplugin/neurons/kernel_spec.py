"""What a fused kernel has to know of a neuron when it is compiled. Each neuron describes itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .surrogate import Surrogate

if TYPE_CHECKING:
    from .transition import States, Transition

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
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


def why_not_described(neuron: Transition) -> str | None:
    """Why a neuron's class has no kernel, or None. A subclass may have equations of its own: it
    inherits no kernel, and describes itself by ``kernel_spec`` or ``charge_spec``."""
    own = vars(type(neuron))
    if "kernel_spec" in own or "charge_spec" in own:
        return None
    return f"there is no kernel for {type(neuron).__name__}"


def why_tensors_need_plain_code(neuron: Transition, x: Tensor, states: States) -> str | None:
    """Why the class, the surrogate, the dtypes or the devices of a call suit no kernel, or None."""
    reason = why_not_described(neuron)
    if reason is not None:
        return reason
    if not isinstance(neuron.surrogate, Surrogate):
        return "the surrogate is a function of the user's"
    for each in (x, *states, *neuron.parameters):
        if each.dtype not in KERNEL_DTYPES:
            return f"there is no kernel for {str(each.dtype).removeprefix('torch.')}"
        if each.device != x.device:
            return f"tensors are on two devices, {each.device} and {x.device}"
    return None


def why_dtypes_differ(
    neuron: Transition, x: Tensor, states: States, keeps_dtype: bool
) -> str | None:
    """Why no kernel of a neuron that computes in one dtype takes these tensors, or None."""
    dtypes = {each.dtype for each in (x, *states, *neuron.parameters)}
    if len(dtypes) > 1 or not (keeps_dtype or dtypes == {torch.float32}):
        return "current, potential and spikes are of several dtypes"
    return None

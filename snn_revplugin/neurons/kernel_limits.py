"""What no fused kernel takes: classes, surrogates, dtypes and devices, each with the reason."""

from __future__ import annotations

import torch
from torch import Tensor

from .surrogate import Surrogate
from .transition import States, Transition

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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

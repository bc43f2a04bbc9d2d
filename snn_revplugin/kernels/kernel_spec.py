"""What a kernel has to know of a neuron when it is compiled, read off its dynamics. No Triton in
here.

The dtypes that torch would give to intermediate results are a part of that: snnTorch's resets are
float32 next to a float16 potential, say, and so is the potential from its second step on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..neurons.coupled import Coupled
from ..neurons.integrate_and_fire import (
    IntegrateAndFire,
    LeakyIntegrateAndFire,
    ParametricLeakyIntegrateAndFire,
)
from ..neurons.leaky import Leaky
from ..neurons.surrogate import Surrogate
from ..neurons.transition import Dynamics

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHARGES = {
    Leaky: "leaky",
    IntegrateAndFire: "integrate",
    LeakyIntegrateAndFire: "decay",
    ParametricLeakyIntegrateAndFire: "decay",
    Coupled: "coupled",
}

# The surrogates that kernels know, and the constants that their derivatives are made of, from the
# parameters of snn_revplugin.surrogate.GRADIENTS; up to three.
SURROGATES: dict[str, Callable[..., tuple[float, ...]]] = {
    "atan": lambda alpha: (math.pi / 2 * math.sqrt(2 * alpha), 2 / alpha),
    "straight_through": lambda: (),
    "fast_sigmoid": lambda slope: (slope,),
    "triangular": lambda threshold: (threshold,),
    "heaviside": lambda: (),
    "sigmoid_of_exp": lambda slope: (slope,),
    "spike_rate_escape": lambda beta, slope: (beta, slope),
    "sparse_fast_sigmoid": lambda slope, B: (slope, B),
    "piecewise_quadratic": lambda alpha: (alpha, alpha**2, 1 / alpha),
    "piecewise_exp": lambda alpha: (alpha, alpha / 2),
    "sigmoid": lambda alpha: (alpha,),
    "soft_sign": lambda alpha: (1 / alpha, 2 * alpha),
    "super_spike": lambda alpha: (alpha,),
    "nonzero_sign_log_abs": lambda alpha: (1 / alpha,),
    "erf": lambda alpha: (alpha, alpha / math.sqrt(math.pi)),
    "piecewise_leaky_relu": lambda w, c: (w, 1 / (2 * w), c),
    "s2nn": lambda alpha, beta: (alpha, beta),
    "q_pseudo_spike": lambda alpha: (2 / (alpha - 1), alpha),
    "leaky_k_relu": lambda leak, k: (leak, k),
    "fake_numerical_gradient": lambda alpha: (alpha,),
    "log_tailed_relu": lambda alpha: (alpha,),
    "rect": lambda alpha: (alpha, 0.5 / alpha),
}
# Those whose derivative jumps somewhere, and so must be taken at the very potential of the first
# time.
JUMPING = frozenset(
    (
        "triangular",
        "heaviside",
        "sparse_fast_sigmoid",
        "piecewise_leaky_relu",
        "s2nn",
        "leaky_k_relu",
        "rect",
        "fake_numerical_gradient",
        "log_tailed_relu",
    )
)
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


@dataclass(frozen=True)
class KernelSpec:
    """The constants of a compilation. A dtype is a ``torch.dtype`` here and Triton's in the kernel.

    Attributes:
        charge: "leaky" (snnTorch), "integrate" (IF), "decay_input" or "decay" (LIF with and without
            ``decay_input``), "coupled".
        reset: "subtract", "zero", "none" (snnTorch), "soft", "hard" (SpikingJelly).
        delayed: whether the reset waits for the next charge.
        detached: whether the reset carries no gradient.
        surrogate: a key of :data:`SURROGATES`.
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
    delayed: bool
    detached: bool
    surrogate: str
    strict: bool
    graded: bool
    divides: bool
    rests: bool
    to_zero: bool
    on_cuda: bool
    decay_held: str
    threshold_held: str
    factor_held: str
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


def why_no_kernel(dynamics: Dynamics | Coupled, current: Tensor, potential: Tensor) -> str | None:
    """Why no kernel can take these dynamics, or None if one can."""
    if type(dynamics) not in CHARGES:
        return f"there is no kernel for {type(dynamics).__name__}"
    if isinstance(dynamics, IntegrateAndFire) and (
        dynamics.in_parts or getattr(dynamics, "multiplies", False)
    ):
        return "there is no kernel for the arithmetic of this release of the host"
    surrogate = dynamics.surrogate
    if not isinstance(surrogate, Surrogate):
        return "the surrogate is a function of the user's"
    if surrogate.name not in SURROGATES:
        return f"there is no kernel for the surrogate {surrogate.name!r}"
    for each in (current, potential, *dynamics.parameters):
        if each.dtype not in DTYPES:
            return f"there is no kernel for {str(each.dtype).removeprefix('torch.')}"
        if each.device != current.device:
            return f"tensors are on two devices, {each.device} and {current.device}"
    if not isinstance(dynamics, Leaky):
        one = {each.dtype for each in (current, potential, *dynamics.parameters)}
        keeps_dtype = surrogate.keeps_dtype or isinstance(dynamics, Coupled)
        if len(one) > 1 or not (keeps_dtype or one == {torch.float32}):
            return "current, potential and spikes are of several dtypes"
    return None


def spec_of(
    dynamics: Dynamics | Coupled, current: torch.dtype, potential: torch.dtype, on_cuda: bool
) -> KernelSpec:
    """The form of dynamics that :func:`why_none` has nothing against, for a current and a potential
    of these dtypes."""
    surrogate = dynamics.surrogate
    common = {"surrogate": surrogate.name, "strict": surrogate.strict, "on_cuda": on_cuda}
    if not isinstance(dynamics, Leaky):
        leaks, parametric = (
            isinstance(dynamics, LeakyIntegrateAndFire),
            isinstance(dynamics, ParametricLeakyIntegrateAndFire),
        )
        charge = CHARGES[type(dynamics)]
        return KernelSpec(
            charge="decay_input" if leaks and dynamics.decay_input else charge,
            reset="soft" if dynamics.v_reset is None else "hard",
            delayed=False,
            detached=dynamics.detach_reset,
            graded=False,
            # torch divides by a number on a CPU; on CUDA it multiplies with the reciprocal, where
            # dynamics.py lets it
            divides=leaks and not parametric and not (on_cuda and current is not torch.float32),
            rests=leaks and bool(dynamics.rest),
            to_zero=not dynamics.v_reset,
            decay_held="scalar" if parametric else "number",
            threshold_held="number",
            factor_held="number",
            **dict.fromkeys(ROUNDINGS, current),
            **common,
        )

    def meets(dtype: torch.dtype, parameter: Tensor) -> torch.dtype:
        return torch.promote_types(dtype, parameter.dtype) if parameter.dim() else dtype

    def held(parameter: Tensor) -> str:
        return "scalar" if parameter.numel() == 1 else "each"

    beta, threshold, factor = dynamics.parameters
    reset, together = dynamics.reset_kind, torch.promote_types
    reset_signal = potential if surrogate.keeps_dtype else torch.float32
    left = together(reset_signal, potential) if reset == "zero" else potential
    decayed = meets(left, beta)
    summed = together(decayed, current)
    due = meets(reset_signal, threshold)
    charged = together(summed, due) if reset == "subtract" else summed
    fired = charged if surrogate.keeps_dtype else torch.float32
    spikes = meets(fired, factor)
    still_due = together(spikes, reset_signal)
    product = meets(still_due, threshold) if reset == "subtract" else together(still_due, charged)
    return KernelSpec(
        charge="leaky",
        reset=reset,
        delayed=dynamics.delayed,
        detached=dynamics.delayed,
        graded=dynamics.graded,
        divides=False,
        rests=False,
        to_zero=True,
        decay_held=held(beta),
        threshold_held=held(threshold),
        factor_held=held(factor) if dynamics.graded else "number",
        left=left,
        decayed=decayed,
        summed=summed,
        due=due,
        charged=charged,
        difference_before=meets(potential, threshold),
        difference=meets(charged, threshold),
        spikes=spikes if dynamics.graded else fired,
        product=product,
        after=together(charged, product) if dynamics.reset_needs_signal else charged,
        **common,
    )

"""The surrogates whose derivatives the kernels compute, and the constants of these."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..neurons.surrogate import Surrogate

# Up to three constants, from the parameters in ..neurons.surrogate.GRADIENTS.
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


def why_no_derivative(surrogate: Surrogate) -> str | None:
    """Why no kernel computes a surrogate's derivative, or None."""
    if surrogate.name in SURROGATES:
        return None
    return f"there is no kernel for the surrogate {surrogate.name!r}"

"""Surrogate gradients: the Heaviside step that fires, and the smooth derivative that stands in for its own.

A neuron fires where ``z = h - threshold`` is positive: ``z > 0`` in snnTorch, ``z >= 0`` in SpikingJelly. The derivative
of that step is zero or infinite, so training uses the derivative of a smooth function in its place. ``DERIVATIVES``
holds those of both hosts that have a closed form, written as the host writes them, so that gradients agree to rounding.

Sources: Neftci, Mostafa, Zenke, 'Surrogate Gradient Learning in Spiking Neural Networks' (2019);
``snntorch.surrogate``; ``spikingjelly.activation_based.surrogate``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _squarewave(z: Tensor, n: int, T_period: float) -> Tensor:
    w = 2 * math.pi / T_period
    return sum((torch.cos((2 * i - 1) * w * z) for i in range(1, n)), torch.zeros_like(z)) * (4 / T_period)


def _log_tailed_relu(z: Tensor, alpha: float) -> Tensor:
    return torch.where(z > 1, 1 / z, torch.where(z <= 0, alpha, 1.0))


DERIVATIVES: dict[str, Callable[..., Tensor]] = {
    # of both hosts; ``slope`` is snnTorch's name for alpha
    "atan": lambda z, alpha: alpha / 2 / (1 + (math.pi / 2 * alpha * z).square_()),
    "straight_through": lambda z: torch.ones_like(z),
    # snntorch.surrogate
    "fast_sigmoid": lambda z, slope: 1 / (slope * z.abs() + 1.0).square_(),
    "triangular": lambda z, threshold: torch.where(z >= 0, -threshold, threshold).to(z.dtype),
    "heaviside": lambda z: (z > 0).to(z.dtype),
    "sigmoid_of_exp": lambda z, slope: slope * torch.exp(-slope * z) / (torch.exp(-slope * z) + 1) ** 2,
    "spike_rate_escape": lambda z, beta, slope: slope * torch.exp(-beta * (z - 1).abs()),
    "sparse_fast_sigmoid": lambda z, slope, B: (z > B).to(z.dtype) / (slope * z.abs() + 1.0).square_(),
    # spikingjelly.activation_based.surrogate
    "piecewise_quadratic": lambda z, alpha: (alpha - alpha**2 * z.abs()).masked_fill_(z.abs() > 1 / alpha, 0),
    "piecewise_exp": lambda z, alpha: alpha / 2 * torch.exp(-alpha * z.abs()),
    "sigmoid": lambda z, alpha: (s := torch.sigmoid(alpha * z)).neg().add_(1).mul_(s).mul_(alpha),
    "soft_sign": lambda z, alpha: 1 / (2 * alpha * (1 / alpha + z.abs()).square_()),
    "super_spike": lambda z, alpha: alpha / (z.abs() + 1).square_(),
    "nonzero_sign_log_abs": lambda z, alpha: 1 / (1 / alpha + z.abs()),
    "erf": lambda z, alpha: torch.exp(-((alpha * z).square_())) * (alpha / math.sqrt(math.pi)),
    "piecewise_leaky_relu": lambda z, w, c: torch.where(z.abs() < w, 1 / (2 * w), c).to(z.dtype),
    "squarewave_fourier_series": _squarewave,
    "s2nn": lambda z, alpha, beta: torch.where(
        z < 0, alpha * (s := torch.sigmoid(alpha * z)) * (1 - s), beta / (z + 1)
    ),
    "q_pseudo_spike": lambda z, alpha: (1 + 2 / (alpha - 1) * z.abs()).pow_(-alpha),
    "leaky_k_relu": lambda z, leak, k: torch.where(z >= 0, k, leak).to(z.dtype),
    "fake_numerical_gradient": lambda z, alpha: torch.clamp_max(((z >= 0) * 2.0 - 1.0) / z, alpha),
    "log_tailed_relu": _log_tailed_relu,
    "rect": lambda z, alpha: alpha * (z.abs() < 0.5 / alpha).to(z.dtype),
}


@dataclass(frozen=True, slots=True)
class Surrogate:
    """A Heaviside step with a surrogate derivative in closed form.

    Args:
        name: a key of ``DERIVATIVES``.
        parameters: the arguments of that derivative after ``z``, in order.
        strict: whether a membrane exactly at the threshold stays silent (``z > 0``, snnTorch) or fires
            (``z >= 0``, SpikingJelly).

    Raises:
        ValueError: ``name`` is not in ``DERIVATIVES``.

    >>> import torch
    >>> atan = Surrogate("atan", (2.0,), strict=False)
    >>> atan.fires(torch.tensor([-0.1, 0.0, 0.1]))
    tensor([False,  True,  True])
    >>> atan.gradient(torch.ones(1), torch.zeros(1))
    tensor([1.])
    """

    name: str
    parameters: tuple[float, ...] = ()
    strict: bool = True

    differentiable = True  # whether spikes carry a gradient at all

    def __post_init__(self) -> None:
        if self.name not in DERIVATIVES:
            raise ValueError(f"name: unknown surrogate {self.name!r}, expected one of {sorted(DERIVATIVES)}")

    def fires(self, z: Tensor) -> Tensor:
        """Where the neuron fires, as a bool tensor of ``z``'s shape."""
        return z > 0 if self.strict else z >= 0

    def gradient(self, grad: Tensor, z: Tensor) -> Tensor:
        """The gradient at ``z`` that the gradient ``grad`` at the spikes makes; a new tensor."""
        return DERIVATIVES[self.name](z, *self.parameters) * grad


@dataclass(frozen=True, slots=True)
class DifferentiatedSurrogate:
    """A Heaviside step whose derivative is had from a function of the user's by autograd.

    Args:
        function: takes ``z`` to spikes and carries a gradient of its own, say through an autograd Function.
        strict: as in :class:`Surrogate`; see :func:`step_of`.
        differentiable: whether the function's spikes carry a gradient at all.
    """

    function: Callable[[Tensor], Tensor]
    strict: bool
    differentiable: bool = True

    def fires(self, z: Tensor) -> Tensor:
        """Where the neuron fires, as a bool tensor of ``z``'s shape."""
        return z > 0 if self.strict else z >= 0

    def gradient(self, grad: Tensor, z: Tensor) -> Tensor:
        """The gradient at ``z`` that the gradient ``grad`` at the spikes makes; a new tensor."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            spikes = self.function(z)
            return torch.autograd.grad(spikes, z, grad.to(spikes.dtype))[0]


AnySurrogate = Surrogate | DifferentiatedSurrogate


def surrogate_of(function: Callable[[Tensor], Tensor]) -> DifferentiatedSurrogate | None:
    """A user's own spike function as a surrogate, judged by a handful of points around its step.

    Returns:
        None if the function is not the Heaviside step, ``z > 0`` or ``z >= 0``: graded, random or smooth spikes do not fit
        in one bit.
    """
    points = torch.tensor([-1e4, -2.0, -0.5, -1e-3, -1e-30, 0.0, 1e-30, 1e-3, 0.5, 2.0, 1e4])
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        try:
            spikes = function(points.clone().requires_grad_())
        except Exception:  # whatever a user's function raises on these points, it is not the plain step
            return None
    if not isinstance(spikes, Tensor) or spikes.shape != points.shape:
        return None
    for strict, fired in ((True, points > 0), (False, points >= 0)):
        if torch.equal(spikes, fired.to(spikes.dtype)):
            return DifferentiatedSurrogate(function, strict, spikes.requires_grad)
    return None

"""Surrogate gradients: the Heaviside step that fires, and the smooth derivative that stands in for
its own.

A neuron fires where ``z = h - threshold`` is positive: ``z > 0`` in snnTorch, ``z >= 0`` in
SpikingJelly. The derivative of that step is zero or infinite, so training uses the derivative of a
smooth function in its place. ``GRADIENTS`` holds those of both hosts that have a closed form,
written as the host writes them, so that gradients agree to rounding.

Sources: Neftci, Mostafa, Zenke, 'Surrogate Gradient Learning in Spiking Neural Networks' (2019);
``snntorch.surrogate``; ``spikingjelly.activation_based.surrogate``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..torch_internals import graph


def _atan(grad: Tensor, z: Tensor, alpha: float) -> Tensor:
    # alpha/2 / (1 + (pi alpha z / 2)**2), with alpha/2 drawn into the denominator,
    # in operations that give the bits of the host
    return (
        z.mul_(math.pi / 2 * math.sqrt(2 * alpha))
        .square_()
        .add_(2 / alpha)
        .reciprocal_()
        .mul_(grad)
    )


def _sigmoid(grad: Tensor, z: Tensor, alpha: float) -> Tensor:
    s = z.mul_(alpha).sigmoid_()
    return (1 - s).mul_(s).mul_(alpha).mul_(grad)


def _exp_of_sigmoid(grad: Tensor, z: Tensor, slope: float) -> Tensor:
    e = z.mul_(
        -slope
    ).exp_()  # overflows far below the threshold, and the gradient is NaN there: the host's is too
    return grad * slope * e / (e + 1) ** 2


def _squarewave(grad: Tensor, z: Tensor, n: int, T_period: float) -> Tensor:
    w = 2 * math.pi / T_period
    waves = sum((torch.cos((2 * i - 1) * w * z) for i in range(1, int(n))), torch.zeros_like(z))
    return waves * (4 / T_period) * grad


def _s2nn(grad: Tensor, z: Tensor, alpha: float, beta: float) -> Tensor:
    s = torch.sigmoid(alpha * z)
    return torch.where(z < 0, alpha * s * (1 - s), beta / (z + 1)) * grad


def _either(condition: Tensor, a: float, b: float, z: Tensor) -> Tensor:
    """``a`` where the condition holds, else ``b``, in ``z``'s dtype."""
    return torch.where(condition, z.new_tensor(a), z.new_tensor(b))


def _log_tailed_relu(grad: Tensor, z: Tensor, alpha: float) -> Tensor:
    return torch.where(z > 1, 1 / z, _either(z <= 0, alpha, 1.0, z)) * grad


# Each takes the gradient at the spikes and z, and gives the gradient at z. It may write into z, and
# never into the gradient.
GRADIENTS: dict[str, Callable[..., Tensor]] = {
    # of both hosts
    "atan": _atan,
    "straight_through": lambda grad, z: grad.clone(),
    # snntorch.surrogate
    "fast_sigmoid": lambda grad, z, slope: torch.div(
        grad, z.abs_().mul_(slope).add_(1.0).square_(), out=z
    ),
    "triangular": lambda grad, z, threshold: grad * torch.where(z >= 0, -threshold, threshold),
    "heaviside": lambda grad, z: grad * (z > 0),
    "sigmoid_of_exp": _exp_of_sigmoid,
    "spike_rate_escape": lambda grad, z, beta, slope: (
        grad * slope * z.sub_(1).abs_().mul_(-beta).exp_()
    ),
    "sparse_fast_sigmoid": lambda grad, z, slope, B: (
        grad * (z > B) / z.abs_().mul_(slope).add_(1.0).square_()
    ),
    # spikingjelly.activation_based.surrogate
    "piecewise_quadratic": lambda grad, z, alpha: (
        (alpha - alpha**2 * z.abs()).mul_(grad).masked_fill_(z.abs() > 1 / alpha, 0)
    ),
    "piecewise_exp": lambda grad, z, alpha: z.abs_().mul_(-alpha).exp_().mul_(alpha / 2).mul_(grad),
    "sigmoid": _sigmoid,
    "soft_sign": lambda grad, z, alpha: grad / z.abs_().add_(1 / alpha).square_().mul_(2 * alpha),
    "super_spike": lambda grad, z, alpha: alpha * grad / z.abs_().add_(1).square_(),
    "nonzero_sign_log_abs": lambda grad, z, alpha: grad / z.abs_().add_(1 / alpha),
    "erf": lambda grad, z, alpha: (
        z.mul_(alpha).square_().neg_().exp_().mul_(alpha / math.sqrt(math.pi)).mul_(grad)
    ),
    "piecewise_leaky_relu": lambda grad, z, w, c: grad * _either(z.abs() < w, 1 / (2 * w), c, z),
    "squarewave_fourier_series": _squarewave,
    "s2nn": _s2nn,
    "q_pseudo_spike": lambda grad, z, alpha: (
        z.abs_().mul_(2 / (alpha - 1)).add_(1).pow_(-alpha).mul_(grad)
    ),
    "leaky_k_relu": lambda grad, z, leak, k: grad * _either(z >= 0, k, leak, z),
    "fake_numerical_gradient": lambda grad, z, alpha: (
        grad * torch.clamp_max(((z >= 0) * 2.0 - 1.0) / z, alpha)
    ),
    "log_tailed_relu": _log_tailed_relu,
    "rect": lambda grad, z, alpha: grad * (z.abs() < 0.5 / alpha) * alpha,
}


def _compared(
    compare: Callable[..., Tensor],
    h: Tensor,
    threshold: Tensor | float,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """The host's comparison of ``h - threshold`` with zero, as zeros and ones.

    Where potential and threshold have one dtype the difference need not be taken: it rounds to zero
    for equal numbers alone. A comparison straight to floats is several times as fast as one to
    bools.
    """
    if (
        h.dtype not in (torch.float32, torch.float64)
        or getattr(threshold, "dtype", h.dtype) is not h.dtype
    ):
        h, threshold = h - threshold, 0.0
    return compare(h, threshold, out=torch.empty_like(h, dtype=dtype) if out is None else out)


class _Step:
    """The Heaviside step itself, ``strict`` or not. For use without gradients."""

    __slots__ = ()

    def fires(self, h: Tensor, threshold: Tensor | float, out: Tensor | None = None) -> Tensor:
        """Ones where a charged potential fires, zeros elsewhere."""
        return _compared(
            torch.gt if self.strict else torch.ge, h, threshold, self.dtype_of_spikes(h), out
        )

    def silent(self, h: Tensor, threshold: Tensor | float) -> Tensor:
        """Ones where it does not; zeros elsewhere, and where it is NaN."""
        return _compared(
            torch.le if self.strict else torch.lt, h, threshold, self.dtype_of_spikes(h)
        )

    def dtype_of_spikes(self, h: Tensor) -> torch.dtype:
        return h.dtype if self.keeps_dtype else torch.float32


@dataclass(frozen=True, slots=True)
class Surrogate(_Step):
    """A Heaviside step with a surrogate derivative in closed form.

    Args:
        name: a key of ``GRADIENTS``.
        parameters: the arguments of that gradient after ``z``, in order.
        strict: whether a membrane exactly at the threshold stays silent (``z > 0``, snnTorch) or
            fires (``z >= 0``, SpikingJelly).
        keeps_dtype: whether spikes have the potential's dtype; otherwise they are float32
            (snnTorch).

        function: the host's own, for gradients that are differentiated again; else None.

    Raises:
        ValueError: ``name`` is not in ``GRADIENTS``.

    >>> import torch
    >>> atan = Surrogate("atan", (2.0,), strict=False)
    >>> atan.fires(torch.tensor([0.9, 1.0, 1.1]), 1.0)
    tensor([0., 1., 1.])
    >>> atan.gradient(torch.ones(1), torch.zeros(1))
    tensor([1.])
    """

    name: str
    parameters: tuple[float, ...] = ()
    strict: bool = True
    keeps_dtype: bool = True
    function: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)

    differentiable = True  # whether spikes carry a gradient at all

    def __post_init__(self) -> None:
        if self.name not in GRADIENTS:
            raise ValueError(
                f"name: unknown surrogate {self.name!r}, expected one of {sorted(GRADIENTS)}"
            )

    def gradient(self, grad: Tensor, z: Tensor) -> Tensor:
        """The gradient at ``z`` that the gradient ``grad`` at the spikes makes. ``z`` is spent: it
        may be written into."""
        return GRADIENTS[self.name](grad, z, *self.parameters).to(z.dtype)


@dataclass(frozen=True, slots=True)
class DifferentiatedSurrogate(_Step):
    """A Heaviside step whose derivative is had from a function of the user's by autograd.

    Args:
        function: takes ``z`` to spikes and carries a gradient of its own, say through an autograd
            Function.
        strict: as in :class:`Surrogate`; :func:`surrogate_of` finds it out.
        keeps_dtype: likewise.
        differentiable: whether the function's spikes carry a gradient at all.
    """

    function: Callable[[Tensor], Tensor]
    strict: bool
    keeps_dtype: bool = True
    differentiable: bool = True

    def gradient(self, grad: Tensor, z: Tensor) -> Tensor:
        """The gradient at ``z`` that the gradient ``grad`` at the spikes makes; a new tensor."""
        if not self.differentiable:
            return torch.zeros_like(z)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            spikes = self.function(z)
            return torch.autograd.grad(spikes, z, grad.to(spikes.dtype))[0]


AnySurrogate = Surrogate | DifferentiatedSurrogate


def surrogate_of(function: Callable[[Tensor], Tensor]) -> DifferentiatedSurrogate | None:
    """A user's own spike function as a surrogate, judged by a handful of points around its step.

    Returns:
        None if the function is not the Heaviside step, ``z > 0`` or ``z >= 0`` (graded, random or
        smooth spikes do not fit in one bit), or if it learns parameters of its own.
    """
    far = torch.tensor([-1e4, -2.0, -0.5, -1e-30, 0.0, 1e-30, 0.5, 2.0, 1e4], dtype=torch.float64)
    points = torch.cat([far, torch.linspace(-0.3, 0.3, 200, dtype=torch.float64)]).requires_grad_()
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        try:
            spikes = function(points.clone())
        except (
            Exception
        ):  # whatever a user's function raises on these points, it is not the plain step
            return None
    if (
        not isinstance(spikes, Tensor)
        or spikes.shape != points.shape
        or graph.leaves_of(spikes) - {points}
    ):
        return None
    for strict, fired in ((True, points > 0), (False, points >= 0)):
        if torch.equal(spikes, fired.to(spikes.dtype)):
            return DifferentiatedSurrogate(
                function, strict, spikes.dtype is points.dtype, spikes.requires_grad
            )
    return None

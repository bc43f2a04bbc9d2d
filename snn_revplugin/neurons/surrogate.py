"""Surrogate gradients: the Heaviside step that fires, and the derivative that replaces its own.

A neuron fires where ``z = h - threshold`` is positive: ``z > 0`` in snnTorch, ``z >= 0`` in
SpikingJelly. The derivative of that step is zero or infinite, so training uses another function of
``z`` as the derivative. ``GRADIENTS`` holds the derivatives of both hosts that have a closed form,
in the host's own arithmetic, so that gradients agree to rounding.

A reconstructed potential has a rounding error, and the derivative is evaluated at that potential.
How much of the error reaches the gradient depends on how steep the derivative is, and on whether it
jumps: ``steepness``.

Sources: Neftci, Mostafa, Zenke, 'Surrogate Gradient Learning in Spiking Neural Networks' (2019);
``snntorch.surrogate``; ``spikingjelly.activation_based.surrogate``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..torch_internals import graph


def _atan(grad: Tensor, z: Tensor, alpha: float) -> Tensor:
    # alpha/2 / (1 + (pi alpha z / 2)**2), with alpha/2 moved into the denominator: these operations
    # round as the host's do
    return (
        z.mul_(math.pi / 2 * math.sqrt(2 * alpha))
        .square_()
        .add_(2 / alpha)
        .reciprocal_()
        .mul_(grad)
    )


def _sigmoid(grad: Tensor, z: Tensor, alpha: float) -> Tensor:
    s = z.mul_(alpha).sigmoid_()
    return torch.rsub(s, 1).mul_(s).mul_(alpha).mul_(grad)


def _exp_of_sigmoid(grad: Tensor, z: Tensor, slope: float) -> Tensor:
    # Overflows far below the threshold. The gradient is NaN there, as the host's is.
    e = z.mul_(-slope).exp_()
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


# Each function takes the gradient with respect to the spikes, z and the surrogate's parameters, and
# returns the gradient with respect to z. It may write into z, but not into the given gradient.
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

    Where potential and threshold have the same dtype, they are compared directly: their difference
    rounds to zero only if they are equal. A comparison that writes floats is several times as fast
    as one that writes bools.
    """
    if (
        h.dtype not in (torch.float32, torch.float64)
        or getattr(threshold, "dtype", h.dtype) is not h.dtype
    ):
        h, threshold = h - threshold, 0.0
    return compare(h, threshold, out=torch.empty_like(h, dtype=dtype) if out is None else out)


INTERVALS = 4000  # of z, in which steepness_of looks for slopes and jumps
SECTIONS = 8  # parts that an interval is divided into
DIVIDED = 2048  # intervals that are divided: those across which the derivative changes most
DIVISIONS = 10  # in a row; the intervals are then 2**-30 of what they were
SLOPE_DIVISIONS = 2  # divisions up to which slopes are taken; rounding swallows them later
SMALLEST_JUMP = 1e-5  # of the largest derivative


def _grid() -> Tensor:
    """Values of ``z`` from -1e4 to 1e4, dense around the threshold."""
    end = math.asinh(1e4 * 256)
    half = (
        torch.linspace(0, end, INTERVALS // 2 + 1, dtype=torch.float64, device="cpu").sinh_() / 256
    )
    return torch.cat([-half[1:].flip(0), half])


def steepness_of(derivative: Callable[[Tensor], Tensor]) -> float:
    """Measure how steep a surrogate derivative is.

    The intervals of ``z`` across which the derivative changes most are divided repeatedly. The
    change across a jump persists; elsewhere it shrinks with the interval.

    Args:
        derivative: elementwise, of float64 ``z`` of one dimension; may write into it.

    Returns:
        The largest slope over ``z``, in units of the largest derivative; infinity if the derivative
        jumps.
    """
    z = _grid()
    values = derivative(z.clone())
    peak = values.abs().nan_to_num(0.0, 0.0, 0.0).max()
    if not peak > 0:
        return 0.0

    def changes_between(values: Tensor) -> Tensor:
        # an interval at whose end the derivative overflows counts as flat
        return (values.diff() / peak).abs_().nan_to_num(0.0, 0.0, 0.0).flatten()

    steps = torch.arange(SECTIONS + 1, dtype=z.dtype, device=z.device) / SECTIONS
    left, width = z[:-1], z.diff()
    changes = changes_between(values)
    steepness = (changes / width).max()
    for division in range(1, DIVISIONS + 1):
        largest = changes.topk(min(DIVIDED, len(changes))).indices
        points = left[largest, None] + width[largest, None] * steps
        left, width = points[:, :-1].flatten(), points.diff().flatten()
        changes = changes_between(derivative(points.flatten()).view_as(points))
        if division <= SLOPE_DIVISIONS:
            steepness = torch.maximum(steepness, (changes / width).max())
    return math.inf if changes.max() > SMALLEST_JUMP else steepness.item()


@lru_cache(maxsize=256)
def _closed_form_steepness(name: str, parameters: tuple[float, ...]) -> float:
    return steepness_of(lambda z: GRADIENTS[name](torch.ones_like(z), z, *parameters))


class _Step:
    """The Heaviside step itself, ``strict`` or not. For use without gradients."""

    @property
    def jumps(self) -> bool:
        """Whether the derivative jumps. A potential that a rounding error moves past a jump makes
        an entry of the gradient wrong as a whole."""
        return self.steepness == math.inf

    def fires(self, h: Tensor, threshold: Tensor | float, out: Tensor | None = None) -> Tensor:
        """Ones where a charged potential fires, zeros elsewhere."""
        return _compared(
            torch.gt if self.strict else torch.ge, h, threshold, self.dtype_of_spikes(h), out
        )

    def silent(self, h: Tensor, threshold: Tensor | float) -> Tensor:
        """Ones where a charged potential does not fire, zeros elsewhere and where it is NaN."""
        return _compared(
            torch.le if self.strict else torch.lt, h, threshold, self.dtype_of_spikes(h)
        )

    def dtype_of_spikes(self, h: Tensor) -> torch.dtype:
        """The dtype of the spikes of a charged potential ``h``."""
        return h.dtype if self.keeps_dtype else torch.float32


@dataclass(frozen=True)
class Surrogate(_Step):
    """A Heaviside step with a surrogate derivative in closed form.

    Args:
        name: a key of ``GRADIENTS``.
        parameters: the arguments of that gradient after ``z``, in order.
        strict: whether a potential exactly at the threshold stays silent (``z > 0``, snnTorch) or
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

    @property
    def steepness(self) -> float:
        """The largest slope of the derivative, in units of the largest derivative; infinity if it
        jumps. An error ``e`` in a potential changes the derivative by up to ``steepness * e``."""
        return _closed_form_steepness(self.name, self.parameters)

    def gradient(self, grad: Tensor, z: Tensor) -> Tensor:
        """The gradient with respect to ``z``, from the gradient ``grad`` with respect to the
        spikes. May write into ``z``."""
        gradient, dtype = GRADIENTS[self.name](grad, z, *self.parameters), z.dtype
        return gradient if gradient.dtype is dtype else gradient.to(dtype)


@dataclass(frozen=True)
class DifferentiatedSurrogate(_Step):
    """A Heaviside step whose derivative autograd takes from a user's function.

    Args:
        function: maps ``z`` to spikes and has a gradient of its own, for example through an
            autograd Function.
        strict, keeps_dtype: as in :class:`Surrogate`; :func:`surrogate_of` finds them.
        differentiable: whether the function's spikes carry a gradient at all.
    """

    function: Callable[[Tensor], Tensor]
    strict: bool
    keeps_dtype: bool = True
    differentiable: bool = True

    @cached_property
    def steepness(self) -> float:
        """As that of :class:`Surrogate`; infinity also if the function's derivative cannot be
        evaluated. Functions with the same derivative at some values of ``z`` are measured once: a
        layer that learns makes a new surrogate for every sequence."""

        def derivative(z: Tensor) -> Tensor:
            return self.gradient(torch.ones_like(z), z)

        if not self.differentiable:
            return 0.0
        with torch.random.fork_rng(devices=[]):
            try:
                some = derivative(_grid()[:: INTERVALS // 64]).nan_to_num()
                key = tuple(some.tolist())
                if key not in _MEASURED:
                    _MEASURED[key] = steepness_of(derivative)
            except Exception:  # a user's function may raise anything
                return math.inf
        return _MEASURED[key]

    def gradient(self, grad: Tensor, z: Tensor) -> Tensor:
        """The gradient with respect to ``z``, from the gradient ``grad`` with respect to the
        spikes; a new tensor."""
        if not self.differentiable:
            return torch.zeros_like(z)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            spikes = self.function(z)
            return torch.autograd.grad(spikes, z, grad.to(spikes.dtype))[0]


AnySurrogate = Surrogate | DifferentiatedSurrogate
# the steepness of users' functions, by their derivative at some values of z
_MEASURED: dict[tuple[float, ...], float] = {}


def surrogate_of(function: Callable[[Tensor], Tensor]) -> DifferentiatedSurrogate | None:
    """A user's spike function as a surrogate, recognised from its values at points around its step.

    Returns:
        None if the function is not the Heaviside step ``z > 0`` or ``z >= 0`` (graded, random or
        smooth spikes do not fit in one bit), or if it has learned parameters of its own.
    """
    far = torch.tensor([-1e4, -2.0, -0.5, -1e-30, 0.0, 1e-30, 0.5, 2.0, 1e4], dtype=torch.float64)
    points = torch.cat([far, torch.linspace(-0.3, 0.3, 200, dtype=torch.float64)]).requires_grad_()
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        try:
            spikes = function(points.clone())
        except Exception:  # a user's function may raise anything; it is not the plain step then
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

"""Anchors of a reversed potential."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..neurons.transition import Dynamics

# thresholds of a layer, and a threshold and the layer's largest potential, may differ by this
# factor
SMALLEST_ON_GRID = 16.0
LARGEST_REVERSED = 128.0  # in thresholds: beyond it a rounding error could outgrow a residue


class Residue:
    """The last 16 bits of a membrane potential on a fixed grid: enough to mend a copy of it that is
    nearly right.

    The grid is the spacing of floating-point numbers just above the threshold. In the few steps
    between two anchors a rounding error stays below 2**15 grid points for potentials up to
    ``LARGEST_REVERSED`` thresholds, so of all numbers with these 16 last bits the right one is the
    nearest. What is left of the error is half a grid point.
    """

    __slots__ = ("bits", "grid")

    def __init__(self, potential: Tensor, threshold: float) -> None:
        self.grid = 2.0 ** math.floor(math.log2(threshold)) * torch.finfo(potential.dtype).eps
        self.bits = self._points(potential).to(torch.int16)

    def corrected(self, potential: Tensor) -> Tensor:
        """The potential whose residue this is, given one that is nearly it."""
        points = self._points(potential)
        error = (self.bits - points.to(torch.int16)).to(points.dtype)  # modulo 2**16
        return points.add_(error).to(potential.dtype).mul_(self.grid)

    def _points(self, potential: Tensor) -> Tensor:
        wide = torch.int32 if potential.dtype is torch.float32 else torch.int64
        return (potential / self.grid).round_().to(wide)


def is_moderate(potential: Tensor, dynamics: Dynamics) -> bool:
    """Whether no potential is so large, or NaN, that rounding has swallowed those before it."""
    return _magnitude(potential) <= LARGEST_REVERSED * dynamics.thresholds[1]


def fits_residue(potential: Tensor, dynamics: Dynamics) -> bool:
    """Whether a residue on the threshold's grid is fine enough for these potentials and coarse
    enough for their errors."""
    least, most = dynamics.thresholds
    if not (math.isfinite(most) and 0 < most <= SMALLEST_ON_GRID * least):
        return False
    return most / SMALLEST_ON_GRID <= _magnitude(potential) <= LARGEST_REVERSED * most


def _magnitude(potential: Tensor) -> float:
    return potential.abs().max().item() if potential.numel() else 0.0


@lru_cache(maxsize=1024)
def steps_between_anchors(decay: float, lost_bits: float, most: int) -> int:
    """How many steps a potential may be reversed before an anchor has to stop its rounding error.

    A step forward rounds once, and every step back multiplies what was rounded by ``1/a``. After K
    steps back the roundings of those steps, taken as independent, add up to ``sqrt(a**-2 + a**-4 +
    ... + a**-2K)`` of one; K is the largest for which that stays below ``2**lost_bits``.

    Args:
        decay: a, the smallest of the layer, in [0, 1].
        lost_bits: how many of the potential's mantissa bits rebuilding may cost.
        most: the largest K wanted.

    Returns:
        K, or 0 if not even one step can be taken back.

    >>> [steps_between_anchors(a, lost_bits=4, most=64) for a in (0.0, 0.5, 0.9, 0.95, 1.0)]
    [0, 3, 18, 31, 64]
    """
    if not decay > 1e-6:
        return 0
    growth, error, steps = decay**-2, 0.0, 0
    while steps < most:
        error = error * growth + growth
        if not (math.isfinite(error) and error <= 4.0**lost_bits):
            break
        steps += 1
    return steps

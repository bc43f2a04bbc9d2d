"""Anchors: the membrane potentials that stop the rounding error of reversed time.

Reversing a step loses a rounding, and dividing by the decay lets the error grow. So an *anchor*
stands every few steps (:func:`steps_between_anchors`). Where the reset can be inverted, an anchor
is a :class:`Residue`: the reversed potential is nearly right, so the last 16 bits of the right one
are enough to correct it. Elsewhere an anchor is the potential itself, and the potentials above it
are rebuilt forward.

A residue assumes that currents are recomputed as they were. On a GPU they may not be (another
algorithm of cuDNN's, TF32), and to find out would mean waiting for the device: an anchor is the
potential itself there. On a CPU each correction is checked.
"""

from __future__ import annotations

import math
import sys
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..neurons.transition import States, Transition
from ..settings import Settings, get_settings
from ..torch_internals import capture

# Thresholds of a layer, and a threshold and the layer's largest potential, may differ by this much.
SMALLEST_ON_GRID = 16.0
LARGEST_REVERSED = 128.0  # in thresholds: beyond it a rounding error could outgrow a residue
# Grid points that rounding explains. A larger error has another cause, and modulo 2**16 it could be
# taken for a smaller one.
LARGEST_ERROR = 2**12
# The steepness of the surrogate derivative, in units of 1 / threshold, up to which the error of
# reversed potentials changes a gradient by about 2e-5 (measured in float32, at 4 lost bits; 3e-5 in
# the worst of 12 random nets). A batch norm subtracts most of the gradient, and so magnifies the
# relative error of the rest.
GENTLE, GENTLE_BEHIND_NORM = 50.0, 12.0
NEVER = sys.maxsize  # an interval of a chain that needs no anchor
REVERSIBLE_DTYPES = (torch.float32, torch.float64)  # shorter mantissas have no bits to lose


class Anchoring(NamedTuple):
    """Where the anchors of a chain stand. Decided in forward: the settings of this thread do not
    hold in autograd's threads.

    Attributes:
        interval: the time steps between two anchors.
        is_reversed: whether time is reversed between them; else potentials are rebuilt forward.
        rebuild_interval: the rebuilt states that one backward pass holds at a time, at least.
        settings: under which this was decided.
        rebuilt: between two anchors, the time steps between two states that backward rebuilds
            forward and then reverses down to the next; 0 for none. Two states that are reversed
            need them so often that to store them would take more than all else.
    """

    interval: int
    is_reversed: bool
    rebuild_interval: int
    settings: Settings
    rebuilt: int = 0


def anchoring_of(transition: Transition, states: States, behind_norm: bool = False) -> Anchoring:
    """Where anchors stand in a chain of these states, under the settings that hold.

    Args:
        behind_norm: whether a batch norm made the neuron's input.
    """
    settings = get_settings()
    rebuild = settings.rebuild_interval
    if transition.from_outputs:  # what its steps are repeated from is kept anyway
        return Anchoring(NEVER, False, rebuild, settings)
    # A decay or a largest potential is a value that a device is asked for.
    reverses = transition.invertible and all(
        each.dtype in REVERSIBLE_DTYPES and capture.may_synchronise(each) for each in states
    )
    if reverses:
        most = settings.max_anchor_interval
        lost_bits = bits_to_lose(settings.lost_bits, transition, behind_norm)
        interval = steps_between_anchors(transition.cascade, lost_bits, most)
        if interval and len(states) == 1:
            return Anchoring(interval, True, rebuild, settings)
        if interval:
            return Anchoring(most, True, rebuild, settings, rebuilt=interval)
    return Anchoring(rebuild, False, rebuild, settings)


class Residue:
    """The last 16 bits of a membrane potential on a fixed grid: enough to mend a copy of it that is
    nearly right.

    The grid is the spacing of floating-point numbers just above the threshold. In the few steps
    between two anchors a rounding error stays far below 2**15 grid points, so of all numbers with
    these 16 last bits the right one is the nearest. What is left of the error is half a grid point.
    """

    __slots__ = ("bits", "grid")

    def __init__(self, potential: Tensor, threshold: float) -> None:
        self.grid = 2.0 ** math.floor(math.log2(threshold)) * torch.finfo(potential.dtype).eps
        self.bits = self._points(potential).to(torch.int16)

    def corrected(self, potential: Tensor) -> Tensor | None:
        """The potential whose residue this is, given one that is nearly it; None if some element is
        further off than rounding explains."""
        points = self._points(potential)
        error = self.bits - points.to(torch.int16)  # modulo 2**16
        if error.numel() and _reaches(error, LARGEST_ERROR):
            return None
        return points.add_(error).to(potential.dtype).mul_(self.grid)

    def _points(self, potential: Tensor) -> Tensor:
        wide = torch.int32 if potential.dtype is torch.float32 else torch.int64
        return (potential / self.grid).round_().to(wide)


def is_moderate(states: States, transition: Transition) -> bool:
    """Whether no state is so large, or NaN, that rounding has swallowed those before it."""
    limit = LARGEST_REVERSED * transition.thresholds[1]
    if not capture.may_compare(states[0]):
        return transition.plain.largest.stays_below(limit, states)
    return all(_magnitude(each) <= limit for each in states)


def residues_of(states: States, transition: Transition) -> tuple[Residue, ...] | None:
    """The residues of some states; None where the threshold's grid is too coarse for them, or too
    fine for their errors, and on another device than a CPU, which would have to tell their
    magnitudes and whether a correction can be trusted."""
    if not all(capture.may_compare(each) for each in states):
        return None
    least, most = transition.thresholds
    if not (math.isfinite(most) and 0 < most <= SMALLEST_ON_GRID * least):
        return None
    for each in states:
        if not most / SMALLEST_ON_GRID <= _magnitude(each) <= LARGEST_REVERSED * most:
            return None
    return tuple(Residue(each, most) for each in states)


def _reaches(error: Tensor, limit: int) -> bool:
    least, most = error.aminmax()
    return least.item() <= -limit or most.item() >= limit


def _magnitude(state: Tensor) -> float:
    return state.abs().max().item() if state.numel() else 0.0


def is_gentle(transition: Transition) -> bool:
    """Whether the surrogate derivative is so flat that a batch norm makes no difference."""
    return _steepness_of(transition) <= GENTLE_BEHIND_NORM


def _steepness_of(transition: Transition) -> float:
    """The steepness of the surrogate derivative, in units of 1 / threshold."""
    return transition.surrogate.steepness * transition.thresholds[1]


def bits_to_lose(lost_bits: float, transition: Transition, behind_norm: bool = False) -> float:
    """How many mantissa bits of a potential reversal may lose under the setting ``lost_bits``.

    The gradient has the surrogate derivative at the reversed potential as a factor. A steep
    derivative multiplies the potential's error, so each doubling of the steepness beyond ``GENTLE``
    costs a bit.

    Args:
        behind_norm: whether a batch norm made the neuron's current.

    Returns:
        The bits: negative where the steepness leaves none, minus infinity where the derivative
        jumps.

    >>> from snn_revplugin.neurons.integrate_and_fire import IntegrateAndFire
    >>> from snn_revplugin.neurons.surrogate import Surrogate
    >>> [
    ...     round(bits_to_lose(4, IntegrateAndFire(Surrogate(*surrogate), 1.0, None)), 1)
    ...     for surrogate in (("atan", (2.0,)), ("fast_sigmoid", (25.0,)), ("rect", (1.0,)))
    ... ]
    [4.0, 4.0, -inf]
    """
    gentle = GENTLE_BEHIND_NORM if behind_norm else GENTLE
    return lost_bits - math.log2(max(1.0, _steepness_of(transition) / gentle))


@lru_cache(maxsize=1024)
def steps_between_anchors(decays: tuple[float, ...], lost_bits: float, most: int) -> int:
    """How many steps states may be reversed before an anchor must correct their rounding error.

    A step forward rounds once, and each step back multiplies that rounding error by ``1/a``. After
    K steps back the K rounding errors, taken as independent, add up to ``sqrt(a**-2 + a**-4 + ... +
    a**-2K)`` times one of them. K is the largest number for which this is at most ``2**lost_bits``.
    A state that another one charges takes over that one's error, too.

    Args:
        decays: a, the smallest decay of the layer, in [0, 1]; of several states those of each, in
            the order in which one charges the next.
        lost_bits: how many mantissa bits of a state reversal may lose, see :func:`bits_to_lose`.
        most: the largest K wanted.

    Returns:
        K, or 0 if not even one step may be reversed.

    >>> [steps_between_anchors((a,), lost_bits=4, most=64) for a in (0.0, 0.5, 0.9, 0.95, 1.0)]
    [0, 3, 18, 31, 64]
    >>> steps_between_anchors((0.8, 0.9), lost_bits=4, most=64)
    5
    """
    if not all(each > 1e-6 for each in decays):
        return 0
    # What has become of one rounding of each state, as the errors of all states.
    roundings = [[float(i == j) for j in range(len(decays))] for i in range(len(decays))]
    squares, steps = [0.0] * len(decays), 0
    while steps < most:
        roundings = [_one_step_back(errors, decays) for errors in roundings]
        squares = [
            sum((total, *(errors[i] * errors[i] for errors in roundings)))
            for i, total in enumerate(squares)
        ]
        if not all(math.isfinite(each) and each <= 4.0**lost_bits for each in squares):
            break
        steps += 1
    return steps


def _one_step_back(errors: list[float], decays: tuple[float, ...]) -> list[float]:
    """The errors of states before a step from those after it: of each its own and that of the
    state which charges it, over its decay."""
    below = (0.0, *errors[:-1])
    return [(own + other) / decay for own, other, decay in zip(errors, below, decays, strict=True)]

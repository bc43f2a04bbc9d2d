"""The membrane potential's path through time: what is held of it, and how the rest is had again.

A :class:`State` is the potential after one time step and a link to the state before. Of a chain of states only the last
one's potential is held. Backward walks down the chain; each step hands the potential of the step before down to it, by
reversal:

    v[t-1] = uncharge(unreset(v[t], s[t]), x[t])

Reversal loses a rounding a step, and dividing by the decay lets it grow. So every few steps stands an *anchor*
(:func:`snn_revplugin.dynamics.steps_between_anchors`). Where the reset can be inverted, an anchor is a :class:`Residue`: the
reversed potential is nearly right, so the last 16 bits of the right one are enough to mend it. Elsewhere it is the potential.

A potential that cannot be reached from above (a loss on some steps only, a branch, a reset that cannot be inverted, a
potential next to which rounding swallows others, a tensor that somebody wrote into) is rebuilt forward from the nearest one
held below, in the forward's own arithmetic and so exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import capture
from .dynamics import Dynamics
from .replay import Value
from .scratch import scratch
from .spikes import PackedSpikes
from .versioned import Versioned

INITIAL = "the membrane potentials (the one that the sequence started from)"
OVERWRITTEN = -1  # in the place of a version, where somebody has written without one
SMALLEST_ON_GRID = 16.0  # thresholds of a layer, and a threshold and the layer's largest potential, may differ by this factor
LARGEST_REVERSED = 128.0  # in thresholds: beyond it a rounding error could outgrow a residue


class Residue:
    """The last 16 bits of a membrane potential on a fixed grid: enough to mend a copy of it that is nearly right.

    The grid is the spacing of floating-point numbers just above the threshold. In the few steps between two anchors a rounding
    error stays below 2**15 grid points for potentials up to ``LARGEST_REVERSED`` thresholds, so of all numbers with these 16
    last bits the right one is the nearest. What is left of the error is half a grid point.
    """

    __slots__ = ("bits", "grid")

    def __init__(self, potential: Tensor, threshold: float) -> None:
        self.grid = 2.0 ** math.floor(math.log2(threshold)) * torch.finfo(potential.dtype).eps
        self.bits = self._points(potential).to(torch.int16)

    def mended(self, potential: Tensor) -> Tensor:
        """The potential whose residue this is, given one that is nearly it."""
        points = self._points(potential)
        error = (self.bits - points.to(torch.int16)).to(points.dtype)  # modulo 2**16
        return points.add_(error).to(potential.dtype).mul_(self.grid)

    def _points(self, potential: Tensor) -> Tensor:
        wide = torch.int32 if potential.dtype is torch.float32 else torch.int64
        return (potential / self.grid).round_().to(wide)


def initial(potential: Tensor) -> Tensor:
    """An alias of the potential that a chain starts from; four bytes where it is the same everywhere, as after a reset."""
    potential = potential.detach()
    if potential.numel() > 1 and capture.may_ask(potential):
        first = potential[(0,) * potential.dim()]
        if bool((potential == first).all()):
            return first.clone().expand_as(potential)
    return potential


def still_held(held: Versioned | None, can_be_rebuilt: bool) -> Tensor | None:
    """A potential that a state holds, or None where it holds none or somebody has written into it since.

    Raises:
        RuntimeError: somebody has, and nothing is left to rebuild it from.
    """
    if held is None or (can_be_rebuilt and not held.unchanged()):
        return None
    return held.get(INITIAL)


def _is_moderate(potential: Tensor, dynamics: Dynamics) -> bool:
    """Whether no potential is so large, or NaN, that rounding has swallowed those before it."""
    return _magnitude(potential) <= LARGEST_REVERSED * dynamics.thresholds[1]


def _fits_residue(potential: Tensor, dynamics: Dynamics) -> bool:
    """Whether a residue on the threshold's grid is fine enough for these potentials and coarse enough for their errors."""
    least, most = dynamics.thresholds
    if not (math.isfinite(most) and 0 < most <= SMALLEST_ON_GRID * least):
        return False
    return most / SMALLEST_ON_GRID <= _magnitude(potential) <= LARGEST_REVERSED * most


def _magnitude(potential: Tensor) -> float:
    return potential.abs().max().item() if potential.numel() else 0.0


class State:
    """The membrane potential after a time step.

    Args:
        before: the state that the step started from; None for the first of a chain.
        dynamics: the equations of the step that leads here.
        current: its input current as it can be had again, or None if it cannot.
        stretch: the steps between anchors.
        invertible: whether time may be reversed over the step; otherwise its potential is rebuilt forward.

    Attributes:
        fired: the step's spikes.
        ahead: what a fused kernel has computed already for those of the step's graph nodes that are still to come.
        repeats: whether the step is sure to have seen the very current that the step before saw.
        spare: memory of the spikes' shape that the charge needs no more.
        output, version: which output of its graph node the potential is, and the version of the tensor that was given out.
    """

    __slots__ = (
        "__weakref__", "_held", "_kept_charged", "ahead", "before", "current", "dynamics", "fired", "index", "invertible",
        "is_anchor", "output", "repeats", "residue", "spare", "stretch", "version",
    )  # fmt: skip

    def __init__(
        self, before: State | None, dynamics: Dynamics | None, current: Value | None, stretch: int, invertible: bool
    ) -> None:
        self.before, self.dynamics, self.current = before, dynamics, current
        self.stretch, self.invertible = stretch, invertible
        self.index = 0 if before is None else before.index + 1
        self._held: Versioned | None = None
        self._kept_charged: Tensor | None = None
        self.fired: PackedSpikes | None = None
        self.residue: Residue | None = None
        self.spare: Tensor | None = None
        self.repeats = False
        self.ahead: Any = None
        self.output = self.version = 0
        # A step whose current cannot be had again cannot be stepped over, in either direction.
        self.is_anchor = before is None or current is None or self.index % stretch == 0

    @classmethod
    def first(cls, potential: Tensor) -> State:
        """The state that a chain starts from."""
        state = cls(None, None, None, 1, False)
        state._held = Versioned(potential)
        return state

    def reach(self, potential: Tensor, charged: Tensor, output: int) -> None:
        """The step has been taken.

        Args:
            potential: the potential that is given out, as ``output`` of the step's graph node.
            charged: the potential before the reset.
        """
        self._held, self.output, self.version = Versioned(potential.detach()), output, potential._version
        if self.current is not None:
            return
        if not self.invertible and charged is not potential:
            self._kept_charged = charged.detach()
            if not self.dynamics.reset_needs_resets:
                self.is_anchor = False  # the potential follows from what is kept
        else:
            # Nothing could be rebuilt if somebody wrote into the potential that is given out.
            self._held = Versioned(self._held.tensor.clone())

    def overwritten(self) -> None:
        """Somebody has written into the potential that was given out, and no version tells: nothing goes on from here."""
        self.version = OVERWRITTEN
        if self._can_be_rebuilt:
            self._held = None

    def continued(self, can_be_undone: bool) -> None:
        """A step has started from here: from now on only an anchor is needed, if backward can come back over that step."""
        if self._held is None or not can_be_undone:
            return
        if self.is_anchor:
            if self.current is None or not self.invertible or not _fits_residue(self._held.tensor, self.dynamics):
                return
            self.residue = Residue(self._held.tensor, self.dynamics.thresholds[1])
        self._held = None

    @property
    def held(self) -> Tensor | None:
        """The potential, if it is held and nobody has written into it since."""
        return still_held(self._held, self._can_be_rebuilt)

    @property
    def _can_be_rebuilt(self) -> bool:
        return self.before is not None and (self.current is not None or self.keeps_charged)

    @property
    def keeps_charged(self) -> bool:
        return self._kept_charged is not None

    @property
    def charged(self) -> Tensor | None:
        """The potential before the reset, where it is kept or where this backward pass has left it."""
        if self._kept_charged is not None:
            return self._kept_charged
        moment = scratch().get(self)
        return None if moment is None else moment.__dict__.get("charged")

    @charged.setter
    def charged(self, h: Tensor) -> None:
        Moment.of(self).charged = h

    @property
    def at_hand(self) -> bool:
        return self.charged is not None or self.held is not None

    def potential(self) -> Tensor:
        """The potential after the step: held, handed down, or rebuilt forward. Not to be written into."""
        held = self.held
        if held is not None:
            return held
        if self.charged is None:
            self._rebuild()
        resets = self.dynamics.resets(self.before.potential()) if self.dynamics.reset_needs_resets else None
        return self.dynamics.reset(self.charged, self.fired.binary(), resets)

    def _rebuild(self) -> None:
        """Take the steps that lead here again, from the nearest potential at hand below."""
        path, state = [], self
        while not state.at_hand:
            path.append(state)
            state = state.before
        v, charged = state.potential(), state.charged
        for state in reversed(path):
            dynamics, charged_before = state.dynamics, charged
            resets = dynamics.resets(v)
            charged = dynamics.charge(state.current.peek(), v, resets)
            v = dynamics.reset(charged, state.fired.binary(), resets)
            if not (state.invertible and _is_moderate(v, dynamics)):  # it will not be reversed
                state.charged = charged
                if not state.before.at_hand:
                    state.before.charged = charged_before
        self.charged = charged


class once:
    """A property that is computed when it is first asked for (``functools.cached_property`` without its lock, which costs more
    than the rest of a small layer's time step)."""

    def __init__(self, compute: Callable[[Any], Tensor | None]) -> None:
        self.compute, self.name = compute, compute.__name__
        self.__doc__ = compute.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        value = instance.__dict__[self.name] = self.compute(instance)
        return value


class Moment:
    """One time step as backward sees it; each part of it is had once, when it is first asked for."""

    def __init__(self, state: State) -> None:
        self.state, self.dynamics = state, state.dynamics
        self.read_current = False

    @classmethod
    def of(cls, state: State) -> Moment:
        """The one that the nodes of a time step share in this backward pass."""
        values = scratch()
        moment = values.get(state)
        if moment is None:
            moment = values[state] = cls(state)
        return moment

    @once
    def anchored(self) -> bool:
        """Whether the potential before is at hand without this step."""
        return self.state.before.at_hand

    @once
    def invertible(self) -> bool:
        """Whether the step can be reversed. A potential handed down from above has been judged at the last anchor."""
        state = self.state
        return state.invertible and (
            "charged" in self.__dict__ or self.anchored or _is_moderate(state.potential(), self.dynamics)
        )

    @once
    def fired(self) -> Tensor:
        return self.state.fired.binary()

    @once
    def silent(self) -> Tensor:
        return 1.0 - self.fired

    @once
    def current(self) -> Tensor | None:
        self.read_current = True
        return None if self.state.current is None else self.state.current.value()

    @once
    def charged(self) -> Tensor:
        state = self.state
        if state.keeps_charged:
            return state.charged
        if self.invertible or self.dynamics.charged_is_kept:
            return self.dynamics.unreset(state.potential(), state.fired)
        return self.dynamics.charge(self.current, self.before, self.resets)

    @once
    def before(self) -> Tensor:
        before = self.state.before
        if self.invertible and not self.anchored:
            v = self.dynamics.uncharge(self.charged, self.current, self.resets)
            return v if before.residue is None else before.residue.mended(v)
        return before.potential()

    @once
    def resets(self) -> Tensor | None:
        """A delayed reset acts on what the step before fired: its bits, never a decision on a reversed potential."""
        before = self.state.before
        if not self.dynamics.has_resets:
            return None
        if self.dynamics.delayed and before.fired is not None:
            return before.fired.binary()
        return self.dynamics.resets(self.before)

    def hand_down(self) -> None:
        """Leave the potential for the step before."""
        before = self.state.before
        if self.invertible and not self.anchored:
            before.charged = self.dynamics.unreset(self.before, before.fired)
            if not self.dynamics.gradient_reads_current:
                self.__dict__.pop("current", None)
            self.__dict__.pop("resets", None)

    def close(self) -> None:
        """Let go of what was had for this step."""
        if not self.read_current and self.state.current is not None:
            self.state.current.release()
        scratch().pop(self.state, None)

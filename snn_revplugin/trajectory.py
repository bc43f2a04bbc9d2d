"""The membrane potential's path through time: what is held of it, and how the rest is had again.

A :class:`State` is the potential after one time step and a link to the state before. Of a chain of states only the last
one's potential is held, and an *anchor* every so many steps. Backward walks down the chain; each step hands the potential
of the step before down to it, by reversal:

    v[t-1] = uncharge(unreset(v[t], s[t]), x[t])

A potential that is not at hand (a loss on some steps only, a branch, a reset that cannot be inverted, a tensor that somebody
wrote into) is rebuilt forward from the nearest one below, in the forward's own arithmetic and so exactly. Reversal loses a
rounding a step, which the distance between anchors bounds (:func:`snn_revplugin.dynamics.steps_between_anchors`).
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .dynamics import Dynamics
from .replay import Value, Versioned
from .spikes import PackedSpikes

INITIAL = "the membrane potentials (the one that the sequence started from)"
REVERSIBLE_TYPES = (torch.float32, torch.float64)  # shorter mantissas have no bits to lose: they are rebuilt
LARGEST_REVERSED = 1024.0  # in thresholds: next to a potential beyond it, or NaN, the bits of a normal one are gone


def initial(potential: Tensor) -> Tensor:
    """An alias of the potential that a chain starts from; four bytes where it is the same everywhere, as after a reset."""
    potential = potential.detach()
    if potential.numel() > 1 and not (potential.is_cuda and torch.cuda.is_current_stream_capturing()):
        first = potential.reshape(-1)[:1]
        if bool((potential == first).all()):
            return first.clone().expand_as(potential)
    return potential


class State:
    """The membrane potential after a time step.

    Args:
        potential: the potential itself, an alias that no graph hangs on.
        before: the state that the step started from; None for the first of a chain.
        dynamics, current, fired: the step that led here: its equations, its input current as it can be had again (None if it
            cannot), its spikes.
        charged: the potential before the reset, for a step whose current cannot be had again.
        stretch: the steps between anchors.
    """

    __slots__ = ("_held", "before", "dynamics", "current", "fired", "charged", "index", "is_anchor", "keeps_charged")

    def __init__(
        self,
        potential: Tensor,
        before: State | None = None,
        dynamics: Dynamics | None = None,
        current: Value | None = None,
        fired: PackedSpikes | None = None,
        charged: Tensor | None = None,
        stretch: int = 1,
    ) -> None:
        self._held: Versioned | None = Versioned(potential)
        self.before, self.dynamics, self.current, self.fired = before, dynamics, current, fired
        self.charged = charged  # otherwise None until backward is here
        self.keeps_charged = charged is not None
        self.index = 0 if before is None else before.index + 1
        # A step whose current cannot be had again cannot be stepped over, in either direction.
        self.is_anchor = not self.keeps_charged and (before is None or current is None or self.index % stretch == 0)

    def continued(self) -> None:
        """A step has started from here: from now on only an anchor's potential is needed."""
        if not self.is_anchor:
            self._held = None

    @property
    def held(self) -> Tensor | None:
        """The potential, if it is held and nobody has written into it since."""
        if self._held is None:
            return None
        if self._held.unchanged():
            return self._held.tensor
        if self.before is None or (self.current is None and not self.keeps_charged):
            self._held.get(INITIAL)  # raises: nothing is left to rebuild it from
        return None

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
        return self.dynamics.reset(self.charged, self.fired.fired(), resets)

    def _rebuild(self) -> None:
        """Take the steps that lead here again, from the nearest potential at hand below. Each leaves its ``charged``."""
        path, state = [], self
        while not state.at_hand:
            path.append(state)
            state = state.before
        v = state.potential()
        for state in reversed(path):
            dynamics = state.dynamics
            resets = dynamics.resets(v)
            state.charged = dynamics.charge(state.current.peek(), v, resets)
            v = dynamics.reset(state.charged, state.fired.fired(), resets)

    def forget(self) -> None:
        """Backward has gone past."""
        if not self.keeps_charged:
            self.charged = None


class Moment:
    """One time step as backward sees it; each part of it is had once, when it is first asked for."""

    def __init__(self, state: State) -> None:
        self.state, self.dynamics = state, state.dynamics
        self.read_current = False
        self.invertible = self.dynamics.invertible and self._may_be_reversed()

    def _may_be_reversed(self) -> bool:
        state = self.state
        if state.before.at_hand:
            return self.dynamics.invertible
        if state.charged is not None:  # handed down: the stretch was judged at its top
            return True
        v = state.potential()
        if v.dtype not in REVERSIBLE_TYPES:
            return False
        return v.numel() == 0 or bool(v.abs().max() <= LARGEST_REVERSED * self.dynamics.largest_threshold)

    @cached_property
    def fired(self) -> Tensor:
        return self.state.fired.fired()

    @cached_property
    def current(self) -> Tensor:
        self.read_current = True
        return self.state.current.value()

    @cached_property
    def charged(self) -> Tensor:
        state = self.state
        if state.charged is not None:
            return state.charged
        if self.invertible:
            return self.dynamics.unreset(state.potential(), self.fired)
        return self.dynamics.charge(self.current, self.before, self.resets)

    @cached_property
    def before(self) -> Tensor:
        before = self.state.before
        if self.invertible and not before.at_hand:
            return self.dynamics.uncharge(self.charged, self.current, self.resets)
        return before.potential()

    @cached_property
    def resets(self) -> Tensor | None:
        """A delayed reset acts on what the step before fired: its bits, never a decision on a reversed potential."""
        before = self.state.before
        if self.dynamics.delayed and before.fired is not None:
            return before.fired.fired().float()
        return self.dynamics.resets(self.before)

    def hand_down(self) -> None:
        """Leave the potential for the step before, and let go of what was had for this one."""
        state, before = self.state, self.state.before
        if self.invertible and not before.at_hand:
            before.charged = self.dynamics.unreset(self.before, before.fired.fired())
        if not self.read_current and state.current is not None:
            state.current.release()
        state.forget()

"""The membrane potential's path through time: what is held of it, and how the rest is had again.

A :class:`State` is the potential after one time step and a link to the state before. Of a chain of
states only the last one's potential is held. Backward walks down the chain; each step hands the
potential of the step before down to it, by reversal:

    v[t-1] = uncharge(unreset(v[t], s[t]), x[t])

Reversal loses a rounding a step, and dividing by the decay lets it grow. So every few steps stands
an *anchor* (:func:`snn_revplugin.dynamics.steps_between_anchors`). Where the reset can be inverted,
an anchor is a :class:`Residue`: the reversed potential is nearly right, so the last 16 bits of the
right one are enough to mend it. Elsewhere it is the potential.

A potential that cannot be reached from above (a loss on some steps only, a branch, a reset that
cannot be inverted, a potential next to which rounding swallows others, a tensor that somebody wrote
into) is rebuilt forward from the nearest one held below, in the forward's own arithmetic and so
exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..neurons.transition import Dynamics
from ..packed.spikes import PackedSpikes
from ..replay import Recomputable
from ..torch_internals import capture
from ..torch_internals.pass_cache import pass_cache
from ..torch_internals.versioned import Versioned
from .anchors import Residue, fits_residue, is_moderate

INITIAL = "the membrane potentials (the one that the sequence started from)"
OVERWRITTEN = -1  # in the place of a version, where somebody has written without one


def initial(potential: Tensor) -> Tensor:
    """An alias of the potential that a chain starts from; four bytes where it is the same
    everywhere, as after a reset."""
    potential = potential.detach()
    if potential.numel() > 1 and capture.may_synchronise(potential):
        first = potential[(0,) * potential.dim()]
        if bool((potential == first).all()):
            return first.clone().expand_as(potential)
    return potential


def still_held(held: Versioned | None, can_be_rebuilt: bool) -> Tensor | None:
    """A potential that a state holds, or None where it holds none or somebody has written into it
    since.

    Raises:
        RuntimeError: somebody has, and nothing is left to rebuild it from.
    """
    if held is None or (can_be_rebuilt and not held.unchanged()):
        return None
    return held.get(INITIAL)


class ChainLink:
    """The membrane potential after a time step.

    Args:
        before: the state that the step started from; None for the first of a chain.
        dynamics: the equations of the step that leads here.
        current: its input current as it can be had again, or None if it cannot.
        stretch: the steps between anchors.
        invertible: whether time may be reversed over the step; otherwise its potential is rebuilt
            forward.

    Attributes:
        fired: the step's spikes.
        ahead: what a fused kernel has computed already for those of the step's graph nodes that are
            still to come.
        repeats: whether the step is sure to have seen the very current that the step before saw.
        spare: memory of the spikes' shape that the charge needs no more.
        output, version: which output of its graph node the potential is, and the version of the
            tensor that was given out.
    """

    __slots__ = (
        "__weakref__",
        "_held",
        "_kept_charged",
        "ahead",
        "anchor_interval",
        "before",
        "current",
        "dynamics",
        "fired",
        "index",
        "invertible",
        "is_anchor",
        "output",
        "repeats",
        "residue",
        "spare",
        "version",
    )

    def __init__(
        self,
        before: ChainLink | None,
        dynamics: Dynamics | None,
        current: Recomputable | None,
        anchor_interval: int,
        invertible: bool,
    ) -> None:
        self.before, self.dynamics, self.current = before, dynamics, current
        self.anchor_interval, self.invertible = anchor_interval, invertible
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
        self.is_anchor = before is None or current is None or self.index % anchor_interval == 0

    @classmethod
    def first(cls, potential: Tensor) -> ChainLink:
        """The state that a chain starts from."""
        link = cls(None, None, None, 1, False)
        link._held = Versioned(potential)
        return link

    def reach(self, potential: Tensor, charged: Tensor, output: int) -> None:
        """The step has been taken.

        Args:
            potential: the potential that is given out, as ``output`` of the step's graph node.
            charged: the potential before the reset.
        """
        self._held, self.output, self.version = (
            Versioned(potential.detach()),
            output,
            potential._version,
        )
        if self.current is not None:
            return
        if not self.invertible and charged is not potential:
            self._kept_charged = charged.detach()
            if not self.dynamics.reset_needs_signal:
                self.is_anchor = False  # the potential follows from what is kept
        else:
            # Nothing could be rebuilt if somebody wrote into the potential that is given out.
            self._held = Versioned(self._held.tensor.clone())

    def overwritten(self) -> None:
        """Somebody has written into the potential that was given out, and no version tells: nothing
        goes on from here."""
        self.version = OVERWRITTEN
        if self._can_be_rebuilt:
            self._held = None

    def continued(self, can_be_undone: bool) -> None:
        """A step has started from here: from now on only an anchor is needed, if backward can come
        back over that step."""
        if self._held is None or not can_be_undone:
            return
        if self.is_anchor:
            if (
                self.current is None
                or not self.invertible
                or not fits_residue(self._held.tensor, self.dynamics)
            ):
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
    def kept_bytes(self) -> int:
        """Bytes that this step has made stay: of its own charged potential, and of the anchor
        below."""
        before, nbytes = self.before, 0 if self._kept_charged is None else self._kept_charged.nbytes
        if before.residue is not None:
            nbytes += before.residue.bits.nbytes
        elif before.is_anchor and before.before is not None:
            nbytes += before.held.nbytes
        return nbytes

    @property
    def keeps_charged(self) -> bool:
        return self._kept_charged is not None

    @property
    def charged(self) -> Tensor | None:
        """The potential before the reset, where it is kept or where this backward pass has left
        it."""
        if self._kept_charged is not None:
            return self._kept_charged
        view = pass_cache().get(self)
        return None if view is None else view.__dict__.get("charged")

    @charged.setter
    def charged(self, h: Tensor) -> None:
        StepView.of(self).charged = h

    @property
    def at_hand(self) -> bool:
        return self.charged is not None or self.held is not None

    def potential(self) -> Tensor:
        """The potential after the step: held, handed down, or rebuilt forward. Not to be written
        into."""
        held = self.held
        if held is not None:
            return held
        if self.charged is None:
            self._rebuild()
        reset_signal = (
            self.dynamics.reset_signal(self.before.potential())
            if self.dynamics.reset_needs_signal
            else None
        )
        return self.dynamics.reset(self.charged, self.fired.binary(), reset_signal)

    def _rebuild(self) -> None:
        """Take the steps that lead here again, from the nearest potential at hand below."""
        path, link = [], self
        while not link.at_hand:
            path.append(link)
            link = link.before
        v, charged = link.potential(), link.charged
        for link in reversed(path):
            dynamics, charged_before = link.dynamics, charged
            reset_signal = dynamics.reset_signal(v)
            charged = dynamics.charge(link.current.compute(), v, reset_signal)
            v = dynamics.reset(charged, link.fired.binary(), reset_signal)
            if not (link.invertible and is_moderate(v, dynamics)):  # it will not be reversed
                link.charged = charged
                if not link.before.at_hand:
                    link.before.charged = charged_before
        self.charged = charged


class once:
    """A property that is computed when it is first asked for (``functools.cached_property`` without
    its lock, which costs more than the rest of a small layer's time step)."""

    def __init__(self, compute: Callable[[Any], Tensor | None]) -> None:
        self.compute, self.name = compute, compute.__name__
        self.__doc__ = compute.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        value = instance.__dict__[self.name] = self.compute(instance)
        return value


class StepView:
    """One time step as backward sees it; each part of it is had once, when it is first asked
    for."""

    def __init__(self, link: ChainLink) -> None:
        self.link, self.dynamics = link, link.dynamics
        self.read_current = False

    @classmethod
    def of(cls, link: ChainLink) -> StepView:
        """The one that the nodes of a time step share in this backward pass."""
        values = pass_cache()
        view = values.get(link)
        if view is None:
            view = values[link] = cls(link)
        return view

    @once
    def anchored(self) -> bool:
        """Whether the potential before is at hand without this step."""
        return self.link.before.at_hand

    @once
    def invertible(self) -> bool:
        """Whether the step can be reversed. A potential handed down from above has been judged at
        the last anchor."""
        link = self.link
        return link.invertible and (
            "charged" in self.__dict__
            or self.anchored
            or is_moderate(link.potential(), self.dynamics)
        )

    @once
    def fired(self) -> Tensor:
        return self.link.fired.binary()

    @once
    def silent(self) -> Tensor:
        return 1.0 - self.fired

    @once
    def current(self) -> Tensor | None:
        self.read_current = True
        return None if self.link.current is None else self.link.current.value()

    @once
    def charged(self) -> Tensor:
        link = self.link
        if link.keeps_charged:
            return link.charged
        if self.invertible or self.dynamics.charged_is_kept:
            return self.dynamics.invert_reset(link.potential(), link.fired)
        return self.dynamics.charge(self.current, self.before, self.reset_signal)

    @once
    def before(self) -> Tensor:
        before = self.link.before
        if self.invertible and not self.anchored:
            v = self.dynamics.invert_charge(self.charged, self.current, self.reset_signal)
            return v if before.residue is None else before.residue.corrected(v)
        return before.potential()

    @once
    def reset_signal(self) -> Tensor | None:
        """A delayed reset acts on what the step before fired: its bits, never a decision on a
        reversed potential."""
        before = self.link.before
        if not self.dynamics.has_reset_signal:
            return None
        if self.dynamics.delayed and before.fired is not None:
            return before.fired.binary()
        return self.dynamics.reset_signal(self.before)

    def hand_down(self) -> None:
        """Leave the potential for the step before."""
        before = self.link.before
        if self.invertible and not self.anchored:
            before.charged = self.dynamics.invert_reset(self.before, before.fired)
            if not self.dynamics.gradient_reads_current:
                self.__dict__.pop("current", None)
            self.__dict__.pop("reset_signal", None)

    def close(self) -> None:
        """Let go of what was had for this step."""
        if not self.read_current and self.link.current is not None:
            self.link.current.drop_reader()
        pass_cache().pop(self.link, None)

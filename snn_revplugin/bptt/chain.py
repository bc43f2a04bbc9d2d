"""Which states of a neuron are stored, and how backward reconstructs the others.

A :class:`ChainLink` stands for the states after one time step and refers to the link before it. Of
a chain only the last link holds its states. Backward walks down the chain; each step hands the
states before it down, by reversal:

    v[t-1] = invert_charge(invert_reset(v[t], s[t]), x[t])

with an anchor every few steps (:mod:`.anchors`). States that are not handed down (a loss on some
steps only, a branch, a reset that cannot be inverted, a potential beside which rounding swallows
others, a tensor that was written into) are rebuilt forward from the nearest states below that are
held, in the arithmetic of forward and so exactly. Both read the spikes from their bits; no spike is
decided again.
"""

from __future__ import annotations

import math
import weakref
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..neurons.transition import GraphNodes, States, StepParts, Transition
from ..packed.rows import release_rows, shared_binary
from ..packed.spikes import PackedSpikes
from ..replay import HeldTensor, Recomputable, TrainingStep, read_together
from ..settings import Settings
from ..torch_internals import capture, streams
from ..torch_internals.pass_cache import pass_cache
from ..torch_internals.uniform import is_uniform
from ..torch_internals.versioned import Versioned
from .anchors import Anchoring, Residue, is_moderate, residues_of
from .surroundings import Surroundings

LINK = "snn_revplugin_link"  # where the graph node that gave states out offers their link
SYNAPSE = "snn_revplugin_synapse"  # the same, of the node that gave out the synaptic current
INITIAL = "the membrane potentials (the one that the sequence started from)"
OVERWRITTEN = -1  # in the place of a version, where a write has left none
FEW_BYTES = 1024
FIRST = Anchoring(1, False, 1, Settings())
Sums = list[float] | None


def initial(state: Tensor) -> Tensor:
    """An alias of a state that a chain starts from; one element where all are equal, as after a
    reset. On another device than a CPU that is not found out, but it may be known."""
    known, state = is_uniform(state), state.detach()
    # A meta tensor has no values: it raises an error here, as where the host mixes devices.
    if state.numel() > 1 and (known or capture.may_compare(state) or state.is_meta):
        first = state[(0,) * state.dim()]
        if known or bool((state == first).all()):
            return first.clone().expand_as(state)
    return state


class ChainLink:
    """The states after a time step.

    Args:
        before: the link that the step started from; None for the first of a chain.
        transition: the equations of the step that leads here; None for the first.
        current: its input, as backward recomputes it, or None.
        anchoring: where anchors stand.

    Attributes:
        fired: the step's spikes; of a neuron whose outputs are no spikes what is kept of those.
        reset_signal: what a delayed reset acted on in the step, if anything.
        outputs: the outputs, of a neuron that is recomputed from them.
        can_be_repeated: whether the step can be taken once more, in backward.
        given_out: the potential that the step returned, of a neuron with ``fires_with_charge``.
        parts: the step under way, between its graph nodes.
        repeats: whether the step is sure to have seen the input of the step before.
        in_step: the training step under a memory budget that this is a part of.
        surroundings: what else the step read, if its code is a module's own.
        stream: on which the step was taken.
    """

    __slots__ = (
        "__weakref__",
        "_held",
        "_sums",
        "_versions",
        "anchoring",
        "before",
        "can_be_repeated",
        "current",
        "fired",
        "given_out",
        "in_step",
        "index",
        "is_anchor",
        "kept_charged",
        "outputs",
        "parts",
        "repeats",
        "reset_signal",
        "residues",
        "stream",
        "surroundings",
        "transition",
    )

    def __init__(
        self,
        before: ChainLink | None,
        transition: Transition | None,
        current: Recomputable | None,
        anchoring: Anchoring,
    ) -> None:
        self.before, self.transition, self.current = before, transition, current
        self.anchoring = anchoring
        self.index = 0 if before is None else before.index + 1
        self.can_be_repeated = current is not None or (
            transition is not None and transition.from_outputs
        )
        self.fired: PackedSpikes | Recomputable | None = None
        self.reset_signal: PackedSpikes | None = None
        self.outputs: Recomputable | None = None
        self.given_out: weakref.ref[Tensor] | None = None
        self.parts: StepParts | None = None
        self.repeats = False
        self.in_step: TrainingStep | None = None
        self.surroundings: Surroundings | None = None
        self.residues: tuple[Residue, ...] | None = None
        self._held: tuple[Versioned, ...] | None = None
        self.kept_charged: Tensor | None = None
        self._versions: tuple[int, ...] = ()
        self._sums: Sums = None
        # A step that cannot be repeated cannot be stepped over, in either direction.
        self.is_anchor = (
            before is None or not self.can_be_repeated or self.index % anchoring.interval == 0
        )

    @classmethod
    def first(cls, states: States) -> ChainLink:
        """The link that a chain starts from."""
        link = cls(None, None, None, FIRST)
        link._held = tuple(Versioned(initial(each)) for each in states)
        link.stream = streams.stream_of(states[0].device)
        return link

    @property
    def _can_be_rebuilt(self) -> bool:
        return self.before is not None and (self.can_be_repeated or self.kept_charged is not None)

    def reach(self, states: States, parts: StepParts) -> None:
        """The step has been taken.

        Args:
            states: as they are given out.
            parts: the step; its charged potential is read only where it has to be kept.
        """
        self._held = tuple(Versioned(each.detach()) for each in states)
        self.stream = streams.stream_of(states[0].device)
        self._versions = tuple(each._version for each in states)
        self._sums = _sums_of(states)
        if self.transition.own_code:
            self._keep_surroundings(parts.surroundings)
        if self.can_be_repeated:
            return
        charged = None if self.anchoring.is_reversed else parts.charged
        if charged is not None and charged is not states[0]:
            self.kept_charged = charged.detach()
            self.is_anchor = False  # the states follow from what is kept
        else:
            # Nothing could be rebuilt after a write into the states that are given out.
            self._held = tuple(Versioned(each.tensor.clone()) for each in self._held)

    def _keep_surroundings(self, surroundings: Surroundings | None) -> None:
        below = self.before.surroundings
        if below is not None:
            if surroundings is not None and not self.before.is_anchor:
                surroundings.follow(below)
            below.end = None
        self.surroundings = surroundings

    def gave_out(self, states: States) -> bool:
        """Whether these states are the ones that the step gave out, unmodified."""
        if len(states) != len(self._versions):
            return False
        for each, version in zip(states, self._versions, strict=True):
            if each._version != version:
                return False
        transition, own = self.transition, states
        if transition.has_synapse:  # given out by a node of its own
            synapse, *own = states
            if getattr(synapse.grad_fn, SYNAPSE, None) is not self or synapse.output_nr != 0:
                return False
        # the number of the node's output that is the first state: output 0 of ONE are the spikes
        first = transition.nodes is GraphNodes.ONE and not transition.fed_back
        node = states[-1].grad_fn
        for i, each in enumerate(own, first):
            if each.grad_fn is not node or each.output_nr != i:
                return False
        if not _same_sums(self._sums, states):
            self.mark_overwritten()
            return False
        return True

    def mark_overwritten(self) -> None:
        """The states that were given out were written into, and no version tells: no chain
        continues from here."""
        self._versions = (OVERWRITTEN,) * len(self._versions)
        if self._can_be_rebuilt:
            self._held = None

    def continue_with(self, link: ChainLink) -> None:
        """The step of ``link`` starts from here: from now on only an anchor is needed, if backward
        can come back over that step."""
        if self._held is None or not link.can_be_repeated:
            return
        if self.is_anchor:
            if self.current is None or not self.anchoring.is_reversed:
                return
            self.residues = residues_of(tuple(h.tensor for h in self._held), self.transition)
            if self.residues is None:
                return
        self._held = None

    @property
    def kept_bytes(self) -> int:
        """Bytes that the step has made stay: its own charged potential, and the anchor below."""
        before, nbytes = self.before, 0
        if type(self.current) is HeldTensor:
            nbytes = self.current.held.tensor.nbytes
        if self.kept_charged is not None:
            nbytes += self.kept_charged.nbytes
        if self.surroundings is not None:
            nbytes += self.surroundings.nbytes
        if before.residues is not None:
            return nbytes + sum(each.bits.nbytes for each in before.residues)
        if before.is_anchor and before.before is not None:
            return nbytes + sum(each.nbytes for each in before.held)
        return nbytes

    @property
    def held(self) -> States | None:
        """The states, if they are held and unmodified.

        Raises:
            RuntimeError: they were written into, and nothing is left to rebuild them from.
        """
        held = self._held
        if held is None:
            return None
        if self._can_be_rebuilt and not all(each.unchanged() for each in held):
            return None
        states = tuple(each.get(INITIAL) for each in held)
        if self._can_be_rebuilt and not _same_sums(self._sums, states):
            return None
        return states

    @property
    def is_available(self) -> bool:
        """Whether the states follow without another step."""
        if self.kept_charged is not None:
            return True
        view: StepView | None = pass_cache().get(self)
        if view is not None and (view.left_states is not None or view.gives_states):
            return True
        return self.held is not None

    @property
    def is_rebuilt(self) -> bool:
        """Whether backward rebuilds these states, rather than reverse the steps above further."""
        every = self.anchoring.rebuilt
        return (
            every > 0
            and self.anchoring.is_reversed
            and not self.is_anchor
            and (self.index % every == 0)
        )

    def states(self) -> States:
        """The states after the step: held, handed down, or rebuilt. Not to be written into."""
        held = self.held
        if held is not None:
            return held
        if not self.is_available:
            self._rebuild()
        view = StepView.of(self)
        if view.left_states is not None:
            return view.left_states
        return self.transition.states_of(view.charged, view)

    def give_up_reversal(self) -> None:
        """The inputs above are not recomputed as they were: the states from here down are rebuilt
        forward, where an error fades with the decay instead of growing."""
        link: ChainLink | None = self
        while link is not None:
            link.anchoring = link.anchoring._replace(is_reversed=False)
            link = link.before

    def _rebuild(self) -> None:
        """Repeat the steps that lead here, from the nearest available states below.

        The states of a step that will not be reversed stay in the pass's cache, with those of the
        step before it: all of the topmost ones, and further down every few.
        """
        path, link = [], self
        while not link.is_available:
            path.append(link)
            link = link.before
        # States that are held below carry no charged potential; those that were left have theirs.
        states, charged = link.states(), None
        apart = max(self.anchoring.rebuild_interval, math.isqrt(len(path)))
        for left in range(len(path) - 1, -1, -1):
            link, before = path[left], (charged, states)
            view = StepView.repeating(link)
            charged, states = link.transition.again(view, states)
            reversed_later = link.anchoring.is_reversed and is_moderate(states, link.transition)
            stays = not reversed_later and (left < apart or left % apart == 0)
            if stays or left == 0 or link.is_rebuilt:
                StepView.of(link).leave(charged, states)
                if link.transition.reads_input:  # its derivative will, too
                    StepView.of(link).take_current(view)
            if stays and not link.before.is_available:
                StepView.of(link.before).leave(*before)


def _sums_of(states: States) -> Sums:
    """Sums that tell of a write through ``.data``, which leaves no version; None on another device
    than a CPU, which would have to be waited for."""
    if not capture.may_compare(states[0]):
        return None
    return [_sum(each) for each in states]


def _sum(state: Tensor) -> float:
    state = state.detach()
    if state.nbytes <= FEW_BYTES and state.dtype is not torch.bfloat16:  # which numpy has not
        return zlib.crc32(state.numpy().tobytes())  # a third of the time of a sum
    return state.sum().item()


def _same_sums(sums: Sums, states: States) -> bool:
    if sums is None:
        return True
    now = _sums_of(states)
    return sums == now or all(a == b or (a != a and b != b) for a, b in zip(sums, now, strict=True))


class StepView:
    """One time step as backward sees it. Each part is computed when it is first read, and held
    until the step's last graph node closes the view.

    Attributes:
        grad_outputs: the gradient at the outputs, where the node that fired leaves it to the node
            that charged.
    """

    __slots__ = (
        "_after",
        "_anchored",
        "_before",
        "_charged",
        "_current",
        "_fired",
        "_invertible",
        "_outputs",
        "_reads_current",
        "_reset_signal",
        "grad_outputs",
        "link",
        "transition",
    )

    def __init__(self, link: ChainLink) -> None:
        self.link, self.transition = link, link.transition
        self.grad_outputs: Tensor | None = None
        self._after: States | None = None
        self._before: States | None = None
        self._charged: Tensor | None = None
        self._current: Tensor | None = None
        self._fired: Tensor | None = None
        self._outputs: Tensor | None = None
        self._reset_signal: Tensor | None = None
        self._anchored: bool | None = None
        self._invertible: bool | None = None
        self._reads_current = False

    @classmethod
    def of(cls, link: ChainLink) -> StepView:
        """The one that the graph nodes of a time step share in this backward pass."""
        values = pass_cache()
        view = values.get(link)
        if view is None:
            view = values[link] = cls(link)
        return view

    @classmethod
    def repeating(cls, link: ChainLink) -> StepView:
        """One for a repetition of the step, which counts as no reader of the input."""
        view = cls(link)
        if link.current is not None:
            view._current = link.current.compute()
        return view

    def leave(self, charged: Tensor | None, states: States) -> None:
        """Leave what a repetition or a reversal of steps has computed. Nearly always the states
        follow from the charged potential, but not the other way round."""
        if charged is None or not self.transition.states_follow_charged:
            self._after = states
        if charged is not None:
            self._charged = charged

    def take_current(self, repetition: StepView) -> None:
        """Hold the input that a repetition of the step has computed."""
        self._current = repetition._current

    @property
    def gives_states(self) -> bool:
        """Whether the states follow from a charged potential that has been computed."""
        return self._charged is not None and self.transition.states_follow_charged

    @property
    def left_states(self) -> States | None:
        """The states after the step, if they have been left."""
        return self._after

    @property
    def anchored(self) -> bool:
        """Whether the states before do not come from this step."""
        if self._anchored is None:
            self._anchored = self.link.before.is_available or self.link.before.is_rebuilt
        return self._anchored

    @property
    def invertible(self) -> bool:
        """Whether the step can be reversed. States that were handed down were judged at the last
        anchor."""
        if self._invertible is None:
            self._invertible = self.link.anchoring.is_reversed and (
                self._charged is not None
                or self._after is not None
                or self.anchored
                or is_moderate(self.link.states(), self.transition)
            )
        return self._invertible

    @property
    def reverses(self) -> bool:
        """Whether the states before follow from reversing this step, and nothing corrects them."""
        return (
            self._before is None
            and self.invertible
            and not self.anchored
            and self.link.before.residues is None
        )

    @property
    def has_charged(self) -> bool:
        """Whether the charged potential is kept, or computed already."""
        return self.link.kept_charged is not None or self._charged is not None

    @property
    def packed(self) -> PackedSpikes:
        return self.link.fired

    @property
    def fired(self) -> Tensor:
        if self._fired is None:
            self._fired = shared_binary(self.link.fired)
        return self._fired

    @property
    def silent(self) -> Tensor:
        return torch.rsub(self.fired, 1.0)

    @property
    def current(self) -> Tensor | None:
        if self._current is None and self.link.current is not None:
            self._reads_current = True
            self._current = self._read_current()
        return self._current

    def _read_current(self) -> Tensor:
        link = self.link
        if link.anchoring.settings.match_host_order:
            return link.current.value()
        return read_together(link.current, self._earlier_currents(), self.transition)

    def _earlier_currents(self) -> Iterator[Recomputable | None]:
        """The inputs of the steps before, downwards."""
        link = self.link.before
        while link.transition is self.transition:
            yield link.current
            link = link.before

    @property
    def outputs(self) -> Tensor:
        if self._outputs is None:
            self._outputs = self.link.outputs.value()
        return self._outputs

    @property
    def after(self) -> States:
        return self.link.states() if self._after is None else self._after

    @property
    def charged(self) -> Tensor:
        if self._charged is None:
            kept = self.link.kept_charged
            self._charged = self.transition.charged_of(self) if kept is None else kept
            if self.transition.states_follow_charged:
                self._after = None
        return self._charged

    @property
    def before(self) -> States:
        if self._before is None:
            self._before = self._states_before()
        return self._before

    def _states_before(self) -> States:
        before = self.link.before
        if not self.invertible or self.anchored:
            return before.states()
        states = self.transition.invert(self)
        if before.residues is None:
            return states
        corrected = tuple(r.corrected(v) for r, v in zip(before.residues, states, strict=True))
        if any(each is None for each in corrected):
            before.give_up_reversal()
            return before.states()
        return corrected

    @property
    def packed_signal(self) -> PackedSpikes | None:
        return self.link.reset_signal

    @property
    def reset_signal(self) -> Tensor | None:
        signal = self.packed_signal
        if self._reset_signal is None and signal is not None:
            self._reset_signal = shared_binary(signal)
        return self._reset_signal

    def hand_down(self) -> None:
        """Reverse the step, leave the states for the step before, and release what that took."""
        if self.invertible and not self.anchored:
            self.leave_before(self.before)

    def leave_before(self, states: States) -> None:
        """Leave the states before, reversed, for the step before."""
        self._before = states
        StepView.of(self.link.before).leave(None, states)
        if not self.transition.reads_input:
            self._current = None
        self._reset_signal = None

    def close(self) -> None:
        """Release what was computed for this step."""
        if not self._reads_current and self.link.current is not None:
            self.link.current.drop_reader()
        pass_cache().pop(self.link, None)
        if isinstance(self.link.fired, PackedSpikes):
            release_rows(self.link.fired)


def link_behind(state: Tensor) -> ChainLink | None:
    """The link of the step that gave a state, whether or not it was written into since."""
    link = getattr(state.grad_fn, LINK, None)
    return link() if type(link) is weakref.ref else link


def link_of(states: States) -> ChainLink | None:
    """The link that a step left with the states it returned, unless they were written into."""
    link = link_behind(states[-1])
    return link if link is not None and link.gave_out(states) else None


def start_from(states: States, transition: Transition) -> ChainLink:
    """The link whose states these are, if the same transition led there; else the first of a new
    chain. On another stream a new one starts: backward hands states down the chain."""
    link, stream = link_of(states), streams.stream_of(states[0].device)
    if link is not None and link.transition is transition and link.stream == stream:
        return link
    with torch.no_grad():
        return ChainLink.first(states)

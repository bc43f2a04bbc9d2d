"""One time step of the coupled neuron as an autograd Function, and the chain of states that such
steps make.

Forward keeps the output (an alias of what is handed out, which is the next layer's saved input
anyway), the spikes as bits, and a link to the state before. Of a chain of states the first and the
last potential are held and no other: those between are scanned forward again in backward, in the
bits of the first time (see :mod:`.coupled`). The scan leaves every k-th potential in the pass's
scratch, and all those of the stretch on top, so that a chain of n steps costs two scans and about 2
sqrt(n) potentials while the pass lasts.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import select_backend
from ..neurons.coupled import Coupled, Pair
from ..packed.spikes import PackedSpikes
from ..replay import FIRED, Recipe, Recomputable, attach_inverse_recipe
from ..settings import get_settings
from ..torch_internals import graph
from ..torch_internals.function import once_differentiable, release_saved
from ..torch_internals.pass_cache import pass_cache
from ..torch_internals.versioned import Versioned
from .chain import OVERWRITTEN, initial, still_held
from .record import NeuronRecord
from .step import SECOND_PASS

STATE = (
    "snn_revplugin_coupled_state"  # where the graph node that gave a potential out offers its state
)
OUTPUT = "the input and the state of a coupled neuron (its output)"


class Outputs(Recomputable):
    """What a coupled neuron gave out, for the layers above to find at its graph node; at hand,
    since the neuron keeps it."""

    __slots__ = ("held",)
    derived = True
    cheap = True

    def __init__(self, given_out: Tensor) -> None:
        self.held = Versioned(given_out.detach())

    def were_edited(self) -> bool:
        """Whether what went on to the next layer is something else by now."""
        return not self.held.unchanged()

    def value(self) -> Tensor:
        return self.held.get(OUTPUT)


def rebuilt_input(
    coupled: Coupled, outputs: Outputs, fired: PackedSpikes, time: bool = False
) -> Recipe:
    """The input of a coupled neuron, to rounding, as readers below it can have it: from its output
    and spikes, without any potential. Computed by its first reader of a backward pass, shared by
    all, dropped by the last.

    Args:
        time: whether they are those of several time steps, ``[T, ...]``.
    """
    return Recipe(partial(coupled.inputs_from, fired, time), (outputs,))


def coupled_step(
    coupled: Coupled, current: Tensor, potential: Tensor, record: NeuronRecord
) -> tuple[Tensor, Tensor]:
    """One time step.

    Args:
        coupled: the neuron's equations.
        current: the input x, floating point.
        potential: the potential v, of the same shape and dtype. If it is what an earlier step of
            the same ``coupled`` returned, unmodified, the two steps form a chain; anything else
            starts a new one.
        reversal: the neuron's own.

    Returns:
        The output and the potential after the step. Nobody may write into the output before its
        backward has run.

    Raises:
        ValueError: the current cannot be split in halves.
    """
    coupled = select_backend(coupled, current, potential, record.statistics)
    before = link_of(potential)
    if before is None or before.coupled is not coupled:
        with torch.no_grad():
            before = CoupledState.first(initial(potential), coupled)
    state = CoupledState(before, coupled)
    output, after = _CoupledStep.apply(current, potential, state)
    before.continued()
    attach_inverse_recipe(current, state.input(), record)
    record.statistics.took_coupled(state.fired, steps=1)
    return output, after


class CoupledState:
    """The potential after a time step, and what the step is taken again from.

    Args:
        before: the state that the step started from; None for the first of a chain.
        coupled: the equations of the step that leads here, or of the first step from here.

    Attributes:
        outputs, fired: what the step gave.
        version: of the potential that was given out.
    """

    __slots__ = ("_held", "before", "coupled", "fired", "outputs", "version")

    def __init__(self, before: CoupledState | None, coupled: Coupled) -> None:
        self.before, self.coupled = before, coupled
        self.outputs: Outputs | None = None
        self.fired: PackedSpikes | None = None
        self.version = 0
        self._held: Versioned | None = None

    @classmethod
    def first(cls, potential: Tensor, coupled: Coupled) -> CoupledState:
        """The state that a chain starts from."""
        state = cls(None, coupled)
        state._held = Versioned(potential)
        return state

    def reach(self, output: Tensor, potential: Tensor, fired: Tensor | PackedSpikes) -> None:
        """The step has been taken, and this is what it gives out."""
        if not isinstance(fired, PackedSpikes):  # a kernel packs them itself
            fired = PackedSpikes(fired, output.dtype, before=self.before.fired)
        self.outputs, self.fired = Outputs(output), fired
        self._held, self.version = Versioned(potential.detach()), potential._version

    def continued(self) -> None:
        """A step has started from here: from now on the potential can be had from below."""
        if self.before is not None:
            self._held = None

    def overwritten(self) -> None:
        """Somebody has written into the potential that was given out, and no version tells: nothing
        goes on from here."""
        self.version, self._held = OVERWRITTEN, None

    @property
    def held(self) -> Tensor | None:
        """The potential, if it is held and nobody has written into it since."""
        return still_held(self._held, can_be_rebuilt=self.before is not None)

    def potential(self) -> Pair | Tensor:
        """The potential after the step, as the equations hold it: held, left by an earlier scan, or
        scanned. Not to be written into."""
        values, path, state = pass_cache(), [], self
        while True:
            held = state.held
            v = values.get(state) if held is None else self.coupled.opened(held)
            if v is not None:
                break
            path.append(state)
            state = state.before
        apart = max(get_settings().rebuild_interval, math.isqrt(len(path)))
        for left in range(len(path) - 1, -1, -1):
            state = path[left]
            v = state.coupled.taken_again(state.outputs.value(), state.fired, v)
            if left < apart or left % apart == 0:
                values[state] = v
        return v

    def gradient(
        self, grad_output: Tensor | None, grad_potential: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The gradients at the step's input and at the potential before it."""
        after = (
            None if self.coupled.fused else self.potential()
        )  # a kernel takes the step once more
        potentials = self.before.potential(), after
        pass_cache().pop(self, None)  # whoever starts from here has had it
        return self.coupled.gradient_of_step(
            self.outputs.value(), self.fired, *potentials, grad_output, grad_potential
        )

    def input(self) -> Recipe:
        """The step's input as readers below can have it."""
        return rebuilt_input(self.coupled, self.outputs, self.fired)


def link_of(potential: Tensor) -> CoupledState | None:
    """The state that a step left with the potential it returned, unless somebody has written into
    that since."""
    state = getattr(potential.grad_fn, STATE, None)
    if state is None or potential.output_nr != 1 or potential._version != state.version:
        return None
    return state


@graph.with_slots(STATE, FIRED)
class _CoupledStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, current: Tensor, potential: Tensor, state: CoupledState
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        output, after, fired = state.coupled.step(current, potential)
        state.reach(output, after, fired)
        setattr(ctx, STATE, state)
        setattr(ctx, FIRED, state.outputs)
        return output, after

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_potential: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        state: CoupledState | None = getattr(ctx, STATE)
        if state is None:
            raise RuntimeError(SECOND_PASS)
        if grad_output is None and grad_potential is None:
            return None, None, None
        grad_x, grad_v = state.gradient(grad_output, grad_potential)
        release_saved(ctx, STATE, FIRED)
        return grad_x, grad_v, None

"""T time steps of the coupled neuron in one autograd Function: for SpikingJelly's step mode 'm'.

Kept are the outputs, which the next layer keeps anyway, the spikes as bits, and the first
potential. Backward scans forward once more, leaving the charged potentials in the memory of the
gradient that is to be returned, and walks back in closed form, writing each step's gradient over
the potentials that it has just used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import select_backend
from ..neurons.coupled import Coupled, Pair, ones
from ..packed.spikes import PackedSpikes
from ..replay import FIRED, Recipe, attach_inverse_recipe
from ..torch_internals import graph
from ..torch_internals.function import once_differentiable, release_saved
from ..torch_internals.versioned import Versioned
from .chain import INITIAL, initial
from .coupled_step import Outputs, rebuilt_input
from .record import NeuronRecord
from .step import SECOND_PASS


def coupled_sequence(
    coupled: Coupled, currents: Tensor, potential: Tensor, record: NeuronRecord
) -> tuple[Tensor, Tensor]:
    """T time steps.

    Args:
        coupled: the neuron's equations.
        currents: the inputs, ``[T, ...]`` with T at least 1, floating point.
        potential: the potential before the first step, of the shape and dtype of one input.
        reversal: the neuron's own.

    Returns:
        The outputs ``[T, ...]`` and the potential after the last step. Nobody may write into the
        outputs before their backward has run.

    Raises:
        ValueError: the inputs cannot be split in halves.
    """
    call = Call(select_backend(coupled, currents, potential, record.statistics))
    outputs, last = _CoupledSequence.apply(currents, potential, call)
    attach_inverse_recipe(currents, call.input(), record)
    record.statistics.took_coupled(call.fired, steps=len(currents))
    return outputs, last


class Call:
    """What is kept of a sequence."""

    __slots__ = ("coupled", "fired", "outputs", "start")

    def __init__(self, coupled: Coupled) -> None:
        self.coupled = coupled
        self.outputs: Outputs | None = None
        self.fired: PackedSpikes | None = None
        self.start: Versioned | None = None

    def run(self, currents: Tensor, potential: Tensor) -> tuple[Tensor, Tensor]:
        """All steps forward: the outputs and the last potential."""
        self.start = Versioned(initial(potential))
        if self.coupled.fused and not self.coupled.takes(currents, potential):
            self.coupled = self.coupled.plain
        if self.coupled.fused:
            outputs, self.fired, last = self.coupled.sequence(currents, potential)
            self.outputs = Outputs(outputs)
            return outputs, last
        outputs = torch.empty_like(currents)
        fired = torch.empty_like(outputs, dtype=torch.bool)
        v = self.coupled.halves(potential)
        for x, y, s in zip(
            self._steps(currents), self._steps(outputs), self._steps(fired), strict=True
        ):
            v = self.coupled.step_into(x, v, y, s)
        self.outputs, self.fired = Outputs(outputs), PackedSpikes(fired, outputs.dtype)
        return outputs, torch.cat(v, self.coupled.split_dim)

    def gradient(
        self, grad_outputs: Tensor | None, grad_last: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The gradients at the inputs and at the first potential."""
        coupled, outputs = self.coupled, self.outputs.value()
        if coupled.fused:
            return coupled.gradient_of_sequence(
                outputs, self.fired, self.start.get(INITIAL), grad_outputs, grad_last
            )
        charged = torch.empty_like(outputs)
        fired, ms = self._steps(self.fired.fired()), self._steps(charged)
        v = coupled.halves(self.start.get(INITIAL))
        for y, s, m in zip(self._steps(outputs), fired, ms, strict=True):
            v = coupled.again(y, self._spikes(s), v, charged=m)
        del v
        grad_ys = [None] * len(ms) if grad_outputs is None else self._steps(grad_outputs)
        grad_v = None if grad_last is None else coupled.halves(grad_last)
        for m, s, grad_y in zip(reversed(ms), reversed(fired), reversed(grad_ys), strict=True):
            _, grad_v = coupled.gradient(m, self._spikes(s), grad_y, grad_v, out=m)
        return charged, torch.cat(grad_v, coupled.split_dim)

    def _steps(self, sequence: Tensor) -> list[Pair]:
        """The halves of each time step of a sequence."""
        return list(
            zip(*(half.unbind(0) for half in self.coupled.halves(sequence, time=True)), strict=True)
        )

    def _spikes(self, fired: Pair) -> Pair:
        return ones(fired[0], self.fired.dtype), ones(fired[1], self.fired.dtype)

    def input(self) -> Recipe:
        """The inputs as readers below can have them."""
        return rebuilt_input(self.coupled, self.outputs, self.fired, time=True)


@graph.with_slots("call", FIRED)
class _CoupledSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, currents: Tensor, potential: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        outputs, last = call.run(currents, potential)
        ctx.call = call
        setattr(ctx, FIRED, call.outputs)
        return outputs, last

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_outputs: Tensor | None, grad_last: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        call: Call | None = ctx.call
        if call is None:
            raise RuntimeError(SECOND_PASS)
        if grad_outputs is None and grad_last is None:
            return None, None, None
        gradients = call.gradient(grad_outputs, grad_last)
        release_saved(ctx, "call", FIRED)
        return *gradients, None

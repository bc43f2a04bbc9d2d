"""Every other neuron of SpikingJelly, and the user's own: their own step, run again in backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn as nn
from spikingjelly.activation_based import base
from torch import Tensor

from snn_revplugin.bptt.any_neuron import AnyNeuron
from snn_revplugin.bptt.step import step
from snn_revplugin.neurons.transition import States
from snn_revplugin.swap.own_step import OwnStepNeuron
from snn_revplugin.swap.table import AnySwap, register_any

from .spikingjelly_tools import why_counted

# Of these a neuron has one or the other.
SINGLE_STEPS = tuple(
    name
    for name in ("single_step_forward", "single_step_functional_forward")
    if hasattr(base.MemoryModule, name)
)


class SpikingJellyStep:
    """A step of a SpikingJelly neuron, whose states are its memories: see
    ``bptt.any_neuron.HostStep``.

    Args:
        kind: the neuron's class.
    """

    def __init__(self, kind: type[nn.Module]) -> None:
        self.kind = kind

    def states(self, module: nn.Module) -> tuple:
        return tuple(module._memories.values())

    def hold(self, module: nn.Module, states: tuple) -> None:
        module._memories.update(zip(module._memories, states, strict=True))

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        return self.kind.single_step_forward(module, x)

    def fire(self, module: nn.Module, state: Tensor) -> None:
        return None


@cache
def step_of(kind: type[nn.Module]) -> SpikingJellyStep:
    """The step of a neuron class."""
    return SpikingJellyStep(kind)


class AnyOfSpikingJelly(OwnStepNeuron):
    """A neuron of SpikingJelly, or a user's ``MemoryModule``, that saves memory by running its own
    step again in backward. :func:`snn_revplugin.convert` makes it."""

    def single_step_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """One time step from the neuron's own states."""
        states, transition = self._prepared((x,), args, kwargs, "s")
        if transition is None:
            return super().single_step_forward(x, *args, **kwargs)
        return step(transition, x, states, self.record)[0]

    def multi_step_forward(self, x_seq: Tensor, *args: Any, **kwargs: Any) -> Any:
        """T time steps from the neuron's own states."""
        inputs = x_seq.unbind(0) if isinstance(x_seq, Tensor) and x_seq.dim() else ()
        states, transition = self._prepared(inputs, args, kwargs, "m")
        if transition is None:
            return super().multi_step_forward(x_seq, *args, **kwargs)
        outputs = []
        for x in inputs:
            output, states = step(transition, x, states, self.record)
            outputs.append(output)
        return torch.stack(outputs)

    def _prepared(
        self, inputs: tuple[Tensor, ...], args: tuple, kwargs: dict[str, Any], step_mode: str
    ) -> tuple[States, AnyNeuron | None]:
        """The states that a call starts from, and the transition; None for the host's own path."""
        host, states, reason = step_of(self.host_kind), (), None
        if args or kwargs:
            reason = "it is called with more than one input"
        elif not inputs:
            reason = "there is no time step"
        else:
            states = tuple(_as_tensor(each, inputs[0]) for each in host.states(self))
        call = partial(_as_host, host, step_mode)
        return states, self.own_transition(host, inputs, states, call, reason)

    def why_not_own_step(self, x: Tensor, states: States) -> str | None:
        if not all(isinstance(each, Tensor) for each in states):
            return "a state is neither a tensor nor a number"
        if getattr(self, "store_v_seq", False):
            return "store_v_seq keeps the potentials of all time steps"
        return super().why_not_own_step(x, states) or why_counted()


def _as_tensor(state: Any, x: Tensor) -> Any:
    """A state as a tensor: SpikingJelly's memories are numbers before the first step."""
    return torch.full_like(x, state) if isinstance(state, int | float) else state


def _as_host(
    host: SpikingJellyStep, step_mode: str, copy: nn.Module, inputs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """A call on a copy as the host takes it."""
    if step_mode == "s":
        return (host.run(copy, inputs[0]),)
    return host.kind.multi_step_forward(copy, torch.stack(inputs)).unbind(0)


def _why_not(neuron: nn.Module) -> str | None:
    kind, states = type(neuron), neuron._memories.values()
    if kind.forward is not base.MemoryModule.forward:
        return f"{kind.__name__} overrides forward"
    if not states:
        return f"{kind.__name__} holds no state"
    if not all(isinstance(each, Tensor | int | float) for each in states):
        return f"a state of {kind.__name__} is neither a tensor nor a number"
    if all(getattr(kind, name) is getattr(base.MemoryModule, name) for name in SINGLE_STEPS):
        return f"{kind.__name__} has no single time step"
    return None


register_any(AnySwap(base.MemoryModule, AnyOfSpikingJelly, _why_not))

"""Every other neuron of SpikingJelly, and the user's own: their own step, run again in backward; or
their whole call, of those that have no single time step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn as nn
from spikingjelly.activation_based import base, neuron
from torch import Tensor

from snn_revplugin.bptt.module_copy import HELD, copy_of
from snn_revplugin.bptt.step import step
from snn_revplugin.bptt.surroundings import generators_of, positions_of, set_positions
from snn_revplugin.bptt.trial import Unsuitable
from snn_revplugin.bptt.whole_call import whole_call
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
ONLINE = getattr(neuron, "OTTTLIFNode", None)  # it gives out a trace beside its spikes
OF_STEPS = "v", "c"  # what the host's neurons without memories hold of their last step


class SpikingJellyStep:
    """A step of a SpikingJelly neuron, whose states are its memories, and those of modules inside
    it: see ``bptt.any_neuron.HostStep``.

    Args:
        kind: the neuron's class.
        inside: the names of the modules inside it that have memories.
    """

    whole = False

    def __init__(self, kind: type[nn.Module], inside: tuple[str, ...] = ()) -> None:
        self.kind, self.inside = kind, inside

    def states(self, module: nn.Module) -> tuple:
        own = tuple(module._memories.values())
        if not self.inside:
            return own
        return own + tuple(v for memories in self._memories(module) for v in memories.values())

    def hold(self, module: nn.Module, states: tuple) -> None:
        if not self.inside:
            module._memories.update(zip(module._memories, states, strict=True))
            return
        given = iter(states)
        for memories in (module._memories, *self._memories(module)):
            memories.update({name: next(given) for name in memories})

    def _memories(self, module: nn.Module) -> list[dict[str, Any]]:
        return [module.get_submodule(each)._memories for each in self.inside]

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        return self.kind.single_step_forward(module, x)

    def fire(self, module: nn.Module, state: Tensor) -> None:
        return None


class ForwardStep(SpikingJellyStep):
    """A step of a neuron that does more in its ``forward`` than to choose a step mode."""

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        return self.kind.forward(module, x)


class SpikingJellyCall:
    """A call of a neuron on a whole sequence. Its states are those memories that hold numbers or
    tensors; after the call also the tensors that it leaves in a module without memories.

    Args:
        kind: the neuron's class.
        name: of the method that is called.
    """

    whole = True

    def __init__(self, kind: type[nn.Module], name: str) -> None:
        self.kind, self._name = kind, name

    def _names(self, module: nn.Module) -> list[str]:
        memories = getattr(module, "_memories", {})
        return [name for name, value in memories.items() if isinstance(value, float | Tensor)]

    def states(self, module: nn.Module) -> tuple:
        own = tuple(module._memories[name] for name in self._names(module))
        return own + module.__dict__.get(HELD, ())

    def hold(self, module: nn.Module, states: tuple) -> None:
        for name, state in zip(self._names(module), states, strict=False):
            module._memories[name] = state
        module.__dict__.pop(HELD, None)

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        outputs = getattr(self.kind, self._name)(module, x)
        seen = [outputs]
        for name in self._names(module):
            state = module._memories[name]
            if any(state is each for each in seen):  # two of the host's memories are one tensor
                state = module._memories[name] = state.clone()
            seen.append(state)
        if not hasattr(module, "_memories"):
            left = (module.__dict__.get(name) for name in OF_STEPS)
            own = [each for each in left if isinstance(each, Tensor) and each is not outputs]
            module.__dict__[HELD] = tuple(own)
        return outputs

    def fire(self, module: nn.Module, state: Tensor) -> None:
        return None


@cache
def step_of(kind: type[nn.Module], inside: tuple[str, ...] = ()) -> SpikingJellyStep:
    """The step of a neuron class."""
    return (ForwardStep if _forward_does_more(kind) else SpikingJellyStep)(kind, inside)


@cache
def call_of(kind: type[nn.Module]) -> SpikingJellyCall:
    """The call of a neuron class on a whole sequence."""
    return SpikingJellyCall(kind, "forward" if _forward_does_more(kind) else "multi_step_forward")


@cache
def _forward_does_more(kind: type[nn.Module]) -> bool:
    return kind.forward is not base.MemoryModule.forward


class AnyOfSpikingJelly(OwnStepNeuron):
    """A neuron of SpikingJelly, or a user's ``MemoryModule``, that saves memory by running its own
    step, or its own call, again in backward. :func:`snn_revplugin.convert` makes it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A call in the neuron's step mode."""
        if not _forward_does_more(self.host_kind) or self.is_compiled():
            return super().forward(*args, **kwargs)
        if isinstance(self, base.MemoryModule) and self.step_mode == "s":
            found = self._one_step(args, kwargs)
        else:
            found = self._whole_call(args, kwargs)
        if isinstance(found, Unsuitable):
            self.refuse(found)
            return super().forward(*args, **kwargs)
        return found

    def single_step_forward(self, *args: Any, **kwargs: Any) -> Any:
        """One time step from the neuron's own states."""
        if not self._is_inside() and not self.is_compiled():
            found = self._one_step(args, kwargs)
            if not isinstance(found, Unsuitable):
                return found
            self.refuse(found)
        return super().single_step_forward(*args, **kwargs)

    def multi_step_forward(self, *args: Any, **kwargs: Any) -> Any:
        """T time steps from the neuron's own states."""
        if not self._is_inside() and not self.is_compiled():
            reason = self._steps(args, kwargs)
            if not isinstance(reason, Unsuitable):
                return reason
            found = self._whole_call(args, kwargs)
            if not isinstance(found, Unsuitable):
                return found
            self.refuse(reason)
        return super().multi_step_forward(*args, **kwargs)

    def _one_step(self, args: tuple, kwargs: dict[str, Any]) -> Tensor | Unsuitable:
        host, reason = self._host_step(), _why_not_inputs(args, kwargs)
        if reason is not None:
            return Unsuitable(reason)
        states = self._states(host, args, "s")
        found = self.try_transition(host, args, states, partial(_as_host, host, "s"))
        if isinstance(found, Unsuitable):
            return found
        return step(found, args[0], states, self.record)[0]

    def _steps(self, args: tuple, kwargs: dict[str, Any]) -> Tensor | Unsuitable:
        """T time steps one after the other."""
        host, reason = self._host_step(), _why_not_inputs(args, kwargs, 1)
        if reason is None and not _has_single_steps(self.host_kind):
            reason = "it has no single time step"
        if reason is not None:
            return Unsuitable(reason)
        (x_seq,), outputs = args, []
        inputs, states = x_seq.unbind(0), self._states(host, args, "m")
        found = self.try_transition(host, inputs, states, partial(_as_host, host, "m"))
        if isinstance(found, Unsuitable):
            return found
        for x in inputs:
            output, states = step(found, x, states, self.record)
            outputs.append(output)
        return torch.stack(outputs)

    def _whole_call(self, args: tuple, kwargs: dict[str, Any]) -> Tensor | Unsuitable:
        host, reason = call_of(self.host_kind), _why_not_inputs(args, kwargs, 1)
        if reason is not None:
            return Unsuitable(reason)
        states = self._states(host, args, "m")
        found = self.try_transition(host, args, states, partial(_whole_as_host, host))
        if isinstance(found, Unsuitable):
            return found
        self.record.in_call = True
        try:
            outputs, _ = whole_call(self, found, args[0], states, self.record)
        finally:
            self.record.in_call = False
        self.__dict__.pop(HELD, None)  # they are the module's
        return outputs

    def _is_inside(self) -> bool:
        """Whether the host's code calls, from inside a call that is taken as a whole."""
        return _forward_does_more(self.host_kind) or self.record.in_call

    def _host_step(self) -> SpikingJellyStep:
        host = self.record.host_step
        if host is None:
            host = self.record.host_step = step_of(self.host_kind, _inside(self))
        return host

    def _states(
        self, host: SpikingJellyStep | SpikingJellyCall, args: tuple[Tensor], step_mode: str
    ) -> tuple:
        """The states that a call starts from, as tensors where they can be."""
        x = args[0] if step_mode == "s" else args[0][0]
        if not isinstance(self, base.MemoryModule):
            return ()
        if hasattr(self, "materialize_states"):
            own = self.materialize_states(args, tuple(self._memories.values()), step_mode)
            self._memories.update(zip(self._memories, own, strict=True))
        states = host.states(self)
        if getattr(host, "inside", ()):
            return _as_after_a_step(host, self, x, states)
        return tuple(_as_tensor(each, x) for each in states)

    def why_not_own_step(self, x: Tensor, states: States) -> str | None:
        if not all(isinstance(each, Tensor) for each in states):
            return "a state is neither a tensor nor a number"
        if getattr(self, "store_v_seq", False):
            return "store_v_seq keeps the potentials of all time steps"
        return super().why_not_own_step(x, states) or why_counted()


def _why_not_inputs(args: tuple, kwargs: dict[str, Any], dimensions: int = 0) -> str | None:
    """Why a call with these arguments has to take the host's path."""
    if kwargs or len(args) != 1:
        return "it is called with more than one input"
    if not isinstance(args[0], Tensor):
        return "the input is not a floating-point tensor"
    if dimensions and (not args[0].dim() or not len(args[0])):
        return "there is no time step"
    return None


def _has_single_steps(kind: type[nn.Module]) -> bool:
    return any(getattr(kind, n) is not getattr(base.MemoryModule, n) for n in SINGLE_STEPS)


def _inside(module: nn.Module) -> tuple[str, ...]:
    """The names of the modules inside a neuron that have memories of their own."""
    return tuple(
        name for name, each in module.named_modules() if name and getattr(each, "_memories", None)
    )


def _as_tensor(state: Any, x: Tensor) -> Any:
    """A state as a tensor: SpikingJelly's memories are numbers before the first step."""
    number = isinstance(state, int | float) and isinstance(x, Tensor)
    return torch.full_like(x, state) if number else state


def _as_after_a_step(host: SpikingJellyStep, module: nn.Module, x: Tensor, states: tuple) -> tuple:
    """The states of a neuron with modules inside: only a step tells the shapes of theirs."""
    if all(isinstance(each, Tensor) for each in states) or not torch.is_grad_enabled():
        return states
    copy, generators = copy_of(module, host.kind), generators_of(module, x)
    positions = positions_of(generators)
    with torch.no_grad():
        host.run(copy, x.clone())
    set_positions(generators, positions)
    return tuple(_as_tensor(a, b) for a, b in zip(states, host.states(copy), strict=True))


def _as_host(
    host: SpikingJellyStep, step_mode: str, copy: nn.Module, inputs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """A call on a copy as the host takes it."""
    if step_mode == "s":
        return (host.run(copy, inputs[0]),)
    return host.kind.multi_step_forward(copy, torch.stack(inputs)).unbind(0)


def _whole_as_host(
    host: SpikingJellyCall, copy: nn.Module, inputs: Sequence[Tensor]
) -> tuple[Tensor]:
    return (host.run(copy, inputs[0]),)


def _why_not(neuron_: nn.Module) -> str | None:
    kind = type(neuron_)
    if ONLINE is not None and isinstance(neuron_, ONLINE):
        return f"{kind.__name__} learns online: no graph connects its steps, and it keeps little"
    if not _forward_does_more(kind):
        return None
    giver = next(each for each in kind.__mro__ if "forward" in vars(each))
    of_host = f"{giver.__module__}.".startswith(f"{neuron.__name__}.")
    return None if of_host else f"{kind.__name__} overrides forward"


register_any(AnySwap(base.StepModule, AnyOfSpikingJelly, _why_not))

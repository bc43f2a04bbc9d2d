"""Every other neuron of snnTorch, and the user's own: their own step, run again in backward; or
their whole call, of those that take a sequence and no states."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import snntorch
import torch
import torch.nn as nn
from torch import Tensor

from snn_revplugin.bptt.module_copy import HELD
from snn_revplugin.bptt.step import step
from snn_revplugin.bptt.trial import Unsuitable
from snn_revplugin.bptt.whole_call import whole_call
from snn_revplugin.neurons.transition import States
from snn_revplugin.swap.own_step import OwnStepNeuron
from snn_revplugin.swap.table import AnySwap, register_any

STATES_PASSED = "states were passed with init_hidden=True"  # the host's error says it best


class SnntorchStep:
    """A step of a snnTorch neuron, whose states are attributes: see ``bptt.any_neuron.HostStep``.

    Args:
        kind: the neuron's class.
    """

    whole = False

    def __init__(self, kind: type[nn.Module]) -> None:
        self.kind, self.names = kind, state_names(kind)

    def states(self, module: nn.Module) -> tuple:
        buffers = module._buffers
        return tuple(buffers[n] if n in buffers else getattr(module, n) for n in self.names)

    def hold(self, module: nn.Module, states: tuple) -> None:
        for name, state in zip(self.names, states, strict=True):
            place = module._buffers if name in module._buffers else module.__dict__
            place[name] = state

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        return outputs_of(self.kind.forward(module, x, *self.passed(module)))

    def fire(self, module: nn.Module, state: Tensor) -> Tensor | None:
        return None if module.inhibition else module.fire(state)

    def passed(self, module: nn.Module) -> tuple:
        """The states that a module holds as its ``forward`` takes them."""
        return () if module.init_hidden else self.states(module)

    def flat(self, result: tuple) -> tuple:
        """What ``forward`` returned: outputs and states side by side."""
        return result


class DeltaStep(SnntorchStep):
    """A step of ``DeltaLeaky``, which takes and gives its potential and the one before as a pair,
    in which None stands for zeros."""

    def __init__(self, kind: type[nn.Module]) -> None:
        self.kind, self.names = kind, ("mem", "mem_prev")

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        outputs = super().run(module, x)
        module.mem_prev = module.mem_prev.clone()  # it is the state that came in
        return outputs

    def fire(self, module: nn.Module, state: Tensor) -> None:
        return None

    def passed(self, module: nn.Module) -> tuple:
        return () if module.init_hidden else (self.states(module),)

    def flat(self, result: tuple) -> tuple:
        return result[0], *result[1]


class SnntorchCall:
    """A call of a neuron on a whole sequence, which takes no states. What it returns beside its
    outputs counts as states after the call.

    Args:
        kind: the neuron's class.
    """

    whole = True

    def __init__(self, kind: type[nn.Module]) -> None:
        self.kind = kind

    def states(self, module: nn.Module) -> tuple:
        return module.__dict__.get(HELD, ())

    def hold(self, module: nn.Module, states: tuple) -> None:
        module.__dict__.pop(HELD, None)

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        result = self.kind.forward(module, x)
        module.__dict__[HELD] = result[1:] if isinstance(result, tuple) else ()
        return outputs_of(result)

    def fire(self, module: nn.Module, state: Tensor) -> None:
        return None


@cache
def step_of(kind: type[nn.Module]) -> SnntorchStep:
    """The step of a neuron class."""
    return (DeltaStep if kind.forward is snntorch.DeltaLeaky.forward else SnntorchStep)(kind)


@cache
def call_of(kind: type[nn.Module]) -> SnntorchCall:
    """The call of a neuron class on a whole sequence."""
    return SnntorchCall(kind)


@cache
def state_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """The names of a neuron class's states: what its ``forward``, or that of the host's class
    behind it, takes beside the input. Empty where it takes anything else."""
    given = _beside_input(kind)
    named = all(each.kind is each.POSITIONAL_OR_KEYWORD and each.default is None for each in given)
    return tuple(each.name for each in given) if named else ()


@cache
def _beside_input(kind: type[nn.Module]) -> list[inspect.Parameter]:
    """The arguments that the ``forward`` of a class, or that of the host's class behind it, takes
    beside the input."""
    for each in kind.__mro__:
        if "forward" in vars(each):
            given = list(inspect.signature(each.forward).parameters.values())
            if not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in given):
                return given[2:]
            # It hands them on to the class behind.
    return []


def outputs_of(result: Any) -> Any:
    """The outputs of what a neuron's ``forward`` returns."""
    return result[0] if isinstance(result, tuple) else result


class AnyOfSnntorch(OwnStepNeuron):
    """A neuron of snnTorch, or a user's subclass, that saves memory by running its own step, or its
    own call, again in backward. :func:`snn_revplugin.convert` makes it."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        """One time step, or a sequence; arguments and results as of the host's class."""
        host = step_of(self.host_kind)
        if not host.names:
            return self._whole_call(input_, args, kwargs)
        states, passed = self._states(host, input_, args, kwargs)
        call = partial(_as_host, host, states if passed else ())
        reason = STATES_PASSED if self.init_hidden and passed else None
        transition = self.own_transition(host, (input_,), states, call, reason)
        if transition is None:
            return super().forward(input_, *args, **kwargs)
        outputs, after = step(transition, input_, states, self.record)
        return self._given_out(outputs, after, transition.fed_back)

    def _states(
        self, host: SnntorchStep, x: Tensor, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, bool]:
        """The states that a call starts from, and whether any was passed."""
        given = dict(zip(host.names, args, strict=False)) | kwargs
        states = tuple(
            held if given.get(name) is None else given[name]
            for name, held in zip(host.names, host.states(self), strict=True)
        )
        return states, any(each is not None for each in given.values())

    def _given_out(self, outputs: Tensor, after: States, fed_back: bool) -> Any:
        if self.init_hidden and not self.output:
            return outputs
        return after if fed_back else (outputs, *after)

    def _whole_call(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        host = call_of(self.host_kind)
        reason = "its forward takes something else than an input and states"
        call = partial(_whole_as_host, host)
        transition = self.own_transition(
            host, (x,), (), call, reason if args or kwargs or _beside_input(host.kind) else None
        )
        if transition is None:
            return super().forward(x, *args, **kwargs)
        outputs, others = whole_call(self, transition, x, (), self.record)
        del self.__dict__[HELD]  # they are the caller's
        return (outputs, *others) if others else outputs


class AnyDeltaLeaky(AnyOfSnntorch):
    """``DeltaLeaky``, by its own step."""

    def _states(
        self, host: SnntorchStep, x: Tensor, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, bool]:
        given = next(iter((*args, *kwargs.values())), None)
        states = host.states(self) if given is None else given
        zeros = (torch.zeros_like(x) if each is None else each for each in states)
        return tuple(zeros), given is not None

    def _given_out(self, outputs: Tensor, after: States, fed_back: bool) -> Any:
        return outputs, after


def _as_host(
    host: SnntorchStep, passed: States, copy: nn.Module, inputs: Sequence[Tensor]
) -> tuple[Tensor]:
    """A call on a copy as the host takes it: with the states that were passed, or other ones for
    an input of another shape; or without."""
    (x,) = inputs
    if passed and len(passed[0]) == len(x):
        host.hold(copy, passed)
    result = host.kind.forward(copy, x, *(host.passed(copy) if passed else ()))
    outputs, states = outputs_of(result), host.states(copy)
    if isinstance(result, tuple):
        given = host.flat(result)
        own = states if states[0] is outputs else (outputs, *states)
        if len(own) != len(given) or any(a is not b for a, b in zip(own, given, strict=True)):
            raise Unsuitable("its forward returns something else than outputs and states")
    return (outputs,)


def _whole_as_host(host: SnntorchCall, copy: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor]:
    return (host.run(copy, inputs[0]),)


def _why_not(neuron: nn.Module) -> str | None:
    kind = type(neuron)
    takes = bool(state_names(kind)) or not _beside_input(kind)
    return None if takes else f"{kind.__name__}.forward takes no states"


for _host in (snntorch.SpikingNeuron, snntorch.LeakyParallel):
    register_any(AnySwap(_host, AnyOfSnntorch, _why_not))
register_any(AnySwap(snntorch.DeltaLeaky, AnyDeltaLeaky, lambda neuron: None))

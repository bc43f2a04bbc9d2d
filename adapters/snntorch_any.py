"""Every other neuron of snnTorch, and the user's own: their own step, run again in backward."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import snntorch
import torch.nn as nn
from torch import Tensor

from snn_revplugin.bptt.step import step
from snn_revplugin.bptt.trial import Unsuitable
from snn_revplugin.neurons.transition import States
from snn_revplugin.swap.own_step import OwnStepNeuron
from snn_revplugin.swap.table import AnySwap, register_any


class SnntorchStep:
    """A step of a snnTorch neuron, whose states are attributes: see ``bptt.any_neuron.HostStep``.

    Args:
        kind: the neuron's class.
    """

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
        passed = () if module.init_hidden else self.states(module)
        return outputs_of(self.kind.forward(module, x, *passed))

    def fire(self, module: nn.Module, state: Tensor) -> Tensor | None:
        return None if module.inhibition else module.fire(state)


@cache
def step_of(kind: type[nn.Module]) -> SnntorchStep:
    """The step of a neuron class."""
    return SnntorchStep(kind)


@cache
def state_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """The names of a neuron class's states: what its ``forward``, or that of the host's class
    behind it, takes beside the input. Empty where it takes anything else."""
    for each in kind.__mro__:
        if "forward" not in vars(each):
            continue
        given = list(inspect.signature(each.forward).parameters.values())
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in given):
            continue  # it hands them on to the class behind
        states = given[2:]
        named = all(s.kind is s.POSITIONAL_OR_KEYWORD and s.default is None for s in states)
        return tuple(s.name for s in states) if named else ()
    return ()


def outputs_of(result: Any) -> Any:
    """The outputs of what a neuron's ``forward`` returns."""
    return result[0] if isinstance(result, tuple) else result


class AnyOfSnntorch(OwnStepNeuron):
    """A neuron of snnTorch, or a user's subclass, that saves memory by running its own step again
    in backward. :func:`snn_revplugin.convert` makes it."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        """One time step; arguments and results as of the host's class."""
        host = step_of(self.host_kind)
        given = dict(zip(host.names, args, strict=False)) | kwargs
        passed = any(each is not None for each in given.values())
        states = tuple(
            held if given.get(name) is None else given[name]
            for name, held in zip(host.names, host.states(self), strict=True)
        )
        call = partial(_as_host, host, states if passed else ())
        reason = self._why_host(states, passed)
        transition = self.own_transition(host, (input_,), states, call, reason)
        if transition is None:
            return super().forward(input_, *args, **kwargs)
        outputs, after = step(transition, input_, states, self.record)
        if self.init_hidden and not self.output:
            return outputs
        return after if transition.fed_back else (outputs, *after)

    def _why_host(self, states: tuple, passed: bool) -> str | None:
        if not states:
            return "its forward takes something else than an input and states"
        if self.init_hidden and passed:
            return "states were passed with init_hidden=True"  # the host's error says it best
        return None


def _as_host(
    host: SnntorchStep, passed: States, copy: nn.Module, inputs: Sequence[Tensor]
) -> tuple[Tensor]:
    """A call on a copy as the host takes it: with the states that were passed, or other ones for
    an input of another shape; or without."""
    (x,) = inputs
    if passed and len(passed[0]) != len(x):
        passed = host.states(copy)
    result = host.kind.forward(copy, x, *passed)
    outputs, states = outputs_of(result), host.states(copy)
    if isinstance(result, tuple):
        own = states if states[0] is outputs else (outputs, *states)
        if len(own) != len(result) or any(a is not b for a, b in zip(own, result, strict=True)):
            raise Unsuitable("its forward returns something else than outputs and states")
    return (outputs,)


def _why_not(neuron: nn.Module) -> str | None:
    kind = type(neuron)
    return None if state_names(kind) else f"{kind.__name__}.forward takes no states"


register_any(AnySwap(snntorch.SpikingNeuron, AnyOfSnntorch, _why_not))

"""Neurons of no host: a plain module whose ``forward`` takes and returns its states."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, ClassVar

import torch.nn as nn
from torch import Tensor

from ..bptt.module_copy import HELD
from ..bptt.step import step
from ..bptt.trial import BadStep
from .hosts import Host, register_host
from .own_step import OwnStepNeuron, bad_step
from .table import AnySwap, register_any


class PlainStep:
    """A step of a plain module, see ``bptt.any_neuron.HostStep``.

    Args:
        kind: the module's class.
        count: of states.
    """

    whole = False

    def __init__(self, kind: type[nn.Module], count: int) -> None:
        self.kind, self.count = kind, count

    def states(self, module: nn.Module) -> tuple:
        return module.__dict__.get(HELD, ())

    def hold(self, module: nn.Module, states: tuple) -> None:
        module.__dict__[HELD] = states

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        outputs, states = split(self.kind.forward(module, x, *self.states(module)), self.count)
        self.hold(module, states)
        return outputs

    def fire(self, module: nn.Module, state: Tensor) -> None:
        return None


@cache
def _step_of(kind: type[nn.Module], count: int) -> PlainStep:
    return PlainStep(kind, count)


def split(result: Any, count: int) -> tuple[Any, tuple]:
    """Outputs and states of what ``forward`` returned: ``(outputs, *states)``."""
    if not isinstance(result, tuple) or len(result) != 1 + count:
        raise BadStep(
            f"its forward returns {_named(result)}",
            f"it must return a tuple of its outputs and {count} state{'s' * (count != 1)}",
        )
    return result[0], result[1:]


def _named(result: Any) -> str:
    return f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__


class AnyPlain(OwnStepNeuron):
    """A plain module that saves memory by running its own step again in backward."""

    declared = True
    state_count: ClassVar[int]

    def forward(self, x: Tensor, *states: Any) -> Any:
        """One time step; arguments and results as of the module's class."""
        host = _step_of(self.host_kind, self.state_count)
        complete = len(states) == host.count and all(isinstance(each, Tensor) for each in states)
        reason = None if complete else "it is called without its states"
        call = partial(_as_host, host, states)
        transition = self.own_transition(host, (x,), states, call, reason)
        if transition is None:
            return super().forward(x, *states)
        try:
            outputs, after = step(transition, x, states, self.record)
        except BadStep as reason:  # of a later step than the one that was tried
            raise bad_step(self.host_kind, reason) from None
        del self.__dict__[HELD]  # they are the caller's
        return after if transition.fed_back else (outputs, *after)


def _as_host(
    host: PlainStep, passed: tuple, copy: nn.Module, inputs: Sequence[Tensor]
) -> tuple[Tensor]:
    """A call on a copy, with the states that it holds, or else those that were passed."""
    if not host.states(copy):
        host.hold(copy, tuple(each.detach() for each in passed))
    return (host.run(copy, inputs[0]),)


def register_neuron(kind: type[nn.Module], states: tuple[str, ...]) -> None:
    """Let ``convert`` swap a neuron of no host: a module with ``forward(x, *states)`` that returns
    ``(outputs, *states)``, all of them tensors.

    Args:
        kind: the module's class.
        states: the names of the states in ``forward``, in their order.

    Raises:
        TypeError: ``kind`` is no module class.
        ValueError: ``forward`` has other arguments than an input and these states.

    >>> class Leaky(nn.Module):
    ...     def forward(self, x, v):
    ...         v = 0.9 * v + x
    ...         return torch.sigmoid(v - 1), v
    >>> register_neuron(Leaky, states=("v",))
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind must be a subclass of torch.nn.Module, got {kind!r}")
    _, _, *given = inspect.signature(kind.forward).parameters
    if not states or tuple(given) != tuple(states):
        raise ValueError(
            f"states must name what {kind.__name__}.forward takes beside its input,"
            f" {tuple(given)}, got {tuple(states)}"
        )
    mixin = type("AnyPlain", (AnyPlain,), {"state_count": len(states)})
    name = f"{kind.__module__}.{kind.__qualname__}"
    register_host(Host(name, lambda module: isinstance(module, kind)))
    register_any(AnySwap(kind, mixin, lambda neuron: None))

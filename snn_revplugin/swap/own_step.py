"""What every neuron has that runs by its own step, whatever its host."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn as nn

from ..bptt.any_neuron import AnyNeuron, HostStep
from ..bptt.module_copy import LEFT
from ..bptt.trial import BadStep, HostCall, Inputs, Unsuitable, any_neuron
from ..neurons.transition import States
from .module import ReversibleNeuron


class OwnStepNeuron(ReversibleNeuron):
    """A neuron that saves memory by running its own step again in backward.

    Attributes:
        declared: whether the user has declared the class to be a neuron (``@reversible``,
            ``register_neuron``). A step that is none is an error then; of other classes the host's
            path is taken.
    """

    declared: ClassVar[bool] = False

    def __getattr__(self, name: str) -> Any:
        left = self.__dict__.get(LEFT, {}).get(name)
        return super().__getattr__(name) if left is None else left.tensor(name)

    def end(self) -> None:
        for name, left in self.__dict__.pop(LEFT, {}).items():
            self.__dict__.setdefault(name, left.tensor(name))
        super().end()

    def own_transition(
        self,
        host: HostStep,
        inputs: Inputs,
        states: States,
        call: HostCall,
        reason: str | None = None,
    ) -> AnyNeuron | None:
        """The transition of a call's time steps, or None where the call takes the host's own path;
        the statistics then have the reason.

        Args:
            host, inputs, states, call: as of ``bptt.trial.any_neuron``.
            reason: why the host's path has to be taken, if that is known already.

        Raises:
            TypeError: the step of a class that was declared to be a neuron is none. Nothing has
                been written then.
        """
        if self.is_compiled():
            return None
        found = self.try_transition(host, inputs, states, call, reason)
        return found if isinstance(found, AnyNeuron) else self.refuse(found)

    def is_compiled(self) -> bool:
        """Whether the call is one under ``torch.compile``, which takes the host's own path; noted
        then."""
        compiled = torch.compiler.is_compiling()
        if compiled:
            self.note_compiled_fallback()
        return compiled

    def try_transition(
        self,
        host: HostStep,
        inputs: Inputs,
        states: States,
        call: HostCall,
        reason: str | None = None,
    ) -> AnyNeuron | Unsuitable:
        """:meth:`own_transition`, or why there is none."""
        reason = reason or self.why_not_own_step(inputs[0], states)
        if reason is not None:
            return Unsuitable(reason)
        return any_neuron(host, self, inputs, states, call, self.record)

    def refuse(self, reason: Unsuitable) -> None:
        """Note that a call takes the host's own path.

        Raises:
            TypeError: as of :meth:`own_transition`.
        """
        if self.declared and isinstance(reason, BadStep):
            raise bad_step(self.host_kind, reason)
        self.note_fallback(str(reason))

    def why_not_own_step(self, x: object, states: States) -> str | None:
        """Why the host's own path has to be taken, before any trial; None if it need not."""
        if not all(isinstance(each, torch.Tensor) for each in states):
            return "a state is not a tensor"
        # Not asked of all parameters at each time step: nearly always the input has a gradient.
        has_gradient = getattr(x, "requires_grad", False)
        others = () if has_gradient else (*states[:-1], *self.parameters())
        return self.why_fallback(x, states[-1] if states else x, *others)


def bad_step(kind: type[nn.Module], reason: BadStep) -> TypeError:
    """The error about a class that was declared to be a neuron and whose step is none."""
    return TypeError(
        f"{kind.__name__}: {reason}, but {reason.expected}. To train it as it is, do not declare"
        " it: leave out @reversible or register_neuron, or set reversible=False on the instance"
    )

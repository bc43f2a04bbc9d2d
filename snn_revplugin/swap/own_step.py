"""What every neuron has that runs by its own step, whatever its host."""

from __future__ import annotations

import torch

from ..bptt.any_neuron import AnyNeuron, HostStep
from ..bptt.trial import HostCall, Inputs, any_neuron
from ..neurons.transition import States
from .module import ReversibleNeuron


class OwnStepNeuron(ReversibleNeuron):
    """A neuron that saves memory by running its own step again in backward."""

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
        """
        if torch.compiler.is_compiling():
            self.note_compiled_fallback()
            return None
        reason = reason or self.why_not_own_step(inputs[0], states)
        found = reason or any_neuron(host, self, inputs, states, call, self.record)
        if isinstance(found, AnyNeuron):
            return found
        self.note_fallback(found)
        return None

    def why_not_own_step(self, x: object, states: States) -> str | None:
        """Why the host's own path has to be taken, before any trial; None if it need not."""
        if not all(isinstance(each, torch.Tensor) for each in states):
            return "a state is not a tensor"
        # Not asked of all parameters at each time step: nearly always the input has a gradient.
        has_gradient = getattr(x, "requires_grad", False)
        others = () if has_gradient else (*states[:-1], *self.parameters())
        return self.why_fallback(x, states[-1], *others)

"""What both kinds of kernels share: a transition in the place of a plain neuron.

What no kernel computes (the repetition of single steps, inverses, properties) is the plain
neuron's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..neurons.kernel_spec import KernelSpec
from ..neurons.transition import States, StepView, Transition
from .launch import kernels
from .surrogate_constants import SURROGATES

_specs: dict[KernelSpec, KernelSpec] = {}


class TritonTransition(Transition):
    """A neuron whose time steps are computed by fused kernels.

    Args:
        plain: the neuron's equations, for which :meth:`.Transition.why_no_kernel` gives no reason.
        interpreted: whether Triton's interpreter runs the kernels.
    """

    module: str  # of the kernels

    def __init__(self, plain: Transition, interpreted: bool) -> None:
        self._plain, self.interpreted = plain, interpreted
        self.code = kernels(interpreted, self.module)
        self.surrogate = plain.surrogate
        self.nodes, self.from_outputs = plain.nodes, plain.from_outputs
        self.has_reset_signal = plain.has_reset_signal
        self.reset_follows_spikes = plain.reset_follows_spikes
        self.states_follow_charged = plain.states_follow_charged
        self.reads_input, self.reads_before = plain.reads_input, plain.reads_before
        self.invertible, self.single_steps_only = plain.invertible, plain.single_steps_only
        self.parameter_names, self.graded_factor = plain.parameter_names, plain.graded_factor
        self._specs: dict[tuple, KernelSpec] = {}
        constants = SURROGATES[plain.surrogate.name](*plain.surrogate.parameters)
        self._constants = (*map(float, constants), *(0.0,) * (3 - len(constants)))

    @property
    def plain(self) -> Transition:
        return self._plain

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return self.plain.parameters

    @property
    def spikes_carry_gradient(self) -> bool:
        return self.plain.spikes_carry_gradient

    @property
    def decay(self) -> float:
        return self.plain.decay

    @property
    def thresholds(self) -> tuple[float, float]:
        return self.plain.thresholds

    def with_parameters(self, parameters: Sequence[Tensor]) -> Transition:
        return self.plain.with_parameters(parameters)

    def check_unchanged(self) -> None:
        self.plain.check_unchanged()

    def check_values(self) -> None:
        self.plain.check_values()

    def again(self, view: StepView, states: States) -> tuple[Tensor | None, States]:
        return self.plain.again(view, states)

    def states_of(self, charged: Tensor, view: StepView) -> States:
        return self.plain.states_of(charged, view)

    def charged_of(self, view: StepView) -> Tensor:
        return self.plain.charged_of(view)

    def invert(self, view: StepView) -> States:
        return self.plain.invert(view)

    def spec(self, x: torch.dtype, state: torch.dtype, on_cuda: bool) -> KernelSpec:
        """What the kernels are compiled for, of input and state of these dtypes."""
        key = x, state, on_cuda
        spec = self._specs.get(key)
        if spec is None:
            spec = self.plain.kernel_spec(*key)
            spec = self._specs[key] = _specs.setdefault(spec, spec)  # launches compare by identity
        return spec

"""snnTorch's neuron of Lapicque, ``snntorch.Lapicque``: a leaky neuron given as an RC circuit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from .leaky import Leaky
from .transition import Gradients, Needed, StepView


@dataclass(eq=False)
class Lapicque(Leaky):
    """snnTorch's ``Lapicque``, whose time step is ``dt``, resistance R and capacitance C:

        a leaky neuron, see :class:`.leaky.Leaky`, of the current R (1 / (R C)) dt x
        with beta = 1 - dt / (R C), which is not clamped

    It resets by 'subtract', 'clear' or 'none'.

    Args:
        gains: what the current is multiplied with, one after the other.
    """

    gains: tuple[Tensor, ...] = ()

    slope_of_clamp = 1.0

    @property
    def decays(self) -> Tensor:
        return self.beta

    @cached_property
    def decay(self) -> float:
        return self.beta.detach().abs().min().item()

    def charge(
        self, x: Tensor, v: Tensor, signal: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        return super().charge(self._driving(x), v, signal, out)

    def invert_charge(self, h: Tensor, x: Tensor, signal: Tensor | None) -> Tensor:
        return super().invert_charge(h, self._driving(x), signal)

    def recover_current(self, h: Tensor, v: Tensor, signal: Tensor | None) -> Tensor:
        current = super().recover_current(h, v, signal)
        for gain in reversed(self.gains):
            current = current / gain
        return current

    def gradient_of_charge(
        self, grad_h: Tensor, view: StepView, needed: Needed, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        grad_x, grad_before, grads = super().gradient_of_charge(grad_h, view, needed, out)
        for gain in reversed(self.gains):
            grad_x = grad_x * gain
        return grad_x, grad_before, grads

    def _driving(self, x: Tensor) -> Tensor:
        for gain in self.gains:
            x = x * gain
        return x

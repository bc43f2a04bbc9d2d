"""A neuron's equations: charge, fire, reset, their inverse and their derivative. No autograd in
here.

One time step takes the membrane potential ``v`` and the input current ``x`` to spikes ``s`` and the
next potential:

    charge      h = charge(x, v)
    fire        s = H(h - threshold)
    reset       v' = reset(h, s)

and back again, given the spikes:

    unreset     h = unreset(v', s)                     where nothing was lost in the reset
    uncharge    v = uncharge(h, x)

:class:`Leaky` is snnTorch's neuron, whose reset waits for the next step's charge;
:class:`IntegrateAndFire` and :class:`LeakyIntegrateAndFire` are SpikingJelly's, which reset at
once. Every expression is the host's own, in the host's order of operations and with its mixture of
dtypes, because spikes have to agree bit for bit. A subtractive (soft) reset can be inverted; a hard
reset forgets ``h`` where the neuron fired, so there ``invertible`` is False and potentials are
rebuilt forward from an earlier one.

The inverse divides by the decay ``a < 1``, so a rounding error grows by ``1/a`` a step;
:func:`steps_between_anchors` says how many steps that may go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..torch_internals.versioned import Versioned
from .surrogate import AnySurrogate

Learned = tuple[bool, ...]  # which of a neuron's parameters need their gradients
Gradients = tuple[Tensor | None, ...]  # those of the parameters
Derivative = tuple[
    Tensor, Tensor, Gradients
]  # the gradients at the current, at the potential before, at the parameters


class StepView(Protocol):
    """One time step as backward sees it: whatever of it a derivative needs, had when it is asked
    for."""

    @property
    def charged(self) -> Tensor: ...  # h, after charge and before reset
    @property
    def before(self) -> Tensor: ...  # v, the potential that the step started from
    @property
    def fired(self) -> Tensor: ...  # s
    @property
    def silent(self) -> Tensor: ...  # 1 - s; at a potential of NaN, either
    @property
    def reset_signal(self) -> Tensor | None: ...  # a delayed reset's signal, see Leaky
    @property
    def current(self) -> Tensor | None: ...  # x, or None where it cannot be had


@dataclass(eq=False)
class Dynamics:
    """What the neurons below have in common: the step that fires. Instances are compared by
    identity: a chain of time steps goes on as long as its neuron hands in the same instance, so a
    change of parameters calls for a new one."""

    surrogate: AnySurrogate

    delayed = False  # whether a step's spikes reset the potential in the next step's charge
    has_reset_signal = False  # whether resets() gives a signal at all
    reset_needs_signal = False  # whether reset() reads the signal of resets()
    # whether the host's spikes, and a reset at once, hang on graph nodes of their own, in single
    # steps
    in_parts = False
    gradient_reads_current = False  # whether gradient_of_charge() reads the current
    gradient_reads_before = False  # whether it reads the potential that the step started from
    charged_is_kept = False  # whether the potential after a step is the charged one
    graded_factor = None  # what multiplies the spikes
    fused = False  # whether these are kernels in the dynamics' place, see snn_revplugin.kernels

    def __post_init__(self) -> None:
        self._versions = [Versioned(each.detach()) for each in self.parameters]

    @property
    def spikes_carry_gradient(self) -> bool:
        return self.surrogate.differentiable

    def check_unchanged(self) -> None:
        """See that no parameter has been written into since these dynamics were made.

        Raises:
            RuntimeError: one has, between a forward and its backward.
        """
        for each in self._versions:
            each.get("a reversible neuron's gradient (its decay, threshold or factor)")

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors, learned or not, that the gradients of :meth:`gradient` are given for."""
        return ()

    def fires(self, h: Tensor, out: Tensor | None = None) -> Tensor:
        """Ones where a charged potential is over the threshold, zeros elsewhere. For use without
        gradients."""
        return self.surrogate.fires(h, self.threshold, out)

    def fire_and_reset(self, h: Tensor, reset_signal: Tensor | None = None) -> Tensor:
        """The potential after fire and reset, from the charged one alone. For use without
        gradients."""
        return self.reset(h, self.fires(h), reset_signal)

    def spikes(self, fired: Tensor) -> Tensor:
        """Spikes as the host hands them out."""
        return fired

    def reset_signal(self, v: Tensor) -> Tensor | None:
        """The signal by which a delayed reset remembers that ``v`` was over the threshold."""
        return None

    def step(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One time step: zeros and ones, the spikes that are made of them, ``h`` and ``v'``."""
        reset_signal = self.reset_signal(v)
        h = self.charge(x, v, reset_signal)
        fired = self.fires(h)
        return fired, self.spikes(fired), h, self.reset(h, fired, reset_signal)

    def gradient(
        self,
        grad_spikes: Tensor | None,
        grad_v: Tensor | None,
        view: StepView,
        learned: Learned,
        out: Tensor | None = None,
    ) -> Derivative:
        """The step's derivative, in closed form.

        Args:
            grad_spikes, grad_v: the gradients at what the step gave; not both None.
            learned: which of the parameters need theirs.
            out: where the gradient at the current may be written; it may hold ``h`` and is read no
                more afterwards.

        Returns:
            The gradients at the current, at the potential before, and at the parameters.
        """
        raise NotImplementedError


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """``a + b``, in place of ``a`` where that has the sum's shape and dtype."""
    return a.add_(b) if a.dtype == b.dtype and a.shape == b.shape else a + b


def _sum_to(grad: Tensor, parameter: Tensor) -> Tensor:
    """A gradient summed over whatever its parameter was broadcast along."""
    return grad.sum_to_size(parameter.shape).to(parameter.dtype)


def _both(totals: Gradients, grads: Gradients) -> Gradients:
    """Two sets of parameters' gradients, added."""
    return tuple(
        b if a is None else a if b is None else a + b for a, b in zip(totals, grads, strict=True)
    )

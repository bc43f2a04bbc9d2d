"""A neuron's equations as an operator of ``torch.compile`` takes them: an id, numbers and tensors.

A graph holds no objects, so each kind of equations is registered under an id that stays the same in
every process (compilers keep graphs on disk). A call adds the constants, the surrogate by its name
and slopes, and the tensors, learned or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from torch import Tensor

from ..kernels import BackendChoice
from ..neurons.coupled import Coupled
from ..neurons.integrate_and_fire import (
    IntegrateAndFire,
    LeakyIntegrateAndFire,
    ParametricLeakyIntegrateAndFire,
)
from ..neurons.lapicque import Lapicque
from ..neurons.leaky import Leaky
from ..neurons.surrogate import Surrogate
from ..neurons.transition import Transition


class Equations(NamedTuple):
    """The arguments of an operator that stand for a neuron's equations.

    Attributes:
        names: a key of :data:`KINDS`, see :func:`equations_id`, and the surrogate's name.
        numbers: the constants of the kind (:attr:`Kind.constants`), and the surrogate's parameters.
    """

    names: list[str]
    numbers: list[float]

    @property
    def kind(self) -> Kind:
        """What the id stands for."""
        return KINDS[self.names[0]]


@dataclass(frozen=True)
class Kind:
    """One kind of equations.

    Attributes:
        neuron: "leaky" (parameters beta in [0, 1], threshold, factor), "lapicque" (the same, any
            beta), "if", "lif", "plif" (parameter w) or "coupled" (parameters tau, alpha, beta,
            threshold, or none).
        reset: "subtract", "zero", "clear", "none" of snnTorch's; "soft" or "hard" of the others.
        option: "immediate" of snnTorch's reset, "detached" of the others' reset, or empty.
        variant: "decay_input" of a LIF, "strict" of a coupled node whose surrogate is snnTorch's,
            or empty.
    """

    neuron: str
    reset: str
    option: str = ""
    variant: str = ""

    @property
    def constants(self) -> tuple[str, ...]:
        """The names of the constants: numbers that are no tensors."""
        if self.is_leaky:
            return ()
        if self.neuron == "coupled":
            return ("tau", "alpha", "beta", "threshold", "v_reset", "split_dim")
        return ("threshold", "v_reset", "tau")

    @property
    def is_leaky(self) -> bool:
        """Whether the equations are snnTorch's leaky neuron's."""
        return self.neuron in ("leaky", "lapicque")

    @property
    def from_outputs(self) -> bool:
        """Whether backward reads the outputs rather than the inputs."""
        return self.neuron == "coupled"

    @property
    def reset_reads_signal(self) -> bool:
        """Whether the potential after the reset depends on more than the charged one."""
        return self.is_leaky and self.option == "immediate"

    def transition(
        self, equations: Equations, parameters: Sequence[Tensor], traced: bool
    ) -> Transition:
        """The equations themselves; ``traced`` where tensors have no values."""
        is_leaky, count = self.is_leaky, len(self.constants)
        constants, slopes = equations.numbers[:count], tuple(equations.numbers[count:])
        strict = is_leaky or self.variant == "strict"  # snnTorch's
        surrogate = Surrogate(equations.names[1], slopes, strict=strict, keeps_dtype=not strict)
        if is_leaky:
            leaky = ClampedLeaky if traced else Leaky
            leaky = Lapicque if self.neuron == "lapicque" else leaky
            return leaky(surrogate, *parameters, self.reset, delayed=self.option != "immediate")
        detached = self.option == "detached"
        if self.neuron == "coupled":
            *numbers, v_reset, split_dim = constants
            numbers = [each.item() for each in parameters] if parameters else numbers
            hard = None if self.reset == "soft" else v_reset
            return Coupled(*numbers, hard, detached, surrogate, int(split_dim))
        threshold, v_reset, tau = constants
        common = surrogate, threshold, None if self.reset == "soft" else v_reset, detached
        decay_input = self.variant == "decay_input"
        if self.neuron == "if":
            return IntegrateAndFire(*common)
        if self.neuron == "lif":
            return LeakyIntegrateAndFire(*common, tau=tau, decay_input=decay_input)
        return ParametricLeakyIntegrateAndFire(*common, decay_input=decay_input, w=parameters[0])


def equations_id(neuron: str, reset: str, option: str = "", variant: str = "") -> str:
    """The id of a :class:`Kind`."""
    return f"{neuron} {reset} {option} {variant}"


KINDS: dict[str, Kind] = {}


def register_kind(kind: Kind) -> None:
    """Add a kind of equations to :data:`KINDS`."""
    KINDS[equations_id(kind.neuron, kind.reset, kind.option, kind.variant)] = kind


for _reset in ("subtract", "zero", "clear", "none"):
    for _option in ("", "immediate"):
        register_kind(Kind("leaky", _reset, _option))
    register_kind(Kind("lapicque", _reset))
for _reset, _option in product(("soft", "hard"), ("", "detached")):
    register_kind(Kind("if", _reset, _option))
    for _neuron, _variant in product(("lif", "plif"), ("", "decay_input")):
        register_kind(Kind(_neuron, _reset, _option, _variant))
    for _variant in ("", "strict"):
        register_kind(Kind("coupled", _reset, _option, _variant))


@dataclass(eq=False)
class ClampedLeaky(Leaky):
    """Leaky equations of a beta that is clamped already, so that its value is not read."""

    slope_of_clamp = 1.0

    @property
    def decays(self) -> Tensor:
        return self.beta


class _NoNotes:
    """The operators do not know whose they are."""

    backend = ""


def transition_of(
    equations: Equations, parameters: Sequence[Tensor], traced: bool = False
) -> Transition:
    """The equations of a call in plain torch code."""
    return equations.kind.transition(equations, parameters, traced)


def backend_of(
    equations: Equations, parameters: Sequence[Tensor]
) -> tuple[Transition, BackendChoice]:
    """The equations of a call, and what computes them; the same ones for the same constants."""
    if parameters:
        return transition_of(equations, parameters), BackendChoice(_NoNotes())
    return _backend_of_constants(tuple(equations.names), tuple(equations.numbers))


@lru_cache(maxsize=256)
def _backend_of_constants(
    names: tuple[str, ...], numbers: tuple[float, ...]
) -> tuple[Transition, BackendChoice]:
    equations = Equations(list(names), list(numbers))
    return transition_of(equations, ()), BackendChoice(_NoNotes())

"""The table of swaps: which class of a host stands for which of ours. Adapters fill it when they
are imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from .hosts import imported_hosts, is_neuron
from .module import ReversibleNeuron


@dataclass(frozen=True, slots=True)
class Swap:
    """A host's neuron class and ours.

    Args:
        host: the host's class.
        reversible: our subclass of it. Instances of the host's become instances of ours by
            assignment to ``__class__``, so it may add nothing that its constructor would have to
            set up.
        dynamics: the names of the host's methods that make up its dynamics; a user's subclass that
            overrides one of them is another neuron and is left as it is.
    """

    host: type[nn.Module]
    reversible: type[nn.Module]
    dynamics: tuple[str, ...]

    def __post_init__(self) -> None:
        if not issubclass(self.reversible, self.host):
            raise TypeError(
                f"reversible: {self.reversible.__name__} is no subclass of host"
                f" {self.host.__name__}"
            )
        for name in self.dynamics:
            if not hasattr(self.host, name):
                raise AttributeError(f"dynamics: {self.host.__name__} has no method {name!r}")


@dataclass(frozen=True, slots=True)
class AnySwap:
    """How the neurons of a host are made reversible whose equations nothing here knows: by their
    own step.

    Args:
        host: the base class of the host's neurons.
        reversible: what such a neuron gets before its own class.
        why_not: why a neuron cannot be, or None if it can.
    """

    host: type[nn.Module]
    reversible: type[ReversibleNeuron]
    why_not: Callable[[nn.Module], str | None]


_swaps: dict[type[nn.Module], Swap] = {}
_any_swaps: list[AnySwap] = []
# Our classes for users' subclasses of host neurons, and for neurons that go by their own step, by
# that class and what it was mixed with.
_made: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def register_swap(swap: Swap) -> None:
    """Add a swap to the table."""
    _swaps[swap.host] = swap


def register_any(swap: AnySwap) -> None:
    """Add a way to make any neuron of a host reversible, or those of one class. Of those that fit a
    neuron the last one that was added counts."""
    _any_swaps[:] = [swap, *(each for each in _any_swaps if each.host is not swap.host)]


def known_swaps() -> list[Swap]:
    """The swaps of every host that the user's program has imported."""
    imported_hosts()
    return list(_swaps.values())


def swap_for(
    neuron: nn.Module, generic: bool = True
) -> tuple[Swap | None, str] | tuple[AnySwap, str]:
    """The swap that fits a module, or None and the reason why none does; the reason is empty for a
    module that is no spiking neuron.

    Args:
        generic: whether a neuron without equations here may be swapped by its own step.
    """
    if isinstance(neuron, ReversibleNeuron):
        return None, "it is reversible already"
    swap, reason = _swap_by_equations(neuron)
    if swap is not None or not reason or not generic:
        return swap, reason
    if _replaced(neuron):  # by functions that refer to this very instance
        return None, reason
    for each in _any_swaps:
        if isinstance(neuron, each.host):
            why_not = each.why_not(neuron)
            return (each, "") if why_not is None else (None, why_not)
    return None, reason


def _replaced(neuron: nn.Module) -> list[str]:
    """The methods of its class that an instance has replaced."""
    kind = type(neuron)
    return [n for n, v in vars(neuron).items() if callable(v) and callable(getattr(kind, n, None))]


def _swap_by_equations(neuron: nn.Module) -> tuple[Swap | None, str]:
    kind, known = type(neuron), known_swaps()
    reason = f"{kind.__name__} has no reversible counterpart" if is_neuron(neuron) else ""
    for swap in known:
        if isinstance(neuron, swap.host):
            overridden = _overridden(kind, swap)
            replaced = [name for name in _replaced(neuron) if name in swap.dynamics]
            if not overridden and not replaced:
                return swap, ""
            reason = (
                f"{kind.__name__} overrides {', '.join(overridden + replaced)} of"
                f" {swap.host.__name__}"
            )
    return None, reason


def _overridden(kind: type[nn.Module], swap: Swap) -> list[str]:
    """The methods of the dynamics that a subclass of the host's overrides."""
    return [n for n in swap.dynamics if getattr(kind, n) is not getattr(swap.host, n)]


def reversible(kind: type[nn.Module]) -> type[nn.Module]:
    """Make a user's neuron class reversible: a class decorator.

    Neurons of a class that overrides none of its host's dynamics run by equations; others by their
    own step, which backward runs again.

    Args:
        kind: a subclass of a host's neuron, or of the host's base class of neurons.

    Returns:
        A subclass of the same name.

    Raises:
        TypeError: ``kind`` is no neuron class of a host that has been imported.
    """
    behind = [swap for swap in (*known_swaps(), *_any_swaps) if issubclass(kind, swap.host)]
    for swap in behind:
        if isinstance(swap, AnySwap) or not _overridden(kind, swap):
            return _make_class(kind, swap, kind.__name__, {"declared": True})
    raise TypeError(
        f"kind: {kind.__name__} is no neuron class of a host that has been imported; subclass the"
        " host's base class of neurons"
    )


def make_reversible(neuron: nn.Module, swap: Swap | AnySwap) -> None:
    """Change the class of a host's neuron to ours, in place."""
    neuron.__class__ = reversible_class(type(neuron), swap)
    neuron.begin()


def make_host(neuron: ReversibleNeuron, host: type[nn.Module]) -> None:
    """Change the class of one of our neurons to the host's, in place."""
    neuron.end()
    neuron.__class__ = host


def reversible_class(kind: type[nn.Module], swap: Swap | AnySwap) -> type[nn.Module]:
    """Our class for a host's class or for a user's subclass of it."""
    if isinstance(swap, Swap) and kind is swap.host:
        return swap.reversible
    made = _made.get((kind, swap.reversible))
    if made is None:
        made = _make_class(kind, swap, f"Rev{kind.__name__}", {"__reduce_ex__": _reduce})
        _made[kind, swap.reversible] = made
    return made


def _make_class(
    kind: type[nn.Module], swap: Swap | AnySwap, name: str, namespace: dict[str, Any]
) -> type[nn.Module]:
    outer, _, _ = kind.__qualname__.rpartition(kind.__name__)
    namespace = {
        "host_kind": kind,
        "__module__": kind.__module__,
        "__qualname__": outer + name,
        "__doc__": kind.__doc__,
        **namespace,
    }
    return type(name, (swap.reversible, kind), namespace)


def host_class(neuron: nn.Module) -> type[nn.Module] | None:
    """The host's (or user's) class behind one of our neurons; None for any other module."""
    kind = type(neuron)
    if "host_kind" in vars(kind):
        return kind.host_kind
    return next((swap.host for swap in known_swaps() if kind is swap.reversible), None)


def _reduce(neuron: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickle a neuron of a class that was made at run time by the class it was made from."""
    kind = type(neuron)
    by_equations = any(issubclass(kind, swap.reversible) for swap in known_swaps())
    return _remade, (kind.host_kind, by_equations), neuron.__dict__


def _remade(kind: type[nn.Module], by_equations: bool) -> nn.Module:
    known = known_swaps()  # imports the adapters, which register the others too
    swaps = known if by_equations else _any_swaps
    made = reversible_class(kind, next(each for each in swaps if issubclass(kind, each.host)))
    return made.__new__(made)

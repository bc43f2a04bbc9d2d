"""The table of swaps: which class of a host stands for which of ours. Adapters fill it when they
are imported."""

from __future__ import annotations

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


_swaps: dict[type[nn.Module], Swap] = {}
# Our classes for users' subclasses of host neurons.
_made: dict[type[nn.Module], type[nn.Module]] = {}


def register_swap(swap: Swap) -> None:
    """Add a swap to the table."""
    _swaps[swap.host] = swap


def known_swaps() -> list[Swap]:
    """The swaps of every host that the user's program has imported."""
    imported_hosts()
    return list(_swaps.values())


def swap_for(neuron: nn.Module) -> tuple[Swap | None, str]:
    """The swap that fits a module, or None and the reason why none does; the reason is empty for a
    module that is no spiking neuron."""
    kind = type(neuron)
    if isinstance(neuron, ReversibleNeuron):
        return None, "it is reversible already"
    reason = f"{kind.__name__} has no reversible counterpart" if is_neuron(neuron) else ""
    for swap in known_swaps():
        if isinstance(neuron, swap.host):
            overridden = [
                name
                for name in swap.dynamics
                if getattr(kind, name) is not getattr(swap.host, name)
            ]
            replaced = [name for name in swap.dynamics if name in neuron.__dict__]
            if not overridden and not replaced:
                return swap, ""
            reason = (
                f"{kind.__name__} overrides {', '.join(overridden + replaced)} of"
                f" {swap.host.__name__}"
            )
    return None, reason


def make_reversible(neuron: nn.Module, swap: Swap) -> None:
    """Change the class of a host's neuron to ours, in place."""
    neuron.__class__ = reversible_class(type(neuron), swap)
    neuron.begin()


def make_host(neuron: ReversibleNeuron, host: type[nn.Module]) -> None:
    """Change the class of one of our neurons to the host's, in place."""
    neuron.end()
    neuron.__class__ = host


def reversible_class(kind: type[nn.Module], swap: Swap) -> type[nn.Module]:
    """Our class for a host's class or for a user's subclass of it."""
    if kind is swap.host:
        return swap.reversible
    if kind not in _made:
        namespace = {
            "__module__": kind.__module__,
            "__qualname__": f"Rev{kind.__qualname__}",
            "__doc__": f"{kind.__name__}, made reversible by snn_revplugin.convert.",
            "__reduce_ex__": _reduce,
        }
        _made[kind] = type(f"Rev{kind.__name__}", (swap.reversible, kind), namespace)
    return _made[kind]


def host_class(neuron: nn.Module) -> type[nn.Module] | None:
    """The host's (or user's) class behind one of our neurons; None for any other module."""
    kind = type(neuron)
    for made_from, made in _made.items():
        if kind is made:
            return made_from
    return next((swap.host for swap in known_swaps() if kind is swap.reversible), None)


def _reduce(neuron: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickle a neuron of a class that was made at run time by the class it was made from."""
    return _remade, (host_class(neuron),), neuron.__dict__


def _remade(kind: type[nn.Module]) -> nn.Module:
    swap = next(swap for swap in known_swaps() if issubclass(kind, swap.host))
    made = reversible_class(kind, swap)
    return made.__new__(made)

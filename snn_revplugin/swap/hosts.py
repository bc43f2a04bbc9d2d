"""The hosts that the library has adapters for, and what it must know of each.

The rest of the library names no host. ``snn_revplugin.adapters`` registers an adapter's module for
each host package; that module is imported once the user's program has imported the host, and
registers a :class:`Host`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn as nn


@dataclass(frozen=True, slots=True)
class Host:
    """What an adapter tells the library of its host.

    Args:
        name: the host's package.
        is_neuron: whether a module is a spiking neuron of the host, or the user's own on a base
            class of the host; ``convert`` and ``explain`` name those that they leave.
        surrogates: the names of the surrogate gradients whose derivative has a closed form.
        swapped: called with a net after neurons in it changed their class, for the host's caches.
    """

    name: str
    is_neuron: Callable[[nn.Module], bool]
    surrogates: tuple[str, ...] = ()
    swapped: Callable[[nn.Module], None] | None = None


_adapters: dict[str, str] = {}
_hosts: dict[str, Host] = {}


def register_adapter(host: str, module: str) -> None:
    """Name the module to import once the package ``host`` has been imported."""
    _adapters[host] = module


def register_host(host: Host) -> None:
    """Called by an adapter when it is imported."""
    _hosts[host.name] = host


def adapters() -> dict[str, str]:
    """The name of every adapter's module, by its host's package."""
    return dict(_adapters)


def imported_hosts() -> list[Host]:
    """The hosts that the user's program has imported."""
    for name, module in _adapters.items():
        if name in sys.modules:
            importlib.import_module(module)
    return list(_hosts.values())


def is_neuron(module: nn.Module) -> bool:
    """Whether a module is a spiking neuron of a host that has been imported."""
    return any(host.is_neuron(module) for host in imported_hosts())

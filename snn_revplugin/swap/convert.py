"""``convert`` and ``restore``: every neuron of a net made reversible in place, and back.

A neuron stays the object that it was and only changes its class. So parameters, buffers, hooks,
state, device, training mode, names, an optimizer's references and the host's own registers of
neurons all stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn as nn

from ..budget import check_budget
from .hosts import imported_hosts
from .module import ReversibleNeuron
from .table import AnySwap, host_class, known_swaps, make_host, make_reversible, swap_for
from .watch import unwatch, watch

OWN_STEP = ", by its own step"


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` or :func:`restore` did.

    Attributes:
        swapped: names of modules, each with its class before and after.
        left: names of spiking neurons that were left as they are, each with the reason.
        by_own_step: names of those swapped neurons whose equations are not known here: backward
            runs their own step again.
    """

    swapped: dict[str, tuple[str, str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    by_own_step: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        count = len(self.swapped)
        lines = [f"{count} neuron{'s' * (count != 1)} swapped, {len(self.left)} left"]
        lines += [
            f"  {name or '(the module itself)'}: {a} -> {b}{OWN_STEP * (name in self.by_own_step)}"
            for name, (a, b) in self.swapped.items()
        ]
        lines += [
            f"  {name or '(the module itself)'}: left, {reason}"
            for name, reason in self.left.items()
        ]
        return "\n".join(lines)


def convert(
    net: nn.Module,
    only: type[nn.Module] | tuple[type[nn.Module], ...] = nn.Module,
    generic: bool = True,
    memory_budget: float | str | None = None,
) -> Conversion:
    """Make every spiking neuron of ``net`` reversible that can be, in place.

    A neuron whose equations the library knows (``Leaky``, ``IFNode``, ``LIFNode``,
    ``ParametricLIFNode``, and users' subclasses that override none of the host's dynamics) runs by
    them. Any other neuron of a host, or of the user's on a base class of a host, runs by its own
    step, which backward runs again. A neuron keeps the state that it holds. Call :func:`restore` to
    undo the swaps.

    The class of a neuron changes: ``isinstance(m, TheHostsNeuron)`` stays true, while
    ``type(m) is TheHostsNeuron`` and ``type(m).__name__ == "TheHostsNeuron"`` become false.

    Args:
        net: holds the neurons.
        only: swap instances of these classes alone.
        generic: with False, neurons without known equations are left as they are.
        memory_budget: what a training step of this net may keep, see :class:`Settings`; None for
            what the settings say.

    Returns:
        A report of what was swapped, and of the spiking neurons that were left and why.

    Raises:
        TypeError: ``net`` is no module.
        ValueError: ``memory_budget`` is none.
    """
    _check(net)
    if memory_budget is not None:
        check_budget(memory_budget)
    report = Conversion()
    for name, module in net.named_modules():
        swap, reason = swap_for(module, generic)
        if (reason or swap is not None) and not isinstance(module, only):
            swap, reason = None, f"it is none of the classes in only={only!r}"
        if swap is not None:
            before = type(module)
            make_reversible(module, swap)
            report.swapped[name] = before.__name__, type(module).__name__
            if isinstance(swap, AnySwap):
                report.by_own_step.append(name)
        elif reason:
            report.left[name] = reason
    neurons = [each for each in net.modules() if isinstance(each, ReversibleNeuron)]
    for each in neurons:
        each.record.cache.memory_budget = memory_budget
    if neurons and net not in neurons:
        watch(net)
    _notify_hosts(net)
    return report


def restore(net: nn.Module) -> Conversion:
    """Give every reversible neuron of ``net`` its host's class back, in place: the inverse of
    :func:`convert`.

    With the last reversible neuron of a host that exists, the changes to that host's tools are
    undone too.

    Returns:
        A report of what was swapped back, and of coupled nodes, which are left.

    Raises:
        TypeError: ``net`` is no module.
    """
    _check(net)
    report = Conversion()
    for name, module in net.named_modules():
        unwatch(module)
        host = host_class(module)
        if host is not None:
            before = type(module)
            make_host(module, host)
            report.swapped[name] = before.__name__, host.__name__
        elif isinstance(module, ReversibleNeuron):
            report.left[name] = (
                f"the host has no neuron with the equations of {type(module).__name__}"
            )
    for swap in known_swaps():
        swap.reversible.tool_patches.undo_if_unused()
    _notify_hosts(net)
    return report


def _check(net: nn.Module) -> None:
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")


def _notify_hosts(net: nn.Module) -> None:
    for host in imported_hosts():
        if host.swapped is not None:
            host.swapped(net)

"""Which layer holds the memory of a training step, and which runs when the step holds most.

A layer is a module that allocated something: a leaf, as a rule, or a module whose own ``forward``
computes. What runs inside a spiking neuron (a surrogate function that is a module)
belongs to the neuron.

In forward the layer that runs is the innermost module under way; hooks on all modules tell. In
backward it is the module in whose forward the node under way was made: nodes carry the number of
their making, and the hooks note where each module's numbers begin. A gradient's accumulation
belongs to the parameter's module.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch.nn as nn
from torch import Tensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from ..swap.hosts import is_neuron
from ..swap.module import ReversibleNeuron
from ..torch_internals import backward_pass, graph
from .figures import MIB, MemoryReport, mib

FORWARD, BACKWARD, AFTER = "forward", "backward", "after a backward"
OUTSIDE = "(no module)"
ITSELF = "(the module itself)"
EVERY = ""  # device


@dataclass(frozen=True)
class Visit:
    """A stretch of a training step in which one module ran.

    Attributes:
        layer: the module's name; :data:`OUTSIDE` for the loss, for example.
        phase: ``"forward"``, ``"backward"``, or ``"after a backward"`` (an optimiser's step).
        call: which of the layer's calls in this step, from 1: the time step, in a time loop. 0
            where the layer was not called (``OUTSIDE``).
        held: bytes that all layers together held when the stretch began or ended, whichever is
            more.
        transient: bytes on top of these that it held at most in between.
    """

    layer: str
    phase: str
    call: int
    held: int
    transient: int

    @property
    def peak(self) -> int:
        """The most bytes that were held while it ran."""
        return self.held + self.transient


@dataclass(frozen=True)
class Layer:
    """One layer's part in the memory of a training step.

    Attributes:
        name: of the module in its net.
        kind: name of its class.
        calls: in this step; T in a time loop.
        retained: bytes that it allocated and that were held when the first backward began.
        at_peak: bytes that it allocated and that were held at the peak.
        forward: of its stretches in forward the one in which most was held; None if there was none.
        backward: likewise.
    """

    name: str
    kind: str
    calls: int
    retained: int
    at_peak: int
    forward: Visit | None
    backward: Visit | None


@dataclass(frozen=True)
class Standing:
    """Tensors of one kind that are held at the peak.

    Attributes:
        layer, phase: where they were allocated, as in :class:`Visit`.
        operation: of torch, that made them.
        shape, dtype: of one of them.
        count: how many there are.
        nbytes: of all of them.
    """

    layer: str
    phase: str
    operation: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    nbytes: int

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape)) or "scalar"
        times = f"{self.count} of " * (self.count > 1)
        return (
            f"{mib(self.nbytes)}: {times}{size} {self.dtype}, {self.operation} in the {self.phase}"
            f" of {self.layer}"
        )


@dataclass(frozen=True)
class LayerReport(MemoryReport):
    """The memory of one training step by layer, in bytes beyond what was held before it.

    On CPU the layers' ``retained`` add up to that of the report, and their ``at_peak`` to its
    ``peak``. On CUDA they add up to the tensors' own bytes, and the report's are those of torch's
    allocator, which rounds them up and counts scratch memory.

    Attributes:
        layers: in the order in which forward left them (in a time loop, for the last time).
        timeline: every stretch of the step in which one layer ran, in order.
        peak_at: the stretch with the peak, of the tensors' own bytes.
        peak_operation: the operation of torch that brought it.
        standing: what is held at the peak, the largest first.
        host: the report of the same step with the host's neurons, if one was given.
    """

    layers: tuple[Layer, ...] = ()
    timeline: tuple[Visit, ...] = ()
    peak_at: Visit | None = None
    peak_operation: str = ""
    standing: tuple[Standing, ...] = ()
    host: LayerReport | None = None

    def layer(self, name: str) -> Layer:
        """The layer of a name.

        Raises:
            KeyError: no layer of this name allocated anything.
        """
        for each in self.layers:
            if each.name == name:
                return each
        raise KeyError(name)

    @property
    def peak_in_words(self) -> str:
        """Where the peak is."""
        if self.peak_at is None:
            return "nothing was held"
        layer = self.layer(self.peak_at.layer)
        kind = f" ({layer.kind})" * bool(layer.kind)
        call = f", call {self.peak_at.call} of {layer.calls}" * (layer.calls > 1)
        return (
            f"the peak is in the {self.peak_at.phase} of {layer.name}{kind}{call}, in"
            f" {self.peak_operation}"
        )

    def __str__(self) -> str:
        lines = [] if self.host is None else ["host:", str(self.host), "", "ours:"]
        return "\n".join(
            (*lines, super().__str__(), self.peak_in_words, *self._table(), *self._standing())
        )

    def _table(self) -> Iterator[str]:
        width = max((len(each.name) for each in self.layers), default=0)
        yield f"{'MiB':{width}} calls retained    forward held    backward held  at the peak"
        for each in self.layers:
            yield (
                f"{each.name:{width}} {each.calls or '':5} {_number(each.retained)}"
                f" {_held(each.forward)} {_held(each.backward)}  {_number(each.at_peak):>11}"
            )

    def _standing(self, most: int = 8) -> Iterator[str]:
        yield "held at the peak:"
        for each in self.standing[:most]:
            yield f"  {each}"
        rest = sum(each.nbytes for each in self.standing[most:])
        if rest:
            yield f"  {mib(rest)}: all others"


def _number(nbytes: int) -> str:
    return f"{nbytes / MIB:8.1f}"


def _held(visit: Visit | None) -> str:
    if visit is None:
        return f"{'':16}"
    return f"{_number(visit.held)} +{visit.transient / MIB:6.1f}"


class _Place(NamedTuple):
    """Where in a step something happens."""

    module: nn.Module | None
    phase: str
    call: int


class _Change(NamedTuple):
    """Memory that was born (or grew into this size) or died. A module that has run leaves one that
    changes nothing, on every device."""

    key: int
    device: str
    size: int
    tensor: tuple[tuple[int, ...], str]  # shape and dtype
    operation: str
    place: _Place


@dataclass
class _Running:
    """A module whose forward is under way, in a backward pass or in none."""

    module: nn.Module
    during: int
    place: _Place
    is_neuron: bool


class Timeline:
    """Notes, inside a ``with`` block, every birth and death of memory with the layer that runs.

    :class:`~.memory.LiveBytes` reports them to ``changed`` and ``first_backward``.
    """

    def __init__(self) -> None:
        self._changes: list[_Change] = []
        self._backward_from: int | None = None  # the first change after the first backward began
        self._running: list[_Running] = []
        self._calls: Counter[nn.Module] = Counter()
        # Of each module that was called in no other, the names of all modules in it.
        self._roots: dict[nn.Module, dict[nn.Module, str]] = {}
        # From such an age on nodes were made at such a place.
        self._ages: list[int] = []
        self._places: list[_Place] = []
        self._owners: dict[int, nn.Module] | None = None  # of parameters by id
        self._last = _Place(None, FORWARD, 0)

    def __enter__(self) -> Timeline:
        self._thread = threading.get_ident()
        self._hooks = [
            register_module_forward_pre_hook(self._enters),
            register_module_forward_hook(self._leaves, always_call=True),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for each in self._hooks:
            each.remove()

    def changed(
        self, key: int, device: str, size: int, tensor: Tensor | None, operation: str | None
    ) -> None:
        """Memory was born or resized, or died if ``size`` is 0."""
        what = ((), "") if tensor is None else (tuple(tensor.shape), str(tensor.dtype)[6:])
        self._last = self._place()
        self._changes.append(_Change(key, device, size, what, operation or "", self._last))

    def first_backward(self) -> None:
        """The first backward begins."""
        self._backward_from = len(self._changes)

    def _is_of_another_thread(self) -> bool:
        in_pass = backward_pass.current_pass() != backward_pass.NO_PASS
        return threading.get_ident() != self._thread and not in_pass

    def _enters(self, module: nn.Module, inputs: tuple) -> None:
        if self._is_of_another_thread():
            return
        during = backward_pass.current_pass()
        outer = self._innermost(during)
        if outer is not None and outer.is_neuron:
            self._running.append(_Running(module, during, outer.place, True))
            return
        in_forward = during == backward_pass.NO_PASS
        if in_forward and outer is None and not self._knows(module):
            self._roots[module] = {each: name for name, each in module.named_modules()}
        if not self._knows(module):  # made on the way, as a copy of a neuron is in backward
            place = self._place()
        elif in_forward:
            self._calls[module] += 1
            place = _Place(module, FORWARD, self._calls[module])
        else:
            place = _Place(module, BACKWARD, self._calls[module])
        neuron = isinstance(module, ReversibleNeuron) or is_neuron(module)
        self._running.append(_Running(module, during, place, neuron))
        self._nodes_are_from(place)

    def _knows(self, module: nn.Module) -> bool:
        return any(module in names for names in self._roots.values())

    def _leaves(self, module: nn.Module, inputs: tuple, outputs: Any) -> None:
        if self._is_of_another_thread() or not any(e.module is module for e in self._running):
            return
        while (left := self._running.pop()).module is not module:
            pass
        self._changes.append(_Change(0, EVERY, 0, ((), ""), "", left.place))
        outer = self._innermost(backward_pass.current_pass())
        self._nodes_are_from(outer.place if outer else _Place(None, FORWARD, 0))

    def _innermost(self, during: int) -> _Running | None:
        found = self._running[-1] if self._running else None
        return found if found is not None and found.during == during else None

    def _nodes_are_from(self, place: _Place) -> None:
        age = backward_pass.next_age()
        if not self._ages or age >= self._ages[-1]:  # else in a thread that counts by itself
            self._ages.append(age)
            self._places.append(place)

    def _place(self) -> _Place:
        during = backward_pass.current_pass()
        running = self._innermost(during)
        if running is not None:
            return running.place
        if during == backward_pass.NO_PASS:
            return _Place(None, FORWARD if self._backward_from is None else AFTER, 0)
        node = backward_pass.current_node()
        if node is None:  # between two nodes: the engine adds gradients
            return self._last if self._last.phase == BACKWARD else _Place(None, BACKWARD, 0)
        if graph.is_leaf_edge(node):
            module = self._owner(node.variable)
            return _Place(module, BACKWARD, self._calls.get(module, 0))
        index = bisect_right(self._ages, graph.age_of(node)) - 1
        module, _, call = self._places[index] if index >= 0 else (None, "", 0)
        return _Place(module, BACKWARD, call)

    def _owner(self, parameter: Tensor) -> nn.Module | None:
        if self._owners is None:
            self._owners = {
                id(each): module
                for names in self._roots.values()
                for module in names
                for each in module.parameters(recurse=False)
            }
        return self._owners.get(id(parameter))

    def report(self, total: MemoryReport, host: LayerReport | None) -> LayerReport:
        """What was noted of the device of ``total``."""
        names = self._names()
        of_device = (EVERY, total.device)
        changes = [each for each in self._changes if each.device in of_device]
        visits, busiest, peak = _read(changes, names)
        before_backward = self._changes[: self._backward_from]
        retained = _alive([each for each in before_backward if each.device in of_device])
        at_peak = _alive(changes[:peak])
        retained_by, at_peak_by = _by_module(retained), _by_module(at_peak)
        layers = tuple(
            Layer(
                names[module],
                "" if module is None else type(module).__name__,
                self._calls[module],
                retained_by[module],
                at_peak_by[module],
                *(_busiest(visits, names[module], phase) for phase in (FORWARD, BACKWARD)),
            )
            for module in _in_order(changes)
        )
        return LayerReport(
            **vars(total),
            layers=layers,
            timeline=tuple(visits),
            peak_at=busiest,
            peak_operation=changes[peak - 1].operation if peak else "",
            standing=_standing(at_peak, names),
            host=host,
        )

    def _names(self) -> dict[nn.Module | None, str]:
        """Of modules, in the outermost that was called; where several were, their classes go
        before."""
        inner = {each for root, names in self._roots.items() for each in names if each is not root}
        outer = [each for each in self._roots if each not in inner]
        kinds: Counter[str] = Counter()
        named: dict[nn.Module | None, str] = {None: OUTSIDE}
        for root in outer:
            prefix = type(root).__name__ if len(outer) > 1 else ""
            kinds[prefix] += 1
            prefix += f" {kinds[prefix]}" * (kinds[prefix] > 1)
            for module, name in self._roots[root].items():
                parts = [each for each in (prefix, name) if each]
                named.setdefault(module, ".".join(parts) or ITSELF)
        return named


def _read(
    changes: list[_Change], names: dict[nn.Module | None, str]
) -> tuple[list[Visit], Visit | None, int]:
    """All stretches, the one with the peak, and how many changes lead to the peak."""
    visits: list[Visit] = []
    sizes: dict[int, int] = {}
    busiest, peak, peak_after = None, 0, 0
    now = 0
    for place, stretch in groupby(enumerate(changes, 1), lambda each: each[1].place):
        start = most = now
        has_peak = False
        for index, change in stretch:
            now += change.size - sizes.pop(change.key, 0)
            if change.size:
                sizes[change.key] = change.size
            most = max(most, now)
            if now > peak:
                peak, peak_after, has_peak = now, index, True
        held = max(start, now)
        visits.append(Visit(names[place.module], place.phase, place.call, held, most - held))
        busiest = visits[-1] if has_peak else busiest
    return visits, busiest, peak_after


def _alive(changes: list[_Change]) -> list[_Change]:
    """The births of what lives after these changes."""
    alive: dict[int, _Change] = {}
    for each in changes:
        alive.pop(each.key, None)
        if each.size:
            alive[each.key] = each
    return list(alive.values())


def _by_module(births: list[_Change]) -> Counter[nn.Module | None]:
    sizes: Counter[nn.Module | None] = Counter()
    for each in births:
        sizes[each.place.module] += each.size
    return sizes


def _in_order(changes: list[_Change]) -> list[nn.Module | None]:
    """Modules that allocated anything, in the order in which forward left them last; then those
    that it did not come to; what is outside of modules at the end."""
    forward = (each.place for each in reversed(changes) if each.place.phase == FORWARD)
    left = reversed(dict.fromkeys(each.module for each in forward))
    allocating = dict.fromkeys(each.place.module for each in changes if each.size)
    order = dict.fromkeys(each for each in left if each in allocating) | allocating
    return [each for each in order if each is not None] + [None] * (None in order)


def _busiest(visits: list[Visit], layer: str, phase: str) -> Visit | None:
    ours = (each for each in visits if (each.layer, each.phase) == (layer, phase))
    return max(ours, key=lambda each: each.peak, default=None)


def _standing(births: list[_Change], names: dict[nn.Module | None, str]) -> tuple[Standing, ...]:
    kinds: dict[tuple, list[int]] = defaultdict(list)
    for each in births:
        place = each.place
        kinds[names[place.module], place.phase, each.operation, *each.tensor].append(each.size)
    groups = (Standing(*kind, len(sizes), sum(sizes)) for kind, sizes in kinds.items())
    return tuple(sorted(groups, key=lambda each: -each.nbytes))

"""What a module's time step reads beside its input and its states, so that backward's step reads
the same: where the random generators stand, and the module's counters.

A step's draws follow from where the generators stood before it. That is kept where a step drew, and
only there: 5056 bytes of a CPU's generator. Where nothing else drew since the step before, they
stand where that step leaves them; backward repeats the steps of a stretch in their order, so only
the first of them keeps anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor

from ..torch_internals import capture
from .module_copy import entries_of

Places = tuple[tuple[str, str], ...]  # each a submodule's name, and that of its attribute
Positions = tuple[Tensor, ...]  # where each generator stands


class Surroundings:
    """Those of one time step.

    Args:
        start, end: where the generators stood before the step and after it; None where it drew
            nothing.
        counters: the values of the module's counters before the step.

    Attributes:
        drew: whether the step drew random numbers.
        start: kept, or None where the step before leaves the generators there.
        end: until the next step is taken.
    """

    __slots__ = ("counters", "drew", "end", "start")

    def __init__(self, start: Positions | None, end: Positions | None, counters: tuple) -> None:
        self.start, self.end, self.counters = start, end, counters
        self.drew = start is not None

    @property
    def nbytes(self) -> int:
        """Bytes that stay."""
        return sum(each.nbytes for each in self.start or ())

    def follow(self, below: Surroundings) -> None:
        """Keep no start where the step before leaves the generators there, and backward repeats
        that step first."""
        if self.drew and below.end is not None and _same(below.end, self.start):
            self.start = None


class Watch:
    """Notes the surroundings of a module's steps.

    Args:
        module: the module, or a copy of it.
        x: an input.
        counters: the attributes that are numbers or strings and that a step writes.
    """

    def __init__(self, module: nn.Module, x: Tensor, counters: Places) -> None:
        self._generators, self._counters = generators_of(module, x), counters

    def now(self, module: nn.Module, x: Tensor) -> tuple[Positions | None, tuple]:
        """The surroundings of a step of a module that is to be taken from an input."""
        # A CUDA graph that is captured forbids to ask where a generator stands.
        start = positions_of(self._generators) if capture.may_synchronise(x) else None
        return start, self._values(module) if self._counters else ()

    def since(self, noted: tuple[Positions | None, tuple]) -> Surroundings | None:
        """What backward needs of the surroundings of a step that has been taken."""
        start, counters = noted
        end = None if start is None else positions_of(self._generators)
        if end is not None and not _same(start, end):
            return Surroundings(start, end, counters)
        return Surroundings(None, None, counters) if counters else None

    @contextmanager
    def restored(
        self, module: nn.Module, start: Positions | None, counters: tuple
    ) -> Iterator[list]:
        """Run a block with these surroundings. Afterwards the generators stand as before it, and
        the list holds where the block left them."""
        for (name, attribute), value in zip(self._counters, counters, strict=False):
            module.get_submodule(name).__dict__[attribute] = value
        left: list[Tensor] = []
        if start is None:
            yield left
            return
        before = positions_of(self._generators)
        set_positions(self._generators, start)
        try:
            yield left
            left += positions_of(self._generators)
        finally:
            set_positions(self._generators, before)

    def _values(self, module: nn.Module) -> tuple:
        return tuple(module.get_submodule(name).__dict__[each] for name, each in self._counters)


def generators_of(module: nn.Module, x: Tensor) -> list[torch.Generator]:
    """The generators that a module's step from an input may draw from."""
    found = [torch.default_generator]
    if x.is_cuda and capture.may_synchronise(x):
        found.append(torch.cuda.default_generators[x.device.index])
    held = (value for _, _, value in entries_of(module))
    return [*found, *(value for value in held if isinstance(value, torch.Generator))]


def positions_of(generators: list[torch.Generator]) -> Positions:
    """Where generators stand."""
    return tuple(each.get_state() for each in generators)


def set_positions(generators: list[torch.Generator], positions: Positions) -> None:
    """Set generators to where they stood."""
    for generator, position in zip(generators, positions, strict=True):
        generator.set_state(position)


def _same(one: Positions, other: Positions) -> bool:
    return all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(one, other, strict=True))

"""Somebody's training script, unmodified, with its neurons swapped while it runs."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from weakref import WeakKeyDictionary, WeakSet

import torch.nn as nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..bptt.statistics import CallStatistics
from ..report.explain import Account, Explanation, account_of
from ..swap.convert import looks_spiking, restore
from ..swap.module import ReversibleNeuron
from ..swap.table import reversible_class, swap_for

INTERRUPTED = 130  # a shell's exit code for Ctrl-C


class _Place:
    """Where a module stands. It outlives the module and holds no tensor, so that one can tell of a
    net that is gone."""

    def __init__(self, kind: str) -> None:
        self.kind, self.name = kind, ""
        self.parent: _Place | None = None
        self.statistics: CallStatistics | None = None
        self.left = ""

    @property
    def root(self) -> _Place:
        return self if self.parent is None else self.parent.root

    @property
    def path(self) -> str:
        above = "" if self.parent is None else self.parent.path
        return f"{above}.{self.name}" if above else self.name


class SwapOnRegistration:
    """Makes every supported neuron reversible that becomes somebody's submodule inside a ``with``
    block.

    A neuron that never becomes a submodule, or comes to a net another way (a copy, an unpickled
    module), is not seen. After the block the neurons that still live are the host's again.
    """

    def __init__(self) -> None:
        self._places: WeakKeyDictionary[nn.Module, _Place] = WeakKeyDictionary()
        self._swapped: WeakSet[nn.Module] = WeakSet()
        self._neurons: list[_Place] = []

    def __enter__(self) -> SwapOnRegistration:
        self._hook = register_module_module_registration_hook(self._registered)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()
        for neuron in list(self._swapped):
            restore(neuron)

    def explain(self) -> Explanation:
        """What every neuron kept and why, with the class of its outermost module before its
        name."""
        roots: dict[_Place, str] = {}
        for place in self._neurons:
            root = place.root
            if root not in roots:
                count = sum(each.kind == root.kind for each in roots)
                roots[root] = root.kind if count == 0 else f"{root.kind} ({count + 1})"
        return Explanation(
            tuple(_account(place, f"{roots[place.root]}.{place.path}") for place in self._neurons)
        )

    def _registered(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is None:
            return
        place = self._place(child)
        place.parent, place.name = self._place(parent), name
        if place.statistics is not None or place.left:
            return  # met before, under another name
        swap, reason = swap_for(child)
        if swap is not None:
            child.__class__ = reversible_class(type(child), swap)
            self._swapped.add(child)
        if isinstance(child, ReversibleNeuron):
            place.kind, place.statistics = type(child).__name__, child.record.statistics
        elif reason or looks_spiking(child):
            place.left = reason or f"{place.kind} has no reversible counterpart"
        else:
            return
        self._neurons.append(place)

    def _place(self, module: nn.Module) -> _Place:
        if module not in self._places:
            self._places[module] = _Place(type(module).__name__)
        return self._places[module]


def _account(place: _Place, name: str) -> Account:
    if place.statistics is None:
        return Account(name, place.kind, left=place.left)
    return account_of(name, place.kind, place.statistics)


def run(path: Path, arguments: list[str]) -> tuple[int, str]:
    """Run a script as ``python path arguments...`` would, but for its neurons.

    An exception that the script does not catch is printed as Python prints it.

    Returns:
        Its exit code, and the report of its neurons.
    """
    with SwapOnRegistration() as swaps:
        code = _exit_code_of(path, arguments)
    explanation = swaps.explain()
    if not explanation.rows:
        return code, "snn-revplugin: no spiking neuron of a known host became part of a module"
    swapped = sum(not row.left for row in explanation.rows)
    return (
        code,
        (
            f"snn-revplugin: {swapped} of {len(explanation.rows)} spiking neurons ran as reversible"
            f" ones\n{explanation}"
        ),
    )


def _exit_code_of(path: Path, arguments: list[str]) -> int:
    with _as_the_program(path, arguments):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as request:
            if request.code is None or isinstance(request.code, int):
                return request.code or 0
            print(request.code, file=sys.stderr)
            return 1
        except BaseException as error:
            traceback.print_exception(type(error), error, _inside(error.__traceback__, path))
            return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    return 0


@contextmanager
def _as_the_program(path: Path, arguments: list[str]) -> Iterator[None]:
    """``sys.argv`` and ``sys.path`` as the script would find them."""
    argv, search = sys.argv, sys.path
    sys.argv = [str(path), *arguments]
    sys.path = [os.path.dirname(os.path.realpath(path)), *search]
    try:
        yield
    finally:
        sys.argv, sys.path = argv, search


def _inside(trace: TracebackType | None, path: Path) -> TracebackType | None:
    """The part of a traceback from the script on down; all of it if the script was not reached (a
    syntax error)."""
    start = trace
    while start is not None and start.tb_frame.f_code.co_filename != str(path):
        start = start.tb_next
    return start or trace

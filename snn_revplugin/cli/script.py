"""A user's training script, unmodified, with its neurons swapped while it runs."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from weakref import ref

import torch.nn as nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..bptt.statistics import CallStatistics
from ..replay import ReaderStatistics
from ..report.explain import Account, Explanation, account_of, account_of_readers
from ..swap.module import CompiledCalls, ReversibleNeuron
from ..swap.table import host_class, make_host, make_reversible, swap_for
from ..swap.watch import set_watch, unwatch

INTERRUPTED = 130  # a shell's exit code for Ctrl-C
TIP = (
    "  while the script ran, the classes of {swapped} of them were swapped: isinstance(m, ItsClass)"
    " stays true, while type(m) == ItsClass and m.__class__.__name__ == 'ItsClass' become false"
)


@dataclass(eq=False)
class _Place:
    """The place of a module in its net. It outlives the module and holds no tensor, so that the
    report can name the neurons of a net that no longer exists."""

    kind: str
    module: ref[nn.Module]
    name: str = ""
    parent: _Place | None = None
    statistics: CallStatistics | None = None
    compiled: CompiledCalls = field(default_factory=CompiledCalls)
    swapped: bool = False
    left: str = ""
    readers: ReaderStatistics | None = None  # of a module that is watched

    @property
    def root(self) -> _Place:
        return self if self.parent is None else self.parent.root

    @property
    def path(self) -> str:
        above = "" if self.parent is None else self.parent.path
        return f"{above}.{self.name}" if above else self.name

    @property
    def above(self) -> Iterator[_Place]:
        """The places of the modules that the module is part of, from the innermost on."""
        if self.parent is not None:
            yield self.parent
            yield from self.parent.above


class SwapOnRegistration:
    """Makes every supported neuron reversible that becomes a submodule of another module inside a
    ``with`` block.

    A neuron that never becomes a submodule, or becomes one without being assigned (in a copy, or an
    unpickled module), is not seen. What reads the spikes of the last neurons saves memory, too.
    After the block the neurons that still exist have their host's class again.
    """

    def __init__(self) -> None:
        # By identity: modules may define __eq__ and __hash__ that fail, or that find others equal.
        # The entry of a module is removed when it dies, before its id can be another's.
        self._places: dict[int, _Place] = {}
        self._neurons: list[_Place] = []
        self._watched: list[_Place] = []

    def __enter__(self) -> SwapOnRegistration:
        self._hook = register_module_module_registration_hook(self._registered)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()
        for place in list(self._places.values()):
            module = place.module()
            if module is None:
                continue
            unwatch(module)
            host = host_class(module) if place.swapped else None
            if host is not None:
                make_host(module, host)

    def explain(self) -> Explanation:
        """What every neuron kept and why, with the class of its outermost module before its
        name."""
        roots: dict[_Place, str] = {}
        for place in (*self._neurons, *self._watched):
            root = place.root
            if root not in roots:
                count = sum(each.kind == root.kind for each in roots)
                roots[root] = root.kind if count == 0 else f"{root.kind} ({count + 1})"
        rows = [_account(place, f"{roots[place.root]}.{place.path}") for place in self._neurons]
        readers = [
            account_of_readers(".".join(filter(None, (roots[place.root], place.path))), statistics)
            for place in self._watched
            if (statistics := place.readers) is not None
        ]
        accounts = tuple(each for each in readers if each is not None)
        return Explanation(tuple(rows), readers=accounts)

    def report(self) -> str:
        """The explanation under a line that counts the neurons."""
        explanation = self.explain()
        rows = explanation.rows
        if not rows:
            return "snn-revplugin: no spiking neuron of a known host became part of a module"
        reversible = sum(row.is_reversible for row in rows)
        swapped = sum(place.swapped for place in self._neurons)
        lines = [
            f"snn-revplugin: {reversible} of {len(rows)} spiking neurons ran as reversible ones"
        ]
        if swapped:
            lines.append(TIP.format(swapped=swapped))
        return "\n".join((*lines, str(explanation)))

    def _registered(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is None:
            return
        place = self._place(child)
        place.parent, place.name = self._place(parent), name
        self._swap(child, place)
        if place.statistics is not None or place.readers is not None:
            self._watch(place.above)

    def _watch(self, places: Iterable[_Place]) -> None:
        for place in places:
            module = place.module()
            if place.readers is None and place.statistics is None and module is not None:
                place.readers = set_watch(module).record.statistics
                self._watched.append(place)

    def _swap(self, child: nn.Module, place: _Place) -> None:
        if place.statistics is not None or place.left:
            return  # known already, under another name
        swap, reason = swap_for(child)
        if swap is not None:
            make_reversible(child, swap)
            place.swapped = True
        if isinstance(child, ReversibleNeuron):
            place.kind, place.statistics = type(child).__name__, child.record.statistics
            place.compiled = child._compiled_calls
        elif reason:
            place.left = reason
        else:
            return
        self._neurons.append(place)

    def _place(self, module: nn.Module) -> _Place:
        key = id(module)
        if key not in self._places:
            alive = ref(module, lambda _: self._places.pop(key, None))
            self._places[key] = _Place(type(module).__name__, alive)
        return self._places[key]


def _account(place: _Place, name: str) -> Account:
    if place.statistics is None:
        return Account(name, place.kind, left=place.left)
    return account_of(name, place.kind, place.statistics, place.compiled)


def run(target: str, arguments: list[str], is_module: bool = False) -> tuple[int, str]:
    """Run a script as ``python target arguments...`` would, or a module as ``python -m`` would, but
    for its neurons.

    An exception that the script does not catch is printed as Python prints it.

    Returns:
        Its exit code, and the report of its neurons.
    """
    with SwapOnRegistration() as swaps:
        code = _exit_code_of(target, arguments, is_module)
    return code, swaps.report()


def _exit_code_of(target: str, arguments: list[str], is_module: bool) -> int:
    directory = os.getcwd() if is_module else os.path.dirname(os.path.realpath(target))
    with _as_the_program([target, *arguments], directory):
        try:
            if is_module:
                runpy.run_module(target, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(target, run_name="__main__")
        except SystemExit as request:
            if request.code is None or isinstance(request.code, int):
                return request.code or 0
            print(request.code, file=sys.stderr)
            return 1
        except BaseException as error:
            _print(error)
            return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    return 0


@contextmanager
def _as_the_program(argv: list[str], directory: str) -> Iterator[None]:
    """``sys.argv`` and ``sys.path`` as Python would set them for the script."""
    before = sys.argv, sys.path
    sys.argv, sys.path = argv, [directory, *sys.path]
    try:
        yield
    finally:
        sys.argv, sys.path = before


def _print(error: BaseException) -> None:
    """Print an exception with the part of its traceback that belongs to the script."""
    trace = error.__traceback__
    inside = _inside(trace)
    if inside is None and isinstance(error, ImportError) and _last(trace) == runpy.__name__:
        print(f"snn-revplugin: {error}", file=sys.stderr)  # there is no such module
        return
    traceback.print_exception(type(error), error, inside or trace)


def _inside(trace: TracebackType | None) -> TracebackType | None:
    """A traceback from the script's first frame; None if the script was not reached (a syntax
    error)."""
    while trace is not None and trace.tb_frame.f_globals.get("__name__") != "__main__":
        trace = trace.tb_next
    return trace


def _last(trace: TracebackType | None) -> str | None:
    """The name of the module that raised."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return None if trace is None else trace.tb_frame.f_globals.get("__name__")

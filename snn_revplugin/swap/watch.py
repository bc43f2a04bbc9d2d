"""``watch``: memory is saved behind the last neuron, too.

A neuron replaces what the layers below it saved. No neuron follows on a read-out, so the module
that the user calls does this at the end of its forward. A reader that a time loop calls at each
step does not wait so long: its own hook walks from what it gives out.

The first forward that records a gradient finds out which modules these are, and every other module
loses its hook and costs nothing from then on:

* of the modules with neurons in them, those that are called inside another one's forward;
* of those without, the readers' candidates, those from whose outputs nothing is left to release
  when they are called the next time, or when the forward ends: a neuron has walked there.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..replay import ReaderRecord, Readers
from ..settings import get_settings
from ..torch_internals import distributed, module_hooks, saved_tensors, transforms
from ..torch_internals.graph import Edge
from .hosts import is_neuron
from .module import ReversibleNeuron

WATCHED = "snn_revplugin: the readers behind the last neuron"
READER = "snn_revplugin: a reader behind the last neuron"
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Watch:
    """The hooks of a watched module, which hold all that the library knows of its readers. Copies
    and pickles of the module start with a fresh one."""

    def __init__(self) -> None:
        self.record = ReaderRecord()
        self._owner: weakref.ref[nn.Module] | None = None
        self._looks_for_readers = True
        self._most_late = 0  # bytes that the hooks of readers had left to the end of a forward
        self._local = _Ages()

    def begin(self, module: nn.Module, inputs: tuple) -> None:
        """The hook before the module's forward."""
        if torch.compiler.is_compiling():
            return
        forwards = _under_way.forwards
        # Entries that an exception beside Exception left behind.
        while forwards and (forwards[-1].root() is None or forwards[-1].root() is module):
            forwards.pop()
        if not _saves_memory():
            return
        if forwards and forwards[-1].holds(module):
            module_hooks.remove_hooks(module, WATCHED)
            return
        if self._looks_for_readers:
            self._looks_for_readers = False
            if not distributed.is_sharded(module):
                _look_for_readers(module)
        forwards.append(_Forward(module, Readers(self._record_of(module), self._local.seen)))

    def end(self, module: nn.Module, inputs: tuple, outputs: Any) -> None:
        """The hook after the module's forward."""
        if torch.compiler.is_compiling():
            return
        forwards = _under_way.forwards
        if not forwards or forwards[-1].root() is not module:
            return
        edges, forward = tuple(_edges_of(outputs)), forwards.pop()
        if outputs is None:  # an exception, perhaps, in front of a neuron
            return
        late = forward.end(edges)
        self._local.seen = forward.readers.note(edges)
        if late > 2 * self._most_late:  # the forward that looked may have had a small batch
            self._most_late, self._looks_for_readers = late, True

    def _record_of(self, module: nn.Module) -> ReaderRecord:
        """The record; a replica of ``nn.DataParallel`` has one of its own, which counts in the same
        statistics."""
        owner = None if self._owner is None else self._owner()
        if owner is None:
            self._owner, owner = weakref.ref(module), module
        return self.record if owner is module else ReaderRecord(self.record.statistics)

    def __deepcopy__(self, memo: dict) -> Watch:
        return Watch()

    def __reduce__(self) -> tuple[type[Watch], tuple]:
        return Watch, ()


class Reader:
    """The hook of a module that may read behind the last neuron."""

    def __init__(self) -> None:
        self.reads = False  # whether it is known to

    def see(self, module: nn.Module, inputs: tuple, outputs: Any) -> None:
        """The hook after the module's forward."""
        if torch.compiler.is_compiling() or not _under_way.forwards or not _saves_memory():
            return
        forward = _under_way.forwards[-1]
        if saved_tensors.saved_tensor_hooks_active():  # a checkpoint decides, now and later
            self.remove(module)
            return
        if self in forward.called:
            forward.judge(self)
        elif not self.reads:
            forward.called[self] = module, tuple(_edges_of(outputs))
        if self.reads:
            forward.readers.release(_edges_of(outputs))

    def remove(self, module: nn.Module) -> None:
        """Remove the hook."""
        module_hooks.remove_hooks(module, READER)

    def __deepcopy__(self, memo: dict) -> Reader:
        return Reader()

    def __reduce__(self) -> tuple[type[Reader], tuple]:
        return Reader, ()


class _Forward:
    """A forward of a watched module that is under way.

    Attributes:
        root: the module.
        readers: the graph behind its last neurons.
        called: the modules that may be readers, with what they gave out at their last call.
    """

    def __init__(self, root: nn.Module, readers: Readers) -> None:
        self.root, self.readers = weakref.ref(root), readers
        self.called: dict[Reader, tuple[nn.Module, tuple[Edge, ...]]] = {}

    def holds(self, module: nn.Module) -> bool:
        """Whether a module is part of the one whose forward this is."""
        return any(each is module for each in self.root().modules())

    def judge(self, reader: Reader) -> None:
        """Decide whether a module is a reader: no neuron has come to what it gave out at its last
        call, and there is something to save. If it is none, its hook is removed."""
        module, edges = self.called.pop(reader)
        released = self.readers.release(edges)
        reader.reads = released > get_settings().recompute_min_bytes
        if not reader.reads:
            reader.remove(module)

    def end(self, outputs: tuple[Edge, ...]) -> int:
        """Replace what is left of what readers saved on the way to the outputs. Returns its
        bytes."""
        for reader in tuple(self.called):
            self.judge(reader)
        return self.readers.release(outputs)


class _UnderWay(threading.local):
    """The forwards of watched modules that are under way in a thread, the innermost last."""

    def __init__(self) -> None:
        self.forwards: list[_Forward] = []


class _Ages(threading.local):
    """Up to what age a thread's graph nodes have been seen: each thread counts by itself."""

    seen = -1


_under_way = _UnderWay()


def _saves_memory() -> bool:
    return torch.is_grad_enabled() and get_settings().reversible and not transforms.is_transformed()


def _edges_of(outputs: Any) -> Iterator[Edge]:
    """Where the graph of some outputs begins. They may be a tensor, or any nesting of tuples,
    lists, dicts and dataclasses."""
    for each in (outputs,) if isinstance(outputs, Tensor) else tree_leaves(outputs):
        if isinstance(each, Tensor):
            if each.grad_fn is not None:
                yield each.grad_fn, each.output_nr
        elif dataclasses.is_dataclass(each) and not isinstance(each, type):
            for one in dataclasses.fields(each):
                yield from _edges_of(getattr(each, one.name, None))


def _look_for_readers(root: nn.Module) -> None:
    """Set a hook on every module below ``root`` that may be a reader: that has no neuron in it."""

    def look(module: nn.Module) -> bool:
        """Whether a module has no neuron in it."""
        if _is_neuron(module):
            return False
        if not isinstance(module, CONTAINERS) and _is_made_of_parts_by_torch(module):
            return True
        can_read = True
        for each in module.children():
            can_read = look(each) and can_read
        if can_read and module is not root and module_hooks.hook_of(module, READER) is None:
            module_hooks.set_hooks(module, READER, Reader().see)
        return can_read

    look(root)


def _is_neuron(module: nn.Module) -> bool:
    return isinstance(module, ReversibleNeuron) or is_neuron(module)


def _is_made_of_parts_by_torch(module: nn.Module) -> bool:
    """A ``TransformerEncoderLayer``, say, which computes otherwise where its parts have hooks."""
    has_parts = next(module.children(), None) is not None
    return has_parts and type(module).__module__.startswith(nn.modules.__name__)


def watch(net: nn.Module) -> None:
    """Save memory behind the last neurons of ``net``, too: of a linear read-out, a convolutional
    head, an average over time. :func:`snn_revplugin.convert` does so by itself; this is for nets
    whose neurons were swapped by hand, and for a read-out outside of the net.

    It adds hooks, and no parameter, buffer or state_dict key. :func:`snn_revplugin.restore` removes
    them.

    Args:
        net: the module that a training step calls, or one that such a module is part of.

    Raises:
        TypeError: ``net`` is no module.

    >>> import torch.nn as nn
    >>> watch(nn.Linear(128, 10))
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    set_watch(net)
    for module in net.modules():
        if not _is_neuron(module) and any(_is_neuron(each) for each in module.modules()):
            set_watch(module)


def set_watch(module: nn.Module) -> Watch:
    """Set the hooks on one module."""
    watch = watch_of(module)
    if watch is None:
        watch = Watch()
        module_hooks.set_hooks(module, WATCHED, watch.end, watch.begin)
    return watch


def watch_of(module: nn.Module) -> Watch | None:
    """What watches a module's readers, if :func:`watch` was called for it."""
    hook = module_hooks.hook_of(module, WATCHED)
    return None if hook is None else hook.__self__


def watches_of(net: nn.Module) -> dict[str, Watch]:
    """What watches the readers of ``net`` and of modules in it, by the module's name."""
    watches = {name: watch_of(module) for name, module in net.named_modules()}
    return {name: each for name, each in watches.items() if each is not None}


def unwatch(module: nn.Module) -> None:
    """Remove the hooks on one module."""
    for name in (WATCHED, READER):
        module_hooks.remove_hooks(module, name)

"""A copy of a module to run time steps on: it shares the module's parameters, and nothing that a
step writes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterator
from types import MethodType
from typing import Any

import torch.nn as nn
from torch import Tensor

from ..torch_internals import capture
from ..torch_internals.versioned import mark_of

Copies = dict[int, nn.Module | Tensor]  # by the id of the original
PLAIN = (int, float, bool, str)  # attributes that are compared by value
HELD = "_held_states"  # where a plain module's states are put, which has no place for them
MARK = "_compiled_calls"  # what every module has that is reversible
LEFT = "_left_outputs"  # attributes that stand for outputs
NOT_COPIED = ("_record", MARK, HELD, LEFT)  # our own, of such a module


def copy_of(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Copy a module.

    Args:
        module: it. Its submodules are copied too. No constructor runs.
        kind: the class of the copy.

    Returns:
        The copy. Its parameters are aliases, leaves of their own that share the memory. Its buffers
        have memory of their own. All other attributes are the module's, except containers and
        methods that are bound to the module.
    """
    copies: Copies = {}
    copy = _copied(module, kind, copies)
    for each in copies.values():
        if isinstance(each, nn.Module):
            for name, value in each.__dict__.items():
                if name != "_modules":
                    each.__dict__[name] = _referring(value, copies)
    return copy


class _Method:
    """A method bound to a copy, weakly: a copy that held it would be a reference cycle."""

    __slots__ = ("__func__", "_owner")

    def __init__(self, function: Callable[..., Any], owner: nn.Module) -> None:
        self.__func__, self._owner = function, weakref.ref(owner)

    @property
    def __self__(self) -> nn.Module | None:
        return self._owner()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self._owner(), *args, **kwargs)


def _referring(value: Any, copies: Copies) -> Any:
    """An attribute that refers to the copies where the original refers to the originals."""
    if isinstance(value, MethodType | _Method) and id(value.__self__) in copies:
        return _Method(value.__func__, copies[id(value.__self__)])
    if isinstance(value, list):
        return [copies.get(id(each), each) for each in value]
    return copies.get(id(value), value)


def _copied(module: nn.Module, kind: type[nn.Module], copies: Copies) -> nn.Module:
    if id(module) in copies:
        return copies[id(module)]
    copy = copies[id(module)] = object.__new__(kind)
    attributes = {
        name: value.copy() if isinstance(value, dict | list | set) else value
        for name, value in module.__dict__.items()
        if name not in NOT_COPIED
    }
    if kind is type(module) and MARK in module.__dict__:  # inside another neuron, of whose step
        attributes["reversible"] = False  # it is a part
    attributes["_modules"] = {
        name: each and _copied(each, type(each), copies) for name, each in module._modules.items()
    }
    attributes["_parameters"] = {
        name: each if each is None else _alias(each, copies)
        for name, each in module._parameters.items()
    }
    attributes["_buffers"] = {
        name: each if each is None else each.detach().clone()
        for name, each in module._buffers.items()
    }
    copy.__dict__.update(attributes)
    return copy


def _alias(parameter: Tensor, copies: Copies) -> Tensor:
    if id(parameter) not in copies:
        copies[id(parameter)] = parameter.detach().requires_grad_(parameter.requires_grad)
    return copies[id(parameter)]


def entries_of(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Every attribute, buffer, parameter and other entry of a module and its submodules: where it
    stands, under which name, and its value."""
    for each in module.modules():
        for name, value in each.__dict__.items():
            if name in NOT_COPIED:
                continue
            if isinstance(value, dict):
                yield from ((value, inner, entry) for inner, entry in value.items())
            else:
                yield each.__dict__, name, value


class Snapshot:
    """The entries of a module at one moment, to find what was written since.

    Tensors count as written when they are replaced, or written into in place.
    """

    __slots__ = ("_entries",)

    def __init__(self, module: nn.Module, leave_out: Container[str] = ()) -> None:
        self._entries = [
            (place, name, value, _mark(value))
            for place, name, value in entries_of(module)
            if name not in leave_out
        ]

    def written(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Where an entry has been written since, and its name."""
        yield from ((place, name) for place, name, _ in self.written_since())

    def written_since(self) -> Iterator[tuple[dict[str, Any], str, Any]]:
        """:meth:`written`, with what stood there."""
        for place, name, value, mark in self._entries:
            now = place.get(name, self)
            if not _is_same(now, value) or _mark(value) != mark:
                yield place, name, value


def _is_same(now: Any, before: Any) -> bool:
    """Whether an attribute is what it was: the same object, a plain value that is equal, or an
    empty list, such as a host's reset makes anew."""
    if now is before:
        return True
    if type(now) in PLAIN:
        return now == before
    return type(now) is type(before) is list and not now and not before


def _mark(value: Any) -> tuple | None:
    """What changes when a tensor is written into or is given other memory; of a single number on a
    CPU also the number, which tells of a write through ``.data``."""
    if not isinstance(value, Tensor):
        return None
    single = value.numel() == 1 and not value.requires_grad and capture.may_compare(value)
    return *mark_of(value), value.item() if single else None

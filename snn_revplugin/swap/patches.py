"""Changes to a host's tools that look neurons up by their exact class, for as long as they are
needed.

A patch replaces one attribute of a host's module. It stands while a reversible neuron of that host
exists, and :func:`snn_revplugin.restore` takes it back with the last of them.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary


@dataclass(frozen=True, slots=True)
class Patch:
    """One attribute to replace.

    Args:
        tool: the tool that the attribute belongs to, as its users call it.
        module: the name of the host's module.
        attribute: the attribute, with dots where it belongs to a class of that module.
        replace: takes the host's attribute to the one that stands in its place.
    """

    tool: str
    module: str
    attribute: str
    replace: Callable[[Any], Any]


def import_tool(tool: str, module: str) -> ModuleType | None:
    """The module of a host's tool; None where it cannot be imported, and so cannot be used either.

    A missing module or package says nothing. Any other error is reported as a warning.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        return None
    except Exception as error:
        warnings.warn(
            f"{tool} does not know reversible neurons: importing {module} raised"
            f" {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return None


class Patches:
    """The patches of one host, applied while neurons hold them."""

    def __init__(self, *patches: Patch) -> None:
        self.patches = patches
        self._active = False
        self._holders: WeakValueDictionary[int, object] = WeakValueDictionary()
        self._applied: list[tuple[Any, str, Any, Any]] = []  # owner, name, host's, ours

    def hold(self, neuron: object) -> None:
        """Apply the patches, if they are not applied, and keep them while ``neuron`` lives."""
        if not self._active:
            self._active = True
            for patch in self.patches:
                self._apply(patch)
        self._holders[id(neuron)] = neuron

    def release(self, neuron: object) -> None:
        """Undo the patches if no other neuron holds them."""
        self._holders.pop(id(neuron), None)
        self.undo_if_unused()

    def _apply(self, patch: Patch) -> None:
        module = import_tool(patch.tool, patch.module)
        if module is None:
            return
        path, _, name = patch.attribute.rpartition(".")
        try:
            owner = attrgetter(path)(module) if path else module
            original = getattr(owner, name)
        except AttributeError:
            warnings.warn(
                f"{patch.tool} does not know reversible neurons: this release of the host has no"
                f" {patch.module}.{patch.attribute}",
                stacklevel=3,
            )
            return
        replacement = patch.replace(original)
        setattr(owner, name, replacement)
        self._applied.append((owner, name, original, replacement))

    def undo_if_unused(self) -> None:
        """Undo the patches if no neuron that holds them exists."""
        if self._holders:
            return
        self._active = False
        while self._applied:
            owner, name, original, replacement = self._applied.pop()
            if getattr(owner, name) is replacement:  # or another library has patched it since
                setattr(owner, name, original)

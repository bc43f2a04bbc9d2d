"""The decorator of kernels: compiled by Triton, or run by its interpreter.

``triton.jit`` decides by the environment, when a kernel is defined. Here the package decides that a
module of kernels is imported into (:func:`.launch.kernels`), so the environment is never written
into.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

_KIND = InterpretedFunction if __package__.endswith(".interpreted") else JITFunction


def jit(function: Callable | None = None, **options: Any) -> Any:
    """A kernel, or a function of kernels; ``options`` are those of ``triton.jit``."""
    if function is None:
        return lambda decorated: _KIND(decorated, **options)
    return _KIND(function, **options)

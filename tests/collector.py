"""Python's garbage collector, which memory must not need in order to be freed."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage_collector() -> Iterator[None]:
    """A block in which the garbage collector does not run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def after_launches() -> None:
    """To be called before memory is read where neurons may have run in Triton's interpreter.

    Each launch there leaves a cycle of the interpreter's own, a function that refers to itself and
    to the storages of its arguments (``GridExecutor._init_args_hst``): only the garbage collector
    frees that one.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        gc.collect()

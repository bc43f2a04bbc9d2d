"""What transforms or watches the operations of this thread: torch.compile, tracing, vmap, dispatch
modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch.utils.checkpoint import CheckpointPolicy

RECOMPUTE = {
    "recompute": CheckpointPolicy.PREFER_RECOMPUTE,
    "ac_graph_id": 0,
}  # the mark of a traced node


def is_transformed() -> bool:
    """Whether the code runs under torch.compile, tracing, vmap or another functorch transform."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def modes_at_work() -> list[Any]:
    """The ``TorchDispatchMode`` and ``TorchFunctionMode`` objects that see the operations of this
    thread: counters, say."""
    dispatch, functions = torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()
    if not dispatch and not functions:  # nearly always, and asked at each time step
        return []
    modes = [torch._C._get_dispatch_stack_at(i) for i in range(dispatch)]
    return modes + [torch._C._get_function_stack_at(i) for i in range(functions)]


def is_transformed_while_compiling() -> bool:
    """Whether code that ``torch.compile`` traces runs under vmap or another functorch transform."""
    return torch._C._functorch.maybe_current_level() is not None


@contextmanager
def recomputed_when_compiled() -> Iterator[None]:
    """Whatever ``torch.compile`` traces inside is recomputed in backward, not kept: the mark
    that ``checkpoint`` leaves on the nodes of a traced graph. Left to itself the partitioner keeps
    what a convolution's backward reads, however cheap."""
    meta = fx_traceback.current_meta
    before = {name: meta[name] for name in RECOMPUTE if name in meta}
    for name, value in RECOMPUTE.items():
        meta.setdefault(name, value)  # inside of a checkpoint, that one's
    try:
        yield
    finally:
        for name in RECOMPUTE:
            meta.pop(name, None)
        meta.update(before)

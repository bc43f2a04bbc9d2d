"""The backward pass that autograd runs in this thread."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .graph import Node

NO_PASS = -1


# Torch's own functions, without one of ours around them: every time step calls them several times.

# A number that identifies the backward pass under way in this thread; ``NO_PASS`` outside of one.
current_pass: Callable[[], int] = torch._C._current_graph_task_id

# Whether the backward pass under way was asked to keep its graph (``retain_graph`` or
# ``create_graph``).
pass_keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph

# The node that this thread differentiates; None where it differentiates none.
current_node: Callable[[], Node | None] = torch._C._current_autograd_node

# A number not larger than ``graph.age_of`` any node that this thread has yet to make, and larger
# than that of those it made.
next_age: Callable[[], int] = torch._C._autograd._get_sequence_nr


def will_run(node: Node) -> bool:
    """Whether the backward pass under way comes to ``node``."""
    return torch._C._will_engine_execute_node(node)


def at_end_of_pass(callback: Callable[[], None]) -> None:
    """Run ``callback`` when the backward pass under way has ended without an exception."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)

"""What the autograd Functions of the steps share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from . import backward_pass

Backward = Callable[..., Any]


def once_differentiable(backward: Backward) -> Backward:
    """Makes the gradient of a gradient an error that says so, as
    ``torch.autograd.function.once_differentiable`` does.

    That takes four changes of grad mode, which in a time loop of small layers is time; a backward
    pass that keeps no graph of its own (``create_graph=False``) needs none of them.
    """
    guarded = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def call(ctx: Any, *grads: Any) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return call


def release_saved(ctx: Any, *names: str) -> None:
    """Empty attributes of a node that has been differentiated, unless the pass keeps its graph.

    Code that holds the last potential holds its node, which must not hold the bits of the whole
    sequence in turn.
    """
    if not backward_pass.pass_keeps_graph():
        for name in names:
            setattr(ctx, name, None)

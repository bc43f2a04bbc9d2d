"""What the autograd Functions of the steps share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

Backward = Callable[..., Any]


def differentiated_once(backward: Backward) -> Backward:
    """Makes the gradient of a gradient an error that says so, as ``torch.autograd.function.once_differentiable`` does.

    That takes four changes of grad mode, which in a time loop of small layers is time; a backward pass that keeps no graph
    of its own (``create_graph=False``) needs none of them.
    """
    guarded = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def call(ctx: Any, *grads: Any) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return call

"""Whether any code can read or change the gradient at a graph node's output.

If none can, two nodes may pass the gradient between them in another way than through autograd.
"""

from __future__ import annotations

import sys
from typing import Any
from weakref import ReferenceType

import torch
from torch import Tensor

from .graph import Node

HOOKED = "snn_revplugin_hooked"


class _NotesHooks:
    """A graph node that notes that a hook is set on its outputs' gradients, or on itself."""

    __slots__ = ()

    def _register_hook_dict(self, tensor: Tensor) -> Any:
        setattr(self, HOOKED, True)
        return super()._register_hook_dict(tensor)

    def register_hook(self, hook: Any) -> Any:
        setattr(self, HOOKED, True)
        return super().register_hook(hook)

    def register_prehook(self, hook: Any) -> Any:
        setattr(self, HOOKED, True)
        return super().register_prehook(hook)


def notes_hooks(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Let :func:`is_unseen` be asked of the graph nodes of a Function."""
    nodes = function._backward_cls
    function._backward_cls = type(nodes.__name__, (_NotesHooks, nodes), {"__slots__": (HOOKED,)})
    return function


def is_unseen(reader: Node, tensor: ReferenceType[Tensor]) -> bool:
    """Whether no code can read the gradient at a tensor: no hook is set on the tensor or its node,
    and no reference to either is left for ``torch.autograd.grad`` or ``.grad``.

    Args:
        reader: the graph node whose first input it is.
        tensor: the output of a Function with :func:`notes_hooks`.
    """
    return (
        tensor() is None
        and not getattr(reader.next_functions[0][0], HOOKED, False)
        and _references_below(reader) <= OWN_REFERENCES
    )


def _references_below(reader: Node) -> int:
    return sys.getrefcount(reader.next_functions[0][0])


class _Passes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()


def _own_references() -> int:
    """The references to a node that only its reader holds; they differ between releases of
    Python."""
    with torch.enable_grad():
        return _references_below(_Passes.apply(torch.ones(1, requires_grad=True)).sum().grad_fn)


OWN_REFERENCES = _own_references()

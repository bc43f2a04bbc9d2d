"""The tensors that graph nodes save: read one, put a function in its place, count who else holds
it."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .graph import Node

TELLS_HOOKS = hasattr(torch._C._autograd.SavedTensor, "unpack_hook")  # not in torch 2.6
REPLACED = "snn_revplugin_replaced_"


def saved_tensor_hooks_active() -> bool:
    """Whether someone (a checkpoint, ``save_on_cpu``) decides at present how autograd saves
    tensors."""
    return not torch._C._autograd._saved_tensors_hooks_is_enabled() or _default_hooks_are_set()


def _default_hooks_are_set() -> bool:
    if TELLS_HOOKS:
        return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    try:  # torch 2.6 forbids hooks as ever, but complains where there are some already
        torch._C._autograd._saved_tensors_hooks_disable("")
    except RuntimeError:
        return True
    finally:
        torch._C._autograd._saved_tensors_hooks_enable()
    return False


def saved_by(node: Node, name: str) -> Tensor | None:
    """The tensor that ``node`` saved as ``name``, or None where it saved none or somebody's hook
    unpacks it."""
    try:
        if not TELLS_HOOKS:
            return _read_unless_hooked(node, "_saved_" + name)
        if getattr(getattr(node, "_raw_saved_" + name), "unpack_hook", None) is not None:
            # asking would run it: a checkpoint would compute itself again in the middle of the
            # forward
            return None
        return getattr(node, "_saved_" + name)
    except (
        RuntimeError
    ):  # freed, or changed in place since: autograd itself will say so in backward
        return None


def _read_unless_hooked(node: Node, attribute: str) -> Tensor | None:
    """A saved tensor, or None if a hook of Python code would have to run for it.

    Torch 2.6 does not say whether a saved tensor has hooks. So it is read while a profile function
    refuses every call of Python code; where somebody else profiles, it is not read at all.
    """
    if sys.getprofile() is not None:
        return None
    collects = gc.isenabled()
    gc.disable()  # or a finaliser's call could be refused
    sys.setprofile(_refuse_calls)
    try:
        return getattr(node, attribute)
    finally:
        sys.setprofile(None)
        if collects:
            gc.enable()


def _refuse_calls(frame: Any, event: str, argument: Any) -> None:
    called_here = frame.f_back is not None and frame.f_back.f_code is _read_unless_hooked.__code__
    if (
        event == "call" and called_here and frame.f_code.co_name != "__torch_dispatch__"
    ):  # a dispatch mode sees the reading
        raise RuntimeError("a saved tensor has hooks")


def replace_saved(node: Node, name: str, unpack: Callable[[], Tensor]) -> bool:
    """Make autograd let go of a saved tensor now and call ``unpack`` when backward asks for it.

    Returns False where somebody else's hooks are set on it already.
    """
    _handing.unpack = unpack = unpack if TELLS_HOOKS else _Replacement(unpack)
    try:
        getattr(node, "_raw_saved_" + name).register_hooks(_hand_over, _call)
    except RuntimeError:
        return False
    if not TELLS_HOOKS:
        node.metadata[REPLACED + name] = weakref.ref(unpack)
    return True


def replacement_of(node: Node, name: str) -> Callable[[], Tensor] | None:
    """What :func:`replace_saved` put in the place of a saved tensor, or None if it did not."""
    if not TELLS_HOOKS:
        remembered = node.metadata.get(REPLACED + name)
        replacement = remembered and remembered()
        return replacement and replacement.unpack
    try:
        raw = getattr(node, "_raw_saved_" + name)
        return raw.data if getattr(raw, "unpack_hook", None) is _call else None
    except RuntimeError:  # freed
        return None


@cache
def _names_saved(node_type: type) -> tuple[str, ...]:
    names = (each.removeprefix("_raw_saved_") for each in dir(node_type))
    return tuple(each for each in names if hasattr(node_type, "_saved_" + each))


def all_saved_by(node: Node) -> list[Tensor]:
    """The tensors that a node saved, except those that a hook unpacks."""
    found = [saved_by(node, name) for name in _names_saved(type(node))]
    try:
        raw = getattr(node, "_raw_saved_tensors", ())  # an autograd Function's
        if raw and all(getattr(each, "unpack_hook", None) is None for each in raw):
            found.append(node.saved_tensors)
    except RuntimeError:  # freed
        pass
    return [each for each in tree_leaves(found) if isinstance(each, Tensor)]


class _Replacement:
    """What torch 2.6, which does not say what a saved tensor's hooks hold, gives us to remember it
    by: as it lives in the hook alone, a weak reference to it dies when autograd lets go of the
    saved tensor."""

    __slots__ = ("__weakref__", "unpack")

    def __init__(self, unpack: Callable[[], Tensor]) -> None:
        self.unpack = unpack

    def __call__(self) -> Tensor:
        return self.unpack()


_handing = (
    threading.local()
)  # what the next hook is to pack: a closure for each would stay with the graph as long as the hook


def _hand_over(_: Tensor) -> Callable[[], Tensor]:
    unpack, _handing.unpack = _handing.unpack, None
    return unpack


def _call(unpack: Callable[[], Tensor]) -> Tensor:
    return unpack()


def held_by_autograd_alone(tensor: Tensor, references: int) -> bool:
    """Whether Python code knows no other reference to a saved tensor than the ``references`` of our
    own frames."""
    return (
        sys.getrefcount(tensor) <= references + 1 + REFERENCES_OF_AUTOGRAD and not tensor._is_view()
    )


def is_unseen(tensor: Tensor, references: int) -> bool:
    """Whether nobody has put a hook on the gradient of a saved tensor, or ever can; ``references``
    as above."""
    return (
        not tensor._backward_hooks
        and not tensor.retains_grad
        and held_by_autograd_alone(tensor, references + 1)
    )


def _references_of_autograd() -> int:
    """What a saved tensor's count of references shows above those of Python code; it differs
    between torch releases."""
    with torch.enable_grad():
        product = torch.ones(1, requires_grad=True) * torch.ones(1)
        saved = product.grad_fn._saved_other
    return sys.getrefcount(saved) - 1


REFERENCES_OF_AUTOGRAD = (
    _references_of_autograd()
)  # counted at import, where no mode is at work that holds tensors of its own


def replace_saved_by_function(node: Node, unpacks: Sequence[Callable[[], Tensor]]) -> None:
    """Release the tensors that an autograd Function of ours saved, and call these functions where
    its ``ctx.saved_tensors`` are read. A tensor that is recomputed so comes back with the edge that
    it had in the graph."""
    for raw, unpack in zip(node._raw_saved_tensors, unpacks, strict=True):
        _handing.unpack = unpack
        raw.register_hooks(_hand_over, _call)

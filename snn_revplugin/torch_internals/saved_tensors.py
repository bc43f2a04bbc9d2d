"""The tensors that graph nodes save: read one, put a function in its place, count its other
references."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .graph import Node

# Recomputes one of the tensors that a Function has saved, by its position among them.
Recompute = Callable[[int], Tensor]


def saved_tensor_hooks_active() -> bool:
    """Whether another tool (a checkpoint, ``save_on_cpu``) decides now how autograd saves
    tensors."""
    autograd = torch._C._autograd
    return (
        not autograd._saved_tensors_hooks_is_enabled()
        or autograd._top_saved_tensors_default_hooks(True) is not None
    )


def saved_by(node: Node, name: str) -> Tensor | None:
    """The tensor that ``node`` saved as ``name``, or None where it saved none or another tool's
    hook unpacks it."""
    try:
        if getattr(getattr(node, "_raw_saved_" + name), "unpack_hook", None) is not None:
            # Reading it would run the hook: a checkpoint would recompute in the middle of forward.
            return None
        return getattr(node, "_saved_" + name)
    except RuntimeError:
        # Freed, or changed in place since: autograd itself raises in backward.
        return None


def replace_saved(node: Node, name: str | int, unpack: Callable[[], Tensor]) -> bool:
    """Make autograd release a saved tensor now and call ``unpack`` when backward asks for it.

    Args:
        node: saved it.
        name: under which the node saved it; for an autograd Function the position among its saved
            tensors.
        unpack: gives a tensor that is equal.

    Returns:
        False where another tool's hooks are set on it already.
    """
    _handing.unpack = unpack
    try:
        _raw_saved(node, name).register_hooks(_hand_over, _call)
    except RuntimeError:
        return False
    return True


def _raw_saved(node: Node, name: str | int) -> Any:
    return (
        node._raw_saved_tensors[name]
        if isinstance(name, int)
        else getattr(node, "_raw_saved_" + name)
    )


def saved_inputs(node: Node) -> Iterator[tuple[str | int, Tensor]]:
    """The inputs that a node saved, whatever its operation, without leaves and those that a hook
    unpacks: names, or positions for an autograd Function, and tensors."""
    below = node.next_functions
    if saves_as_function(node):
        try:
            raw = node._raw_saved_tensors
            if any(getattr(each, "unpack_hook", None) is not None for each in raw):
                return
            found = list(enumerate(node.saved_tensors)) if raw else []
        except RuntimeError:  # freed, or written into since
            return
    else:
        found = [(name, saved_by(node, name)) for name in _names_saved(type(node))]
    for name, saved in found:
        if isinstance(saved, Tensor) and (saved.grad_fn, saved.output_nr) in below:
            yield name, saved


def saves_as_function(node: Node) -> bool:
    """Whether a node is that of an autograd Function written in Python."""
    return isinstance(node, torch._C._FunctionBase)


def replacement_of(node: Node, name: str) -> Callable[[], Tensor] | None:
    """What :func:`replace_saved` put in the place of a saved tensor, or None if it did not."""
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


class _Handing(threading.local):
    """What the next hooks pack. A closure for each hook would stay with the graph as long as the
    hook."""

    unpack: Callable[[], Tensor] | None = None
    recompute: Recompute | None = None
    positions: Iterator[int] = iter(())


_handing = _Handing()


def _hand_over(_: Tensor) -> Callable[[], Tensor]:
    unpack, _handing.unpack = _handing.unpack, None
    return unpack


def _call(unpack: Callable[[], Tensor]) -> Tensor:
    return unpack()


def held_by_autograd_alone(tensor: Tensor, references: int) -> bool:
    """Whether Python code has no other reference to a saved tensor than the ``references`` of our
    own frames."""
    return (
        sys.getrefcount(tensor) <= references + 1 + REFERENCES_OF_AUTOGRAD and not tensor._is_view()
    )


def is_unseen(tensor: Tensor, references: int) -> bool:
    """Whether no hook is on the gradient of a saved tensor, and none can be put there later;
    ``references`` as above."""
    return (
        not tensor._backward_hooks
        and not tensor.retains_grad
        and held_by_autograd_alone(tensor, references + 1)
    )


def _references_of_autograd() -> int:
    """By how much the reference count of a saved tensor exceeds the references of Python code; it
    differs between torch releases."""
    with torch.enable_grad():
        product = torch.ones(1, requires_grad=True) * torch.ones(1)
        saved = product.grad_fn._saved_other
    return sys.getrefcount(saved) - 1


# Counted at import, where no mode is active that holds tensors.
REFERENCES_OF_AUTOGRAD = _references_of_autograd()


def apply_and_release(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)``, where what ``function`` saves by :func:`save_edges` is
    released at once."""
    autograd = torch._C._autograd
    autograd._push_saved_tensors_default_hooks(_hand_over_next, _recompute_or_pass)
    try:
        return function.apply(*arguments)
    finally:
        autograd._pop_saved_tensors_default_hooks()
        _handing.recompute = None


def save_edges(ctx: Any, tensors: Sequence[Tensor], recompute: Recompute) -> None:
    """Save the edges of some inputs of a Function in the graph, and in the place of their memory
    what recomputes them, for :func:`saved_with_edges`. To be called last in a Function's
    forward."""
    ctx.save_for_backward(*[each if each.requires_grad else None for each in tensors])
    _handing.recompute = recompute
    _handing.positions = iter([i for i, each in enumerate(tensors) if each.requires_grad])


def saved_with_edges(ctx: Any, recompute: Recompute) -> tuple[Tensor, ...]:
    """What a Function saved by :func:`save_edges`: each input recomputed, with its edge if it had
    one."""
    return tuple(recompute(i) if each is None else each for i, each in enumerate(ctx.saved_tensors))


def _hand_over_next(tensor: Tensor) -> tuple[Recompute, int] | Tensor:
    recompute = _handing.recompute
    # Without one it is a tensor of a user's surrogate, inside the forward.
    return tensor if recompute is None else (recompute, next(_handing.positions))


def _recompute_or_pass(packed: tuple[Recompute, int] | Tensor) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    recompute, position = packed
    return recompute(position)

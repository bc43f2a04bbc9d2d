"""Everything private that we use of torch.autograd, in one place.

Each name below is undocumented in torch or lives in ``torch._C``; when a torch release moves one,
this is the only file to mend. What the functions rely on is tested in
``tests/test_autograd_internals.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Node = Any  # torch.autograd.graph.Node, or None at the end of an edge
Edge = tuple[Node, int]  # the node that made a tensor, and which of its outputs the tensor was

# The node that accumulates a leaf's gradient; the leaf is its ``variable``.
Leaf = torch._C._functions.AccumulateGrad
# Functions that give out what they were given: a module's backward hook, and FSDP's notice that it
# may reshard.
PASSING_ON = {"BackwardHookFunctionBackward", "RegisterPostBackwardFunctionBackward"}


def with_slots(
    *names: str,
) -> Callable[[type[torch.autograd.Function]], type[torch.autograd.Function]]:
    """Let the graph nodes of a Function hold these attributes of ``ctx`` in slots. In a time loop
    there are two nodes a step, and the dict that an attribute takes otherwise is larger than the
    node."""

    def decorate(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
        nodes = function._backward_cls
        function._backward_cls = type(nodes.__name__, (nodes,), {"__slots__": names})
        _with_slots.add(function._backward_cls)
        return function

    return decorate


_with_slots: set[type] = set()


def has_slots(node: Node) -> bool:
    """Whether a graph node stands for a call of a Function with slots: those of this library's
    neurons."""
    return type(node) in _with_slots


def age_of(node: Node) -> int:
    """A number that is larger for the later of two nodes that one thread made."""
    return node._sequence_nr()


def is_node_of(node: Node, function: type[torch.autograd.Function]) -> bool:
    """Whether a graph node stands for a call of ``function``."""
    return type(node) is function._backward_cls


def name_of(node: Node) -> str:
    """The name of a graph node's operation: ``'ConvolutionBackward0'``."""
    return type(node).__name__


def is_leaf_edge(node: Node) -> bool:
    """Whether ``node`` accumulates the gradient of a leaf tensor, found as ``node.variable``."""
    return type(node) is Leaf


def nodes_below(node: Node | None) -> set[Node]:
    """A graph node and all below it."""
    found, nodes = set(), [node]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            nodes.extend(below for below, _ in node.next_functions)
    return found


def leaves_of(tensor: Tensor) -> set[Tensor]:
    """The leaf tensors that a tensor has gradients for."""
    return {each.variable for each in nodes_below(tensor.grad_fn) if is_leaf_edge(each)}


def attribute_of(node: Node, name: str) -> Any:
    """What a node remembers of its operation: ``attribute_of(node, 'stride')``; a list as a
    tuple."""
    return plain(getattr(node, "_saved_" + name))


def attributes_of(*names: str) -> Callable[[Node], Any]:
    """A function that reads the named attributes of a node as they are, the one or a tuple of them:
    hashable, but see :func:`plain` for their values."""
    return attrgetter(*("_saved_" + name for name in names))


def plain(value: Any) -> Any:
    """The value of an attribute, whose negative numbers come as unsigned ones of 64 bits."""
    if type(value) is int:
        return value if value < 1 << 63 else value - (1 << 64)
    if type(value) is tuple or type(value) is list:
        return tuple(plain(each) for each in value)
    return value


def outputs_of(node: Node) -> int:
    """How many outputs a graph node's operation has."""
    return len(node._input_metadata)


def shape_of_output(node: Node, output: int = 0) -> Sequence[int]:
    """The shape of an output of a graph node's operation (a view does not save the shape it
    made)."""
    return node._input_metadata[output].shape


def type_of_output(node: Node, output: int = 0) -> tuple[torch.dtype, torch.device]:
    """dtype and device of an output of a graph node's operation."""
    metadata = node._input_metadata[output]
    return metadata.dtype, metadata.device


def is_on_one_device(node: Node) -> bool:
    """Whether what a graph node's operation reads, as far as it has a gradient, lies on the device
    of what it gives."""
    _, device = type_of_output(node)
    below = (each for each in node.next_functions if each[0] is not None)
    return all(type_of_output(*each)[1] == device for each in below)


def wrapped_node(node: Node) -> Node:
    """The node of the operation that wrote into a view, from the ``CopySlices`` that stands for it;
    None where torch is too old to tell."""
    return getattr(node, "_wrapped_node", None)


class Strided(NamedTuple):
    """Which elements of a memory a tensor has."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, whole: Tensor) -> Tensor:
        """The elements of a contiguous tensor: a view of it."""
        return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)

    def normal(self) -> Strided:
        """The same with a stride of 0 for each dimension of one element, where it says nothing."""
        stride = (b if a != 1 else 0 for a, b in zip(self.size, self.stride, strict=True))
        return Strided(tuple(self.size), tuple(stride), self.offset)


class _Strides(TorchDispatchMode):
    """Notes the tensors that are made by their strides."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Strided] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.aten.as_strided.default:
            self.found.append(Strided(*args[1:], *([0] * (4 - len(args)))).normal())
        elif func is torch.ops.aten.new_empty_strided.default:
            self.found.append(Strided(*args[1:3], 0).normal())
        return func(*args, **(kwargs or {}))


def strided_by(node: Node) -> list[Strided] | None:
    """The tensors that the backward of a node of one output takes by their strides: what
    ``AsStridedBackward0`` and ``CopySlices`` know of a view and of the tensor that it views. No
    element is computed, no hook runs, and nothing is freed.

    Returns:
        None where the backward cannot run without elements.
    """
    gradient = torch.empty(tuple(shape_of_output(node)), device="meta")
    try:
        with torch.no_grad(), _Strides() as strides:
            node(gradient)
    except (NotImplementedError, RuntimeError):
        return None
    return strides.found


def gradient_through(node: Node, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """What a node of one output makes of a gradient: one for each of its inputs. No hook runs, and
    nothing is freed."""
    with torch.no_grad():
        result = node(gradient)
    return result if isinstance(result, tuple) else (result,)

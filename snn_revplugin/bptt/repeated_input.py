"""A layer that sees the same data at every time step, such as an image shown T times, is
differentiated once.

Its derivative J is the same at every step, and linear in the gradient:

    J g[0] + J g[1] + ... + J g[T-1]  =  J (g[0] + g[1] + ... + g[T-1])

So in a backward pass its graph nodes hand their gradients on to the last node. That node runs with
the sum, the others run without a gradient. User code sees no difference but rounding: hooks on the
layer's outputs have run by then, and hooks on a parameter run when it has the gradients of all
steps.

A layer is a weight layer together with what lies between it and the neuron (pooling, a batch norm),
as far as autograd alone holds the tensors in between when the neuron is called: then no other code
can have a hook on them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..replay import UNSEEN, operation_of
from ..torch_internals import backward_pass, graph
from ..torch_internals.graph import Edge, Node

# in shorter dtypes the sum of T gradients may overflow where no gradient does
SUMMED = (torch.float32, torch.float64)


def differentiate_once(currents: list[Edge], largest: int) -> None:
    """Differentiate the layer below a neuron once in the backward pass under way.

    Args:
        currents: the neuron's input currents, as edges of the graph: at each time step the same
            operations on the very same tensors. None of them has been differentiated yet.
        largest: elements that the sum of the gradients may have.
    """
    if len(currents) < 2 or graph.type_of_output(*currents[0])[0] not in SUMMED:
        return
    layers = dict.fromkeys(_layer_below(each, currents[i == 0]) for i, each in enumerate(currents))
    if len(layers) < 2 or None in layers:
        return
    bottoms, tops = [each.bottom for each in layers], [each.top for each in layers]
    if not all(_have_same_inputs(each, bottoms[0]) for each in bottoms):
        return
    for nodes in (tops, bottoms):
        if (
            len({type(each) for each in nodes}) == 1
            and math.prod(graph.shape_of_output(nodes[0])) <= largest
        ):
            return _sum_up([each for each in nodes if backward_pass.will_run(each)])


def _sum_up(nodes: list[Node]) -> None:
    total = _Sum(len(nodes))
    handles = [each.register_prehook(total) for each in nodes]
    if backward_pass.pass_keeps_graph():
        backward_pass.at_end_of_pass(lambda: [each.remove() for each in handles])


class _Sum:
    """Takes the gradients with which some nodes are about to run, and gives the sum to the last of
    them."""

    __slots__ = ("is_ours", "left", "pass_id", "total")

    def __init__(self, nodes: int) -> None:
        self.left, self.pass_id = nodes, backward_pass.current_pass()
        self.total: Tensor | None = None
        self.is_ours = False  # whether no other code holds the total

    def __call__(self, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        if backward_pass.current_pass() != self.pass_id:  # an exception ended that one
            return None
        grad, *others = grads  # other outputs, such as the indices of a maximum, have none
        self.left -= 1
        if self.total is None:
            self.total = grad
        elif grad is not None:
            self.total = self.total.add_(grad) if self.is_ours else self.total + grad
            self.is_ours = True
        if self.left:
            return None, *others
        total, self.total = self.total, None  # a potential that is kept holds these nodes
        return total, *others


class _Layer(NamedTuple):
    """The highest and the lowest graph node of a layer at one time step."""

    top: Node
    bottom: Node


def _layer_below(current: Edge, other: Edge) -> _Layer | None:
    """The layer below a current: down to the first node with the same inputs as the one in its
    place below the current of another time step."""
    node, counterpart = top, _ = current[0], other[0]
    while node is not None and type(node) is type(counterpart):
        edges, others = node.next_functions, counterpart.next_functions
        apart = [pair for pair in zip(edges, others, strict=True) if not _are_same(*pair)]
        if not apart:
            operation = operation_of(node)
            is_layer = operation is not None and operation.kind.recompute_on_data
            return _Layer(top, node) if is_layer else None
        if len(apart) > 1:
            return None
        unseen = node.metadata.get(UNSEEN)
        (node, _), (counterpart, _) = apart[0]
        top = top if unseen else node
    return None


def _have_same_inputs(node: Node, other: Node) -> bool:
    edges, others = node.next_functions, other.next_functions
    return (
        type(node) is type(other)
        and len(edges) == len(others)
        and all(map(_are_same, edges, others))
    )


def _are_same(edge: Edge, other: Edge) -> bool:
    """Whether two edges lead to the same tensor, or to like views of it: a linear layer transposes
    its weight each time."""
    if edge == other:
        return True
    (node, output), (counterpart, other_output) = edge, other
    if node is None or counterpart is None or output != other_output:
        return False
    operation = operation_of(node)
    return operation is not None and operation.is_view and _have_same_inputs(node, counterpart)

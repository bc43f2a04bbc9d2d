"""What a walk leaves for the same walk at the next time step.

At every step a neuron meets the same weight layer on the spikes of a neuron below, with the same
weights. A plan notes the layer and its weights; where they still are what was noted, the recipe of
the next step follows without a search.
"""

from __future__ import annotations

import weakref

from ..torch_internals import distributed, graph
from ..torch_internals.graph import Node
from .operations.operation import Operation
from .recipe import HeldTensor, Recipe, Recomputable, Spikes, TransposedLeaf

# the attribute in which a neuron's graph node offers its packed spikes, the node's first output
FIRED = "snn_revplugin_fired"
TRANSPOSE = "TBackward0"


def is_transposed_leaf(node: Node) -> bool:
    """Whether a node transposes a leaf, as a linear layer does with its weight."""
    return graph.name_of(node) == TRANSPOSE and graph.is_leaf_edge(node.next_functions[0][0])


class Plan:
    """A weight layer on spikes.

    Args:
        operation: of the layer's node, which saves the spikes.
        absent: the positions of operands that the call left out.
        recipe: of the node.

    Attributes:
        transposes: how many operands are the transposes of leaves.
    """

    __slots__ = ("_absent", "_weights", "operation", "transposes")

    def __init__(self, operation: Operation, absent: tuple[int, ...], recipe: Recipe) -> None:
        self.operation, self._absent = operation, absent
        # Weakly: nothing may outlive the graphs that read it.
        self._weights = [
            weakref.ref(each) if isinstance(each, HeldTensor) else None for each in recipe.inputs
        ]
        self.transposes = sum(type(each) is TransposedLeaf for each in recipe.inputs)

    @classmethod
    def of(cls, node: Node, operation: Operation, recipe: Recipe) -> Plan | None:
        """The plan that a node leaves; None for one that is no weight layer on spikes."""
        position, edges = operation.by_sample, node.next_functions
        if position is None or operation.inputs[position] is None or operation.outputs:
            return None
        if operation.shape_only or type(recipe.inputs[position]) is not Spikes:
            return None
        for i, each in enumerate(recipe.inputs):
            if i == position or each is None:
                continue
            leaf = type(each) is TransposedLeaf or graph.is_leaf_edge(edges[i][0])
            if not leaf or not isinstance(each, HeldTensor):
                return None
        return cls(operation, operation.absent(node), recipe)

    def operands_of(self, node: Node) -> tuple[Recomputable | None, ...] | None:
        """The operands of a node of the same kind; None where it is another layer or has been
        written into."""
        edges, values = node.next_functions, []
        if self.operation.absent(node) != self._absent:
            return None
        for position, weight in enumerate(self._weights):
            if position == self.operation.by_sample:
                value = _spikes_at(*edges[position])
            elif weight is None:
                values.append(None)
                continue
            else:
                value = _weight_at(edges[position][0], weight())
            if value is None:
                return None
            values.append(value)
        return tuple(values)


def _spikes_at(node: Node, output: int) -> Spikes | None:
    fired = getattr(node, FIRED, None) if output == 0 else None
    return fired if type(fired) is Spikes and not fired.were_edited() else None


def _weight_at(node: Node, held: HeldTensor | None) -> HeldTensor | None:
    """What holds the weight that a node stands for, if it is still what is held."""
    if type(held) is TransposedLeaf:
        leaf = node.next_functions[0][0].variable if is_transposed_leaf(node) else None
        return held if leaf is not None and held.is_of(leaf) else None
    if held is None or not graph.is_leaf_edge(node) or node.variable is not held.held.tensor:
        return None
    return held if held.held.unchanged() and not distributed.is_freed(node.variable) else None

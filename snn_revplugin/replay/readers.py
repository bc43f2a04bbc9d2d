"""The walk for readers: from the outputs of a module down to the spikes of its last neurons.

A neuron's walk ends where the neuron begins. What reads the spikes of the last neurons (a linear
read-out, a convolutional head, a loss) saves them as floats at every time step. So the outputs of
the module are walked from, too.

A reader needs its saved tensors once, in its own backward; no potential is reconstructed from them.
So a tensor is replaced only where that pays: spikes always, others where a few operations recompute
them. A sum over all time steps, say, is kept: it is one tensor, and takes all steps to recompute.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from ..settings import get_settings
from ..torch_internals import graph, saved_tensors
from ..torch_internals.graph import Edge, Node
from .cache import RecipeCache
from .operations.operation import operation_of
from .plan import FIRED
from .recipe import Output, Recipe, Recomputable
from .walk import NOT_WORTH_IT, Place, Visit, Walk

MOST_WORK = 16  # operations that recompute a tensor for a reader
READS = "snn_revplugin_reads"  # where a node notes for later forwards that it lies above spikes
MOST_OLD = 64  # nodes of earlier forwards that one forward comes to


@dataclass
class ReaderStatistics:
    """What the walks for readers replaced and what they met; see ``walk.WalkStatistics``."""

    replaced_bytes: int = 0  # of saved tensors
    small_calls: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    boundaries: Counter[str] = field(default_factory=Counter)
    kept_bytes: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        self.__init__()


class ReaderRecord:
    """What the walks for the readers of one module share.

    Args:
        statistics: those of a module that this one is a replica of.
    """

    def __init__(self, statistics: ReaderStatistics | None = None) -> None:
        self.statistics = ReaderStatistics() if statistics is None else statistics
        self.cache = RecipeCache()


class Readers:
    """The graph behind the last neurons in one forward of a module.

    It holds the graph's nodes, so it may not outlive the forward.

    Args:
        record: of the module.
        seen: the age of the youngest node that an earlier forward came to. Only some of the nodes
            that are as old are visited: a host's neuron may have a graph back to the start of time.
    """

    def __init__(self, record: ReaderRecord, seen: int) -> None:
        self.record, self.seen, self._old_left = record, seen, MOST_OLD
        self._above: dict[Node, bool] = {}  # whether a node lies above spikes
        self._outcomes: list[Recomputable] = []  # alive for the walks that come to them again

    def release(self, tops: Iterable[Edge]) -> int:
        """Replace what autograd saved between some tensors and the spikes below.

        Args:
            tops: the tensors, as edges of the graph.

        Returns:
            The bytes of the saved tensors that were replaced.
        """
        walk = ReaderWalk(self.record)
        for node, _ in tops:
            self._descend(node, walk)
        self.record.statistics.replaced_bytes += walk.replaced_bytes
        return walk.replaced_bytes

    def note(self, tops: Iterable[Edge]) -> int:
        """Let later forwards end their walks at these tensors.

        Returns:
            The ``seen`` of the next forward.
        """
        for node, _ in tops:
            if self._above.get(node):
                node.metadata[READS] = True
        return max((graph.age_of(node) for node, _ in tops), default=self.seen)

    def _descend(self, top: Node, walk: Walk) -> None:
        """Visit the nodes below ``top`` and it, from below upwards."""
        nodes = [] if self._is_end(top) else [top]
        while nodes:
            node = nodes[-1]
            below = [each for each, _ in node.next_functions if not self._is_end(each)]
            if below:
                nodes.extend(below)
                continue
            nodes.pop()
            if node not in self._above:  # it may lie below several
                self._above[node] = self._visit(node, walk)

    def _is_end(self, node: Node) -> bool:
        """Whether nothing below a node remains to be visited."""
        if node is None or graph.is_leaf_edge(node) or graph.has_slots(node):
            return True
        if node in self._above:
            return True
        if graph.age_of(node) > self.seen:
            return False
        reads = node.metadata.get(READS, False)
        if reads or not self._old_left:
            self._above[node] = reads
            return True
        self._old_left -= 1
        return False

    def _visit(self, node: Node, walk: Walk) -> bool:
        """Replace what a node saved, if it lies above spikes. Whether it does, and passes on what
        can be recomputed from them."""
        for below, output in node.next_functions:
            if self._leads_to_spikes(below, output):
                break
        else:
            return False
        operation = operation_of(node)
        if operation is None or operation.saves:
            self._outcomes.append(walk.value_of(Place(node, 0)))
        return operation is not None or graph.name_of(node) in graph.PASSING_ON

    def _leads_to_spikes(self, node: Node, output: int) -> bool:
        if node is None or not graph.has_slots(node):
            return self._above.get(node, False)
        if output != 0 or getattr(node, FIRED, None) is None:
            return False  # a state, or freed by a backward
        elements = math.prod(graph.shape_of_output(node))
        dtype, _ = graph.type_of_output(node)
        return elements * dtype.itemsize > get_settings().recompute_min_bytes


class ReaderWalk(Walk):
    """A walk for readers, which replaces a saved tensor where that pays."""

    __slots__ = ()

    def pays(self, value: Recomputable, saved: Tensor) -> bool:
        is_large = saved.nbytes > get_settings().recompute_min_bytes
        return is_large and (value.cheap or value.work <= MOST_WORK)

    def _equals_recipe(self, place: Place, value: Recomputable) -> bool:
        # Where it would not pay, it is not computed to compare it either.
        return value.work <= MOST_WORK and super()._equals_recipe(place, value)

    def _replace_outputs(self, visit: Visit, recipe: Recipe | None) -> None:
        node, operation = visit.place.node, visit.operation
        if recipe is None or not recipe.derived:
            super()._replace_outputs(visit, recipe)
            return
        for name, position in operation.outputs.items():
            saved = saved_tensors.saved_by(node, name)
            if saved is None:
                continue
            value = Output(recipe, position) if operation.multiple_outputs else recipe
            if not self.pays(value, saved):
                self._keep(NOT_WORTH_IT, saved)
            elif saved_tensors.replace_saved(node, name, value):
                self.replaced_bytes += saved.nbytes
                value.add_reader()

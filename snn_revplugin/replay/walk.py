"""The walk: from a neuron's input current down the autograd graph to the spikes below.

On the way, a recipe replaces every saved tensor that those spikes and the parameters determine, and
autograd releases the tensor. The graph stays as the host built it: in backward autograd runs its
own kernels in its own order, and a node that asks for its saved tensor has it recomputed.

A node that the table of operations does not know is a *boundary*. It keeps its saved tensors, its
output is kept where another node saved it, and the statistics name it. The walk goes on below it.
An unknown operation costs memory and is never wrong.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache as memoize
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..packed.integers import PackedIntegers
from ..settings import get_settings
from ..torch_internals import capture, distributed, graph, owners, saved_tensors, tensors
from ..torch_internals.graph import Node
from .cache import RecipeCache
from .keeping import CallInStep
from .operations.operation import WRITE_INTO_VIEW, Operation, operation_of
from .operations.pointwise import packed_mask
from .plan import FIRED, TRANSPOSE, Plan, is_transposed_leaf
from .recipe import (
    Copy,
    HeldTensor,
    Integers,
    Kept,
    Missing,
    OpaqueWeight,
    Operand,
    Output,
    Recipe,
    Recomputable,
    Replay,
    Spikes,
    run,
)
from .residual_stream import REVERSED, Stream, may_be_stream, stream_of


class WalkStatistics(Protocol):
    """Where a walk counts what it meets; see ``bptt.statistics.CallStatistics``."""

    small_calls: int
    operations: Counter[str]
    boundaries: Counter[str]
    kept_bytes: Counter[str]


class WalkRecord(Protocol):
    """What a walk needs of a neuron: where it counts, and what earlier walks have met."""

    statistics: WalkStatistics
    cache: RecipeCache


# where a node that saves nothing keeps its outcome, weakly: the readers own the recipe
MEMO = "snn_revplugin_recipe"
# where a node notes that its input does not change with time and that autograd alone holds it
UNSEEN = "snn_revplugin_unseen"
# where a node notes the version at which its output was compared with its recipe, and the result
COMPARED = "snn_revplugin_compared"
# names of boundaries that are no operations, and of what else takes memory
EDITED = "an edit in place"
FREED = "a weight that is freed too early"  # by FSDP, outside of its module's backward
TOO_DEEP = "a chain of operations without spikes"
SUMS = "residual sums"
CONSTANTS = "constant operands"
BUDGET = "values that the memory budget keeps"
NOT_WORTH_IT = "tensors that are not worth recomputing"
PACKED = "bits of {}"  # of a boundary's output
WEIGHTS = "computed weights"
NO_EDGE = (None, 0)
NO_EDGES = (NO_EDGE,)
SAME_ELEMENTS = {
    f"{name}Backward0" for name in ("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze")
}  # in their order
# operations on the way down, and in a recipe: a chain through time (a synapse of the user's own)
# ends here
DEEPEST = 64
MAX_BYTES_OF_OUTPUT = 8  # per element: an index
# of an operand to which a number is added: operations that forward runs once more to find it, and
# the size of the sum as a share of the spikes that the operand is computed from
MAX_WORK_OF_SOLVED, SMALLEST_SOLVED = 4, 0.25
# relative and absolute error of a sample computed on its own
ROUNDING = {
    torch.float64: (1e-12, 1e-14),
    torch.float32: (1e-4, 1e-6),
    torch.float16: (1e-2, 1e-3),
    torch.bfloat16: (5e-2, 1e-2),
}
SMALLEST_MASK = 1024  # elements below which packing a dropout mask costs more than it saves

missing = memoize(Missing)
UNKNOWN = missing()
Outcome = Recipe | Stream | Integers | Missing  # of a visit to a node


@dataclass(slots=True)
class Place:
    """An output of a graph node, and what the walk knows about it from the nodes above.

    Attributes:
        node: it.
        output: its number.
        tensor: the output itself, where a caller or a node above has it.
        strides: of the output, where they are known.
        depth: nodes between the neuron and here.
        counts: whether the statistics count this node. They do not below a boundary, where only the
            saved tensors matter.
        look: gives the output's elements out of a tensor above; not to be kept.
        whole: the output as seen from a view of it above that has all its elements in their order.
        given_out: spikes are wanted as their neuron gave them out: they have been written into
            since, and what the node above made of them will be compared.
    """

    node: Node
    output: int
    tensor: Tensor | None = None
    strides: tuple[int, ...] | None = None
    depth: int = 0
    counts: bool = True
    look: Callable[[], Tensor] | None = None
    whole: Tensor | None = None
    given_out: bool = False

    def can_be_read(self) -> bool:
        return self.tensor is not None or self.look is not None

    def read(self) -> Tensor:
        return self.look() if self.tensor is None else self.tensor

    def seen(self) -> Tensor | None:
        """The output's elements, if any node above has them."""
        return self.read() if self.can_be_read() else self.whole


@dataclass(slots=True)
class Visit:
    """A node that no walk has come to before, and its operands.

    Attributes:
        place: of the node.
        operation: of the node.
        edges: to the nodes below.
        names: under which the node saves each operand, None where it does not.
        values: of the operands; None for an absent operand.
        replaceable: name and position of saved operands that a recipe can replace, and they.
        derived: an operand is recomputed.
        driven: an operand depends on spikes or data.
        edited: an operand is spikes that have been written into since.
        freed: an operand is a weight that FSDP frees before the neuron's backward reads it.
        blocked_by: the boundary between an operand and spikes or data; None where there is none.
    """

    place: Place
    operation: Operation
    edges: tuple[graph.Edge, ...]
    names: tuple[str | None, ...]
    values: list[Recomputable | None] = field(default_factory=list)
    replaceable: list[tuple[str, int, Tensor]] = field(default_factory=list)
    derived: bool = False
    driven: bool = False
    edited: bool = False
    freed: bool = False
    blocked_by: str | None = None


class Walk:
    """One walk, which counts what it meets in the neuron's statistics.

    Every neuron walks at every time step: what does not change between steps is looked up, not
    built again.

    Attributes:
        replaced_bytes: that autograd has released.
        repeatable_bytes: that later time steps release if they hold the same numbers.
        call: of the neuron, as part of a training step under a memory budget.
    """

    __slots__ = (
        "cache",
        "call",
        "repeatable_bytes",
        "replaced_bytes",
        "soon_freed",
        "statistics",
        "whole_sequence",
    )

    def __init__(
        self,
        record: WalkRecord,
        whole_sequence: bool = False,
        call: CallInStep | None = None,
    ) -> None:
        self.call = call
        self.statistics, self.cache = record.statistics, record.cache
        self.whole_sequence = whole_sequence
        self.replaced_bytes = self.repeatable_bytes = 0
        # storages of weights that may be freed when the neuron's backward reads its current
        self.soon_freed: set[int] = set()

    def value_of(self, place: Place) -> Recomputable:
        """The value of a node's output; a :class:`Missing` one if backward cannot obtain it."""
        node = place.node
        if graph.is_leaf_edge(node):
            return self.cache.held(node.variable)
        operation = operation_of(node)
        if operation is None:
            fired = getattr(node, FIRED, None) if place.output == 0 else None
            if fired is not None:
                as_given_out = not fired.were_edited() or place.given_out
                return fired if as_given_out or _is(fired, place.tensor) else self._edited(place)
            if graph.name_of(node) in graph.PASSING_ON:
                return self._pass_on(place)
        outcome = self._as_planned(place) or _earlier_outcome(node, operation)
        if outcome is None:
            outcome = self._visit(place, operation)
            _remember(node, operation, outcome)
        return self._value(place, operation, outcome)

    def _as_planned(self, place: Place) -> Recipe | None:
        """The recipe of a weight layer on spikes that an earlier time step came to, too."""
        node, plan = place.node, self.cache.plans.get(type(place.node))
        is_observed = self.call is not None and self.call.observes  # which takes the visits
        applies = plan is not None and not (self.soon_freed or self.whole_sequence or is_observed)
        values = plan.operands_of(node) if applies else None
        function = values and plan.operation.replay(node)
        if function is None:
            return None
        operation, position = plan.operation, plan.operation.by_sample
        recipe = Recipe(function, values, operation.kind, None, position)
        operand = _operand(node, operation, recipe, position)
        if not saved_tensors.replace_saved(node, operation.inputs[position], operand):
            return None
        self.replaced_bytes += values[position].packed.unpacked_nbytes
        if plan.transposes:
            self.statistics.operations[TRANSPOSE] += plan.transposes
        self._count(self.statistics.operations, operation.node, place)
        return recipe

    def _pass_on(self, place: Place) -> Recomputable:
        """The value of what a module's backward hook, or FSDP's notice, gives out unchanged."""
        self.soon_freed |= distributed.weights_to_be_freed(place.node)
        place.node, place.output = place.node.next_functions[place.output]
        if place.node is not None:
            return self.value_of(place)
        return UNKNOWN if place.tensor is None else HeldTensor(place.tensor)

    def _value(self, place: Place, operation: Operation | None, outcome: Outcome) -> Recomputable:
        """The value of a node's output, from the outcome of the visit to the node."""
        tensor = place.tensor
        if outcome.missing:
            if tensor is None:
                return outcome
            held = OpaqueWeight if outcome.from_parameters else HeldTensor
            return held(tensor, outcome.boundary)
        several = type(outcome) is Recipe and operation.multiple_outputs
        value = Output(outcome, place.output) if several else outcome
        if tensor is None:  # which state of it was read is unknown, once it has more than one
            return missing(EDITED) if place.node.metadata.get(EDITED) else value
        if tensor._version == 0 or tensor._version == _recorded_writes(place.node):
            return value if self.call is None else self._kept_or_not(value, place)
        if value.were_edited() if value.cheap else not self._equals_recipe(place, value):
            place.node.metadata[EDITED] = True
            return self._edited(place)
        return value

    def _kept_or_not(self, value: Recomputable, place: Place) -> Recomputable:
        """A value whose tensor is at hand, kept if the memory budget says so."""
        tensor = place.tensor
        can_be_kept = self.whole_sequence and type(value) is Recipe and value.derived
        if not can_be_kept or value.cheap or not self.call.keeps(tensor.nbytes):
            return value
        self.statistics.kept_bytes[BUDGET] += self.cache.bytes_to_count(tensor)
        return Kept(value, tensor, saved_by_host=place.depth > 0)

    def _note_work(self, place: Place, operation: Operation, recipe: Recipe) -> None:
        """Note what recomputing a node's output takes."""
        if operation.is_view:
            return
        elements = math.prod(graph.shape_of_output(place.node))
        dtype, device = graph.type_of_output(place.node)
        nbytes = elements * dtype.itemsize
        leaf = _weight_of(operation, recipe)
        if leaf is None:
            self.call.computes(nbytes, device)
        else:
            # a multiplication and an addition for each output and weight that leads to it
            products = elements * leaf.numel() / max(len(leaf), 1)
            self.call.computes(nbytes, device, 2 * products, leaf)

    def _equals_recipe(self, place: Place, value: Recomputable) -> bool:
        """Whether a tensor that has been written into still equals its recipe.

        Autograd records an in-place operation like any other (``out += identity``), but not one
        under ``no_grad``. The graph does not tell which it was: ``nn.Linear`` adds its bias in
        place, too, where its input is not contiguous. So the two are compared, once per tensor: a
        view is compared as the whole tensor that it views, and later readers find the result.
        """
        if not value.derived:
            return True
        node, value, tensor = _viewed(place, value)
        compared = node.metadata.get(COMPARED)
        if compared is None:
            is_equal = capture.may_synchronise(tensor) and torch.equal(
                value.compute(), tensor.detach()
            )
            compared = node.metadata[COMPARED] = tensor._version, is_equal
        return compared == (tensor._version, True)

    def _edited(self, place: Place) -> Recomputable:
        self._count(self.statistics.boundaries, EDITED, place)
        return missing(EDITED) if place.tensor is None else HeldTensor(place.tensor, EDITED)

    def _visit(self, place: Place, operation: Operation | None) -> Outcome:
        """Come to a node for the first time: replace its saved tensors, and find its recipe."""
        if operation is None or place.depth >= DEEPEST:
            return self._stop_at(place)
        if place.whole is None:
            place.whole = place.tensor
        visit = self._read_operands(place, operation)
        recipe = self._recipe(visit)
        if recipe is not None and visit.edited and not self._gives(recipe, place):
            recipe, visit.blocked_by = None, EDITED
        packed = None
        if recipe is not None:
            if self.call is not None and self.call.observes:
                self._note_work(place, operation, recipe)
            self._count(self.statistics.operations, operation.node, place)
        elif visit.freed:
            self._count(self.statistics.boundaries, FREED, place)
        elif visit.driven or visit.blocked_by:
            packed = None if operation.is_view else self._packed(place, operation.node)
            if packed is None and visit.driven:
                self._count(self.statistics.boundaries, operation.node, place)
        self._replace_inputs(visit, recipe)
        self._replace_outputs(visit, recipe)
        if recipe is None:
            return packed or _why_missing(visit)
        if not self.whole_sequence:
            self.cache.plans[type(place.node)] = Plan.of(place.node, operation, recipe)
        return (self._stream(place, recipe) if self.whole_sequence else None) or recipe

    def _stop_at(self, place: Place) -> Missing:
        """A boundary: what lies below it is replaced all the same. If only parameters lie there,
        the outputs of several time steps may still share memory."""
        node, boundary = place.node, graph.name_of(place.node)
        driven = place.depth == DEEPEST
        if driven:
            boundary = TOO_DEEP
        else:
            saved = {
                (each.grad_fn, each.output_nr): (name, each)
                for name, each in saved_tensors.saved_inputs(node)
            }
            for edge in node.next_functions:
                if edge[0] is not None:
                    value = self._boundary_operand(place, edge, saved.get(edge))
                    driven = driven or value.driven or (value.missing and not value.from_parameters)
        packed = self._packed(place, boundary) if driven else None
        self._keep_saved(node, boundary)
        if driven and packed is None:
            self._count(self.statistics.boundaries, boundary, place)
        return packed or missing(boundary, not driven)

    def _boundary_operand(
        self, place: Place, edge: graph.Edge, saved: tuple[str | int, Tensor] | None
    ) -> Recomputable:
        """An operand of a boundary. If it is saved, a recipe replaces it all the same."""
        below, output = edge
        deeper = Place(below, output, depth=place.depth + 1, counts=False)
        if saved is None:
            return self.value_of(deeper)
        name, deeper.tensor = saved
        deeper.strides = deeper.tensor.stride()
        value = self.value_of(deeper)
        if value.derived and _replace(place.node, name, _handed_to(place.node, value)):
            self.replaced_bytes += deeper.tensor.nbytes
        return value

    def _packed(self, place: Place, boundary: str) -> Integers | None:
        """What a boundary gave out, if that is small whole numbers: spikes of a surrogate function,
        a rounded current."""
        if not place.can_be_read() or graph.outputs_of(place.node) != 1:
            return None
        tensor = place.read()
        if tensor.numel() < SMALLEST_MASK:
            return None
        kind = boundary, tensor.shape
        if kind in self.cache.unpackable or not capture.may_synchronise(tensor):
            return None
        packed = PackedIntegers.of(tensor.detach()) if tensor.is_floating_point() else None
        if packed is None or packed.strides != tensor.stride():
            self.cache.unpackable.add(kind)
            return None
        self._count(self.statistics.operations, PACKED.format(boundary), place)
        self.statistics.kept_bytes[boundary] += packed.nbytes
        return Integers(packed)

    def _read_operands(self, place: Place, operation: Operation) -> Visit:
        """Find the value of each operand of a node."""
        node, edges = place.node, place.node.next_functions
        visit = Visit(place, operation, edges, operation.inputs or (None,) * len(edges))
        absent = operation.absent(node)
        for position, name in enumerate(visit.names):
            if position in absent:
                visit.values.append(None)
                continue
            below = edges[position][0] if position < len(edges) else None
            if graph.is_leaf_edge(below):
                value = self._held_operand(visit, below.variable)
            elif is_transposed_leaf(below):
                value = self._transposed_operand(visit, below.next_functions[0][0].variable)
            else:
                saved = None if name is None else saved_tensors.saved_by(node, name)
                if saved is not None:
                    value = self._saved_operand(visit, position, saved)
                elif below is not None:
                    value = self._unsaved_operand(visit, position)
                else:
                    value = UNKNOWN
            visit.values.append(value)
        return visit

    def pays(self, value: Recomputable, saved: Tensor) -> bool:
        """Whether to recompute a saved tensor. For a neuron always: its own backward needs what the
        tensors on the way are recomputed from."""
        return True

    def _held_operand(self, visit: Visit, tensor: Tensor) -> Recomputable:
        """An operand that is not recomputed: a parameter, or a saved tensor."""
        visit.freed = visit.freed or self._is_freed(tensor)
        return UNKNOWN if visit.freed else self.cache.held(tensor)

    def _transposed_operand(self, visit: Visit, leaf: Tensor) -> Recomputable:
        """An operand that is the transpose of a leaf: a linear layer's weight."""
        self.statistics.operations[TRANSPOSE] += 1
        visit.freed = visit.freed or self._is_freed(leaf)
        return UNKNOWN if visit.freed else self.cache.transposed(leaf)

    def _saved_operand(self, visit: Visit, position: int, saved: Tensor) -> Recomputable:
        """An operand that the node saved."""
        below, output = visit.edges[position] if position < len(visit.edges) else NO_EDGE
        if below is None:
            value = self._constant(saved, (visit.operation.node, position))
            if type(value) is HeldTensor and value.source is not saved:
                visit.replaceable.append((visit.names[position], position, saved))
                return value
        elif _is_view_of_leaf(below):
            self.statistics.operations[graph.name_of(below)] += 1
            return self._held_operand(visit, saved)
        else:
            depth = visit.place.depth + 1
            value = self.value_of(Place(below, output, saved, saved.stride(), depth))
        visit.driven = visit.driven or value.driven
        if value.derived:
            if not self.pays(value, saved):
                self._keep(NOT_WORTH_IT, saved)
                return self._held_operand(visit, saved)
            visit.derived = True
            visit.replaceable.append((visit.names[position], position, saved))
            return value
        if type(value) is OpaqueWeight:
            return self._shared_operand(visit, position, value)
        if type(value) is HeldTensor and below is not None:
            visit.blocked_by = value.boundary or visit.operation.node
            self._keep(visit.blocked_by, saved)
        elif type(value) is Recipe and not _is_view_of_held(value):
            self._keep(WEIGHTS, saved)
        # It may be cast or transposed; every time step shares it all the same.
        return self._held_operand(visit, saved)

    def _unsaved_operand(self, visit: Visit, position: int) -> Recomputable:
        """An operand that the node did not save."""
        place, operation = visit.place, visit.operation
        below, output = visit.edges[position]
        deeper = Place(below, output, depth=place.depth + 1, counts=place.counts)
        if operation.kind.is_elementwise and place.strides is not None:
            shape = graph.shape_of_output(below, output)
            deeper.strides = place.strides if shape == graph.shape_of_output(place.node) else None
        if operation.before is not None and place.can_be_read():
            deeper.look = partial(_read_before, place, operation, position)
        if self.whole_sequence:
            deeper.whole = _seen_through(place, deeper)
        # Written into in place, spikes are an operand that no other tensor holds any more.
        deeper.given_out = place.can_be_read() or place.whole is not None
        value = self.value_of(deeper)
        visit.edited = visit.edited or (type(value) is Spikes and value.were_edited())
        visit.driven, visit.derived = visit.driven or value.driven, visit.derived or value.derived
        if value.missing and not value.from_parameters:
            visit.blocked_by = value.boundary or visit.operation.node
        return value

    def _shared_operand(self, visit: Visit, position: int, weight: OpaqueWeight) -> HeldTensor:
        """A saved weight that a boundary computed from parameters: one tensor for all time steps
        that hold the same numbers."""
        saved = weight.held.tensor
        shared = self.cache.shared(saved, (visit.operation.node, position))
        if shared is None:
            self._count(self.statistics.boundaries, weight.boundary, visit.place)
        if shared is None or shared.held.tensor is saved:
            self._keep(weight.boundary, saved)
            self.repeatable_bytes += saved.nbytes
            return shared or weight
        visit.replaceable.append((visit.names[position], position, saved))
        return shared

    def _constant(self, saved: Tensor, place: tuple[str, int]) -> Recomputable:
        """A saved operand without a gradient. Where autograd alone holds it, a dropout mask is
        packed, and time steps share what is equal."""
        if saved.dim() == 0 or not saved_tensors.held_by_autograd_alone(saved, references=3):
            return HeldTensor(saved)
        is_real = saved.is_floating_point() and saved.is_cpu
        can_be_mask = is_real or saved.dtype is torch.bool
        packed = packed_mask(saved) if can_be_mask and saved.numel() >= SMALLEST_MASK else None
        if packed is not None:
            self.statistics.kept_bytes[CONSTANTS] += packed.nbytes
            return Spikes(packed)
        may_repeat = capture.may_compare(saved)
        held = self.cache.repeated(saved, place) if may_repeat else HeldTensor(saved)
        if held.source is saved:
            self._keep(CONSTANTS, saved)
            if may_repeat:
                self.repeatable_bytes += saved.nbytes
        return held

    def _recipe(self, visit: Visit) -> Recipe | None:
        """The recipe of a visited node, if its operands and its output tell enough."""
        operation, values, place = visit.operation, visit.values, visit.place
        function = None
        unknown = [i for i, each in enumerate(values) if each is not None and each.missing]
        if operation.weight_and_bias is not None and unknown == [operation.weight_and_bias[1]]:
            unknown = [] if self._find_frozen_bias(visit) else unknown
        if not unknown:
            of_spikes = operation.of_spikes is not None and values[0].cheap
            function = (operation.of_spikes if of_spikes else operation.replay)(place.node)
        if (
            function is None
            and place.can_be_read()
            and all(visit.edges[i : i + 1] in (NO_EDGES, ()) for i in unknown)
        ):
            if operation.of_output is not None:
                function = operation.of_output(place.node, place.read().detach())
                values = [None if each is UNKNOWN else each for each in values]
            elif operation.solve_constant is not None and unknown == [operation.solved]:
                function = self._solve_constant(visit, values[1 - operation.solved])
                values = [None if each is UNKNOWN else each for each in values]
        if function is None:
            return None
        if operation.kind.chooses_layout and place.strides is not None:
            function = partial(_laid_out, function, place.strides)
        recipe = self.cache.recipe(function, tuple(values), operation)
        return None if recipe.depth > DEEPEST else recipe

    def _find_frozen_bias(self, visit: Visit) -> bool:
        """Find a bias without a gradient in the module of the weight, and put it among the values
        of the operands, if it gives the output.

        All of the output is compared the first time, with the same weight and bias later one
        sample, where samples are independent: the bias is the same for all of them.
        """
        place, operation, values = visit.place, visit.operation, visit.values
        position = operation.weight_and_bias[1]
        if visit.edges[position : position + 1] not in (NO_EDGES, ()):
            return False
        weight = _parameter_behind(values[operation.weight_and_bias[0]])
        bias = None if weight is None else owners.bias_beside(weight)
        if bias is None or bias.requires_grad or self._is_freed(bias) or not place.can_be_read():
            return False
        output, known = place.read().detach(), (id(weight), id(bias), bias._version)
        if not capture.may_synchronise(output):
            return False
        values[position] = self.cache.held(bias)
        function = operation.replay(place.node)
        if function is None:
            return False
        operands = [self._in_forward(visit, i, each) for i, each in enumerate(values)]
        one = operation.by_sample
        if known in self.cache.frozen and one is not None and len(output):
            operands[one], output = operands[one][:1], output[:1]
            equal = torch.allclose(run(function, operands), output, *ROUNDING[output.dtype])
        else:
            found = run(function, operands)
            equal = torch.equal(found[0] if type(found) is tuple else found, output)
        if equal:
            self.cache.frozen[known] = weight
        else:
            values[position] = UNKNOWN
        return equal

    def _in_forward(self, visit: Visit, position: int, value: Recomputable | None) -> Tensor | None:
        """An operand of a node, in forward."""
        if value is None:
            return None
        name = visit.names[position] if position < len(visit.names) else None
        saved = None if name is None else saved_tensors.saved_by(visit.place.node, name)
        return value.compute() if saved is None else saved.detach()

    def _solve_constant(self, visit: Visit, operand: Recomputable) -> Replay | None:
        """An operation on an operand and a constant that the node does not save. If the operand is
        not light, it is computed in forward once more, for a tensor that is worth it."""
        place = visit.place
        solve, total = visit.operation.solve_constant, place.read()
        if operand.light:
            return solve(place.node, operand.compute(), total)
        kind = visit.operation.node, total.shape
        if (
            operand.work > MAX_WORK_OF_SOLVED
            or total.nbytes < SMALLEST_SOLVED * _bytes_of_spikes(operand)
            or kind in self.cache.unsolvable
        ):
            return None
        function = solve(place.node, operand.compute(), total)
        if function is None:
            self.cache.unsolvable.add(kind)
        return function

    def _replace_inputs(self, visit: Visit, recipe: Recipe | None) -> None:
        """Put recipes in the place of the saved operands that they recompute."""
        node, operation = visit.place.node, visit.operation
        on_data = recipe is not None and recipe.identity is not None
        one = on_data and len(visit.replaceable) == 1
        for name, position, saved in visit.replaceable:
            if one and saved_tensors.is_unseen(saved, references=2):
                node.metadata[UNSEEN] = True
            self.replaced_bytes += saved.nbytes
            value = visit.values[position]
            # Where strides decide what backward does, zeros without strides will not do.
            if name in operation.shape_only and saved.is_contiguous():
                _replace(node, name, self.cache.shape(saved))
            elif saved_tensors.replace_saved(
                node, name, value if recipe is None else _operand(node, operation, recipe, position)
            ):
                value.add_reader()

    def _replace_outputs(self, visit: Visit, recipe: Recipe | None) -> None:
        """Put the recipe in the place of the saved outputs that it recomputes."""
        node, operation = visit.place.node, visit.operation
        if recipe is None:
            if operation.outputs and (visit.driven or visit.blocked_by):
                self._keep_outputs(visit)
        elif recipe.derived:
            for name, position in operation.outputs.items():
                elements = math.prod(graph.shape_of_output(node))
                self.replaced_bytes += MAX_BYTES_OF_OUTPUT * elements
                several = operation.multiple_outputs
                _replace(node, name, Output(recipe, position) if several else recipe)

    def _gives(self, recipe: Recipe, place: Place) -> bool:
        """Whether a recipe gives what the readers of a node's output have; noted, if they have the
        output itself."""
        seen = place.seen()
        equal = capture.may_synchronise(seen) and torch.equal(recipe.compute(), seen.detach())
        if place.tensor is not None:
            place.node.metadata[COMPARED] = seen._version, equal
        return equal

    def _stream(self, place: Place, recipe: Recipe) -> Stream | None:
        """A residual sum as part of a stream, if it is one; see :mod:`.residual_stream`."""
        if not may_be_stream(place.node, recipe, place.whole):
            return None
        if place.whole._version != 0 and not self._gives(recipe, place):
            return None
        found = stream_of(place.node, recipe, place.whole)
        if found is None:
            return None
        stream, released_bytes = found
        self.statistics.kept_bytes[SUMS] += stream.nbytes - released_bytes
        if released_bytes:
            self.statistics.operations[REVERSED] += 1
        return stream

    def _is_freed(self, weight: Tensor) -> bool:
        return distributed.is_freed(weight) or (
            bool(self.soon_freed) and id(tensors.storage_of(weight)) in self.soon_freed
        )

    def _count(self, counter: Counter[str], name: str, place: Place) -> None:
        if place.counts:
            counter[name] += 1

    def _keep(self, cause: str, tensor: Tensor) -> None:
        """Count the bytes of a tensor that autograd keeps."""
        self.statistics.kept_bytes[cause] += self.cache.bytes_to_count(tensor)

    def _keep_outputs(self, visit: Visit) -> None:
        cause = visit.blocked_by or visit.operation.node
        for name in visit.operation.outputs:
            saved = saved_tensors.saved_by(visit.place.node, name)
            if saved is not None:
                self._keep(cause, saved)

    def _keep_saved(self, node: Node, boundary: str) -> None:
        """Count what a boundary saved, other than parameters and what Python code holds."""
        of_leaves = _memory_of_leaves(node)
        for saved in saved_tensors.all_saved_by(node):
            if id(tensors.storage_of(saved)) not in of_leaves:
                self._keep(boundary, saved)


def _weight_of(operation: Operation, recipe: Recipe) -> Tensor | None:
    """The weight of a layer, its outputs in dimension 0; None for another operation."""
    for position, value in enumerate(recipe.inputs):
        if operation.by_sample in (None, position) or not isinstance(value, HeldTensor):
            continue
        if value.source.dim() > 1:
            return value.source
    return None


def _why_missing(visit: Visit) -> Missing:
    """The outcome of a visit to a node without a recipe."""
    if visit.freed:
        return missing(FREED)
    if visit.driven:
        return missing(visit.operation.node)
    if visit.blocked_by is not None:
        return missing(visit.blocked_by)
    boundaries = [each for each in visit.values if each is not None and each.missing]
    named = next((each.boundary for each in boundaries if each.from_parameters), None)
    return missing(named or visit.operation.node, True)


def _operand(node: Node, operation: Operation, recipe: Recipe, position: int) -> Operand:
    """An input of a node's recipe, in the memory format that its backward reads fastest."""
    reads_as = position == 0 and operation.reads_spikes_as
    if not reads_as or type(recipe.inputs[0]) is not Spikes or get_settings().match_host_order:
        return Operand(recipe, position)
    return Operand(recipe, position, reads_as(node))


def _read_before(place: Place, operation: Operation, position: int) -> Tensor:
    with torch.no_grad():
        return operation.before(place.node, position, place.read())


def _seen_through(place: Place, below: Place) -> Tensor | None:
    """The tensor below a view, as seen from a view that has all its elements in their order."""
    whole = place.whole
    if whole is None or graph.name_of(place.node) not in SAME_ELEMENTS or not whole.is_contiguous():
        return None
    return whole.detach().view(tuple(graph.shape_of_output(below.node, below.output)))


def _viewed(place: Place, value: Recomputable) -> tuple[Node, Recomputable, Tensor]:
    """The tensor that the place's tensor is a view of, its node and its value; those of the place
    where it is no view."""
    node, below, base = place.node, value, place.tensor._base
    if base is None:
        return node, value, place.tensor
    while base.grad_fn is not node:
        operation = operation_of(node)
        if operation is None or not operation.is_view:
            return place.node, value, place.tensor
        below = (below.recipe if type(below) is Output else below).inputs[0]
        node = node.next_functions[0][0]
    return node, below, base


def _recorded_writes(node: Node) -> int:
    """How often autograd recorded a write into the memory of a node's output through views. Each
    write is one version."""
    writes = 0
    while node is not None:
        operation = operation_of(node)
        if graph.name_of(node) == WRITE_INTO_VIEW:
            writes += 1
        elif operation is None or not operation.is_view:
            break
        node = node.next_functions[0][0]
    return writes


def _is(spikes: Recomputable, tensor: Tensor | None) -> bool:
    """Whether a tensor still is what a neuron gave out, such as the copy that ``out *= x``
    saves."""
    if tensor is None or type(spikes) is not Spikes or tensor.shape != spikes.packed.shape:
        return False
    return capture.may_synchronise(tensor) and torch.equal(spikes.value(), tensor.detach())


def _parameter_behind(value: Recomputable | None) -> torch.nn.Parameter | None:
    """The parameter that a weight layer's operand is, or is a view of."""
    if not isinstance(value, HeldTensor):
        return None
    tensor = value.source if value.source._base is None else value.source._base
    return tensor if isinstance(tensor, torch.nn.Parameter) else None


def _bytes_of_spikes(value: Recomputable | None) -> int:
    """The bytes of the largest spikes, unpacked, from which a value is computed."""
    if isinstance(value, Output):
        value = value.recipe
    if isinstance(value, Recipe):
        return max(map(_bytes_of_spikes, value.inputs), default=0)
    return value.packed.unpacked_nbytes if isinstance(value, Spikes) else 0


def _is_view_of_leaf(node: Node) -> bool:
    operation = operation_of(node)
    return (
        operation is not None
        and operation.is_view
        and graph.is_leaf_edge(node.next_functions[0][0])
    )


def _is_view_of_held(value: Recomputable) -> bool:
    while type(value) is Recipe and value.is_view:
        value = value.inputs[0]
    return isinstance(value, HeldTensor)


def _memory_of_leaves(node: Node) -> set[int]:
    """The storages, by ``id``, of leaves that a node reads, itself or through views."""
    found = set()
    for below, _ in node.next_functions:
        while below is not None and not graph.is_leaf_edge(below):
            operation = operation_of(below)
            if operation is None or not operation.is_view:
                break
            below = below.next_functions[0][0]
        if graph.is_leaf_edge(below):
            found.add(id(tensors.storage_of(below.variable)))
    return found


def _earlier_outcome(node: Node, operation: Operation | None) -> Outcome | None:
    """The outcome of an earlier visit to a node; None where there was none."""
    memo = node.metadata.get(MEMO)
    if memo is not None:
        return memo() if isinstance(memo, weakref.ref) else memo
    if operation is not None and operation.carriers:
        for name in operation.carriers:
            value = saved_tensors.replacement_of(node, name)
            if isinstance(value, Operand | Output):
                return value.recipe
    return None


def _remember(node: Node, operation: Operation | None, outcome: Outcome) -> None:
    """Keep the outcome of a visit, where the node's saved tensors do not tell it."""
    told = operation is not None and (operation.carriers or operation.is_view)
    if not told or type(outcome) is Integers:
        node.metadata[MEMO] = outcome if outcome.missing else weakref.ref(outcome)


def _laid_out(function: Replay, strides: tuple[int, ...], x: Tensor) -> Tensor:
    result = function(x)
    if result.stride() == strides:
        return result
    return torch.empty_strided(
        result.shape, strides, dtype=result.dtype, device=result.device
    ).copy_(result)


def _replace(node: Node, name: str | int, value: Recomputable) -> bool:
    replaced = saved_tensors.replace_saved(node, name, value)
    if replaced:
        value.add_reader()
    return replaced


def _handed_to(node: Node, value: Recomputable) -> Recomputable:
    """A value for a boundary: for a user's Function a copy, into which its backward may write."""
    return Copy(value) if saved_tensors.saves_as_function(node) else value

"""The walk: from a neuron's current down the autograd graph to the spikes below.

Wherever a node on the way saved a tensor that can be computed from those spikes and the parameters, a recipe takes its
place and autograd lets go of the tensor. The graph itself stays as the host built it: in backward autograd runs its own
kernels in its own order, and a node that asks for what it saved has it computed again.

A node that the table of operations does not know is a *boundary*. What it saved stays, its output is kept where another node
saved it, and the ledger remembers its name; below it the walk goes on. Unknown never means wrong, only larger.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import autograd_internals as internals
from ..autograd_internals import Edge, Node
from .operation import OPERATIONS, Operation, Replay
from .pointwise import constant_of, packed_mask
from .recipe import Kept, Output, Recipe, Shape, Spikes, Value

if TYPE_CHECKING:
    from ..neuron import Reversal

FIRED = "snn_revplugin_fired"  # where a neuron's graph node offers its packed spikes, the node's first output
MEMO = "snn_revplugin_recipe"  # where a node met before remembers its recipe, weakly: the readers own it
EDITED = "an edit in place"
BOUNDARY = False  # ... or that it has none
DEEPEST = 64  # operations on the way down, and in a recipe: a chain through time (a synapse of the user's own) ends here
SMALLEST_MASK = 1024  # elements below which packing a dropout mask costs more than it saves


class Operand(NamedTuple):
    """One input of an operation: its value, if it can be had, and what the node saved of it."""

    value: Value | None
    known: bool
    name: str | None = None
    saved: Tensor | None = None


class Asked(NamedTuple):
    """What is known of a node's output when somebody asks for its value."""

    tensor: Tensor | None = None  # the output itself, where somebody has it
    strides: tuple[int, ...] | None = None  # its strides, where they are known
    down: int = 0  # nodes between the neuron and here
    wanted: bool = True  # False below a boundary, where only what was saved matters


def recipe_of(current: Tensor, reversal: Reversal) -> Value | None:
    """How a neuron's current can be had again in backward; replaces what was saved on the way to it.

    Returns:
        None if the current depends on neither spikes nor data through operations that are known, so that the neuron had
        better keep its membrane potential.
    """
    if current.grad_fn is None:
        return None
    value = _Walk(reversal).value_of((current.grad_fn, current.output_nr), Asked(current, current.stride()))
    return value if value is not None and value.derived else None


class _Walk:
    """One walk; it writes down what it meets in the neuron's ledger."""

    def __init__(self, reversal: Reversal) -> None:
        self.ledger, self.static, self.parameters = reversal.ledger, reversal.static, reversal.parameters

    def value_of(self, edge: Edge, asked: Asked) -> Value | None:
        """The value of a node's output, or None if it cannot be had."""
        node, output = edge
        if internals.is_leaf_edge(node):
            return self._parameter(node.variable)
        fired = getattr(node, FIRED, None)
        if fired is not None and output == 0:
            if not fired.were_edited():
                return fired
            self._note(self.ledger.boundary, EDITED, asked)
            return None if asked.tensor is None else Kept(asked.tensor)
        operation = OPERATIONS.get(internals.name_of(node))
        memo = node.metadata.get(MEMO)
        recipe = memo() if memo else None
        if recipe is None and memo is not BOUNDARY:
            recipe = self._meet(node, operation, asked)
            node.metadata[MEMO] = BOUNDARY if recipe is None else weakref.ref(recipe)
        if recipe is None:
            return None if asked.tensor is None else Kept(asked.tensor)
        value = Output(recipe, output) if operation.several else recipe
        if asked.tensor is not None and asked.tensor._version and not self._gives(value, asked):
            return Kept(asked.tensor)
        return value

    def _gives(self, value: Value, asked: Asked) -> bool:
        """Whether a recipe gives a tensor that has been written into since its memory was taken.

        Autograd records an in-place operation like any other (``out += identity``), but not one under ``no_grad``. Which it
        was the graph does not tell; so the two are compared.
        """
        if not value.derived or torch.equal(value.peek(), asked.tensor.detach()):
            return True
        self._note(self.ledger.boundary, EDITED, asked)
        return False

    def _meet(self, node: Node, operation: Operation | None, asked: Asked) -> Recipe | None:
        """The recipe of a node that no walk has come to yet, after what it saved has been replaced."""
        if asked.down == DEEPEST:
            self._note(self.ledger.boundary, "a chain of operations without spikes", asked)
            return None
        if operation is None:
            self._note(self.ledger.boundary, internals.name_of(node), asked)
            for below in node.next_functions:
                if below[0] is not None:
                    self.value_of(below, Asked(down=asked.down + 1, wanted=False))
            return None
        operands = self._operands(node, operation, asked)
        derived = operation.weighs or any(each.value is not None and each.value.derived for each in operands)
        recipe = self._recipe(node, operation, operands, derived, asked)
        if recipe is not None:
            self._note(self.ledger.replayed, operation.node, asked)
        elif derived:
            self._note(self.ledger.boundary, operation.node, asked)
        for each in operands:
            if each.saved is not None and each.value is not None and each.value.derived:
                # Where strides decide what backward does, zeros without strides will not do.
                shape_only = each.name in operation.shape_only and each.saved.is_contiguous()
                _replace(node, each.name, Shape(each.saved) if shape_only else each.value)
        if recipe is not None and derived:
            for name, position in operation.outputs.items():
                _replace(node, name, Output(recipe, position) if operation.several else recipe)
        return recipe

    def _note(self, write: Callable[[str], None], name: str, asked: Asked) -> None:
        if asked.wanted:
            write(name)

    def _operands(self, node: Node, operation: Operation, asked: Asked) -> list[Operand]:
        edges = node.next_functions
        names = operation.inputs or (None,) * len(edges)
        absent = operation.absent(node)
        operands = []
        for position, name in enumerate(names):
            if position in absent:
                operands.append(Operand(None, known=True))
                continue
            saved = None if name is None else internals.saved_by(node, name)
            edge = edges[position] if position < len(edges) else (None, 0)
            value = None
            if edge[0] is not None:
                value = self.value_of(edge, self._asked_below(node, operation, edge, saved, asked))
            elif saved is not None:
                value = _constant(saved)
            if saved is not None and (value is None or not value.derived):
                value = self._parameter(saved)  # it may be cast or transposed; every time step shares it all the same
            operands.append(Operand(value, value is not None, name, saved))
        return operands

    def _parameter(self, tensor: Tensor) -> Kept:
        kept = self.parameters.get(id(tensor))
        if kept is None or kept.held.tensor is not tensor or not kept.held.unchanged():
            kept = self.parameters[id(tensor)] = Kept(tensor)
        return kept

    def _asked_below(self, node: Node, operation: Operation, edge: Edge, saved: Tensor | None, asked: Asked) -> Asked:
        strides = None if saved is None else saved.stride()
        if strides is None and operation.pointwise and internals.shape_of_output(*edge) == internals.shape_of_output(node):
            strides = asked.strides
        return Asked(saved, strides, asked.down + 1, asked.wanted or saved is not None)

    def _recipe(self, node: Node, operation: Operation, operands: list[Operand], derived: bool, asked: Asked) -> Recipe | None:
        values = tuple(each.value for each in operands)
        if any(each is not None and each.depth >= DEEPEST for each in values):
            return None
        function = None
        if all(each.known for each in operands):
            function = operation.replay(node)
        elif operation.constant and asked.tensor is not None and values[0] is not None and values[0].cheap:
            function, values = constant_of(node, values[0].peek(), asked.tensor), values[:1]
        if function is None:
            return None
        if operation.layout and asked.strides is not None:
            function = _laid_out(function, asked.strides)
        return self._shared(function, values, operation.is_view, derived)

    def _shared(self, function: Replay, values: tuple[Value | None, ...], is_view: bool, derived: bool) -> Recipe:
        """A recipe; the same one again for an operation that an earlier time step did on the very same tensors.

        An image shown at every time step goes through the same first layer each time: computed once a backward pass, it
        serves them all.
        """
        identities = []
        for each in values:
            identities.append(None if each is None else each.identity)
            if each is not None and identities[-1] is None:
                return Recipe(function, values, is_view, derived)
        identity = _identity(function), tuple(identities)
        recipe = self.static.get(identity)
        if recipe is None:
            recipe = self.static[identity] = Recipe(function, values, is_view, derived, identity)
        return recipe


def _identity(function: Replay) -> object:
    if isinstance(function, partial):
        return function.func, function.args, tuple(function.keywords.items())
    return function


def _constant(saved: Tensor) -> Value:
    """An operand without a gradient. A dropout mask that autograd alone holds is worth packing."""
    if (
        saved.numel() >= SMALLEST_MASK
        and saved.device.type == "cpu"
        and saved.is_floating_point()
        and internals.held_by_autograd_alone(saved, references=2)
    ):
        packed = packed_mask(saved)
        if packed is not None:
            return Spikes(packed)
    return Kept(saved)


def _laid_out(function, strides):
    def replay(x: Tensor) -> Tensor:
        result = function(x)
        if result.stride() == strides:
            return result
        return torch.empty_strided(result.shape, strides, dtype=result.dtype, device=result.device).copy_(result)

    return replay


def _replace(node: Node, name: str, value: Value) -> None:
    if internals.replace_saved(node, name, value.value):
        value.expect()

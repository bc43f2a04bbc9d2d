"""The walk: from a neuron's current down the autograd graph to the spikes below.

Wherever a node on the way saved a tensor that can be computed from those spikes and the parameters, a recipe takes its
place and autograd lets go of the tensor. The graph itself stays as the host built it: in backward autograd runs its own
kernels in its own order, and a node that asks for what it saved has it computed again.

A node that the table of operations does not know is a *boundary*. What it saved stays, its output is kept where another node
saved it, and the ledger remembers its name; below it the walk goes on. Unknown never means wrong, only larger.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import autograd_internals as internals
from .. import capture
from ..autograd_internals import Node
from .normalisation import inverse_batch_norm
from .operation import OPERATIONS, Operation
from .pointwise import constant_of, packed_mask
from .recipe import Kept, Operand, Output, Recipe, Spikes, Value

if TYPE_CHECKING:
    from ..neuron import Reversal

FIRED = "snn_revplugin_fired"  # where a neuron's graph node offers its packed spikes, the node's first output
MEMO = "snn_revplugin_recipe"  # where a node that saves nothing remembers its recipe, weakly: the readers own it
EDITED = "an edit in place"
BOUNDARY = False  # ... or that it has none
NO_EDGE = (None, 0)
UNKNOWN = Value()  # stands for an operand that cannot be had
BATCH_NORM_INVERTED = "inverse of NativeBatchNormBackward0"
SAME_ELEMENTS = {
    f"{name}Backward0" for name in ("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze")
}  # in their order
DEEPEST = 64  # operations on the way down, and in a recipe: a chain through time (a synapse of the user's own) ends here
SMALLEST_MASK = 1024  # elements below which packing a dropout mask costs more than it saves


def recipe_of(current: Tensor, reversal: Reversal) -> Value | None:
    """How a neuron's current can be had again in backward; replaces what was saved on the way to it.

    Returns:
        None if the current depends on neither spikes nor data through operations that are known, so that the neuron had
        better keep its membrane potential.
    """
    node = current.grad_fn
    if node is None:
        return None
    value = _Walk(reversal).value_of(node, current.output_nr, current, current.stride())
    return value if value is not None and value.derived else None


def give_back(current: Tensor, given: Value, reversal: Reversal) -> None:
    """Replace what was saved on the way to the current of a neuron that can give it back itself, and has no need of a recipe.

    Args:
        given: the current, as the neuron has it again.
    """
    node = current.grad_fn
    while node is not None and internals.name_of(node) in SAME_ELEMENTS:
        node = node.next_functions[0][0]
    as_it_was = node is not None and current._version == 0  # what was written into is not the norm's output any more
    inverse = inverse_batch_norm(node, reversal.known, given) if as_it_was else None
    if inverse is not None and internals.replace_saved(node, "input", inverse):
        inverse.expect()
        reversal.ledger.operations[BATCH_NORM_INVERTED] += 1
        _Walk(reversal).value_of(node, 0, wanted=False)  # what feeds the norm is computed again for no one
    else:
        recipe_of(current, reversal)


class _Walk:
    """One walk; it writes down what it meets in the neuron's ledger.

    It is taken at every time step for every neuron: what does not change from step to step is looked up, not built again.
    """

    __slots__ = ("known", "ledger")

    def __init__(self, reversal: Reversal) -> None:
        self.ledger, self.known = reversal.ledger, reversal.known

    def value_of(
        self,
        node: Node,
        output: int,
        tensor: Tensor | None = None,
        strides: tuple[int, ...] | None = None,
        down: int = 0,
        wanted: bool = True,
    ) -> Value | None:
        """The value of a node's output, or None if it cannot be had.

        Args:
            tensor: the output itself, where somebody has it.
            strides: its strides, where they are known.
            down: nodes between the neuron and here.
            wanted: False below a boundary, where only what was saved matters.
        """
        kind = internals.name_of(node)
        if kind == internals.LEAF:
            return self.known.kept(node.variable)
        operation = OPERATIONS.get(kind)
        if operation is None and output == 0:
            fired = getattr(node, FIRED, None)
            if fired is not None:
                return self._unless_edited(fired, tensor, wanted)
        recipe = _met(node, operation)
        if recipe is None:
            if operation is not None and down < DEEPEST:
                recipe = self._meet(node, operation, tensor, strides, down, wanted)
            else:
                self._stop_at(node, kind, down, wanted)
            _remember(node, operation, recipe)
        if not recipe:
            return None if tensor is None else Kept(tensor)
        value = Output(recipe, output) if operation.several else recipe
        return value if tensor is None or tensor._version == 0 else self._unless_edited(value, tensor, wanted)

    def _unless_edited(self, value: Value, tensor: Tensor | None, wanted: bool) -> Value | None:
        """A value, if it still is that of a tensor which may have been written into since its memory was taken.

        Autograd records an in-place operation like any other (``out += identity``), but not one under ``no_grad``. Which it
        was the graph does not tell; so the two are compared. Spikes have a memory for that of their own.
        """
        if value.cheap:
            if not value.were_edited():
                return value
        elif not value.derived or (capture.may_ask(tensor) and torch.equal(value.peek(), tensor.detach())):
            return value
        self._note(self.ledger.boundaries, EDITED, wanted)
        return None if tensor is None else Kept(tensor)

    def _note(self, account: Counter[str], name: str, wanted: bool) -> None:
        if wanted:
            account[name] += 1

    def _stop_at(self, node: Node, kind: str, down: int, wanted: bool) -> None:
        """A boundary: what lies below it is replaced all the same."""
        if down == DEEPEST:
            self._note(self.ledger.boundaries, "a chain of operations without spikes", wanted)
            return
        self._note(self.ledger.boundaries, kind, wanted)
        for below, output in node.next_functions:
            if below is not None:
                self.value_of(below, output, down=down + 1, wanted=False)

    def _meet(
        self,
        node: Node,
        operation: Operation,
        tensor: Tensor | None,
        strides: tuple[int, ...] | None,
        down: int,
        wanted: bool,
    ) -> Recipe | None:
        """The recipe of a node that no walk has come to yet, after what it saved has been replaced."""
        edges = node.next_functions
        names = operation.inputs or (None,) * len(edges)
        absent = operation.absent(node)
        values: list[Value | None] = []
        replaced, derived = [], operation.weighs
        for position, name in enumerate(names):
            if position in absent:
                values.append(None)
                continue
            below, output = edges[position] if position < len(edges) else NO_EDGE
            if below is not None and internals.name_of(below) == internals.LEAF:
                values.append(self.known.kept(below.variable))
                continue
            saved = None if name is None else internals.saved_by(node, name)
            value = UNKNOWN
            if below is None:
                value = UNKNOWN if saved is None else _constant(saved)
            elif saved is not None:
                value = self.value_of(below, output, saved, saved.stride(), down + 1)
            else:
                same = operation.pointwise and internals.shape_of_output(below, output) == internals.shape_of_output(node)
                value = self.value_of(below, output, None, strides if same else None, down + 1, wanted) or UNKNOWN
            if value.derived:
                derived = True
                if saved is not None:
                    replaced.append((name, position, saved))
            elif saved is not None:
                value = self.known.kept(saved)  # it may be cast or transposed; every time step shares it all the same
            values.append(value)
        recipe = self._recipe(node, operation, values, tensor, strides)
        if recipe is not None:
            self._note(self.ledger.operations, operation.node, wanted)
        elif derived:
            self._note(self.ledger.boundaries, operation.node, wanted)
        for name, position, saved in replaced:
            value = values[position]
            # Where strides decide what backward does, zeros without strides will not do.
            if name in operation.shape_only and saved.is_contiguous():
                _replace(node, name, self.known.shape(saved))
            elif internals.replace_saved(node, name, value if recipe is None else Operand(recipe, position)):
                value.expect()
        if recipe is not None and derived:
            for name, position in operation.outputs.items():
                _replace(node, name, Output(recipe, position) if operation.several else recipe)
        return recipe

    def _recipe(
        self,
        node: Node,
        operation: Operation,
        values: list[Value | None],
        tensor: Tensor | None,
        strides: tuple[int, ...] | None,
    ) -> Recipe | None:
        function = None
        if UNKNOWN not in values:
            of_spikes = operation.of_spikes is not None and values[0].cheap
            function = (operation.of_spikes if of_spikes else operation.replay)(node)
        elif operation.constant and tensor is not None and values[0].cheap:
            function, values = constant_of(node, values[0].peek(), tensor), values[:1]
        if function is None:
            return None
        if operation.layout and strides is not None:
            function = _laid_out(function, strides)
        recipe = self.known.recipe(function, tuple(values), operation)
        return None if recipe.depth > DEEPEST else recipe


def _met(node: Node, operation: Operation | None) -> Recipe | bool | None:
    """The recipe of a node that a walk has come to before, ``BOUNDARY`` if it has none, or None for a node that is new."""
    if operation is not None and operation.carriers:
        for name in operation.carriers:
            value = internals.replacement_of(node, name)
            if isinstance(value, Operand | Output):
                return value.recipe
        return None
    if operation is not None and operation.is_view:
        return None
    memo = node.metadata.get(MEMO)
    return memo() if memo else memo


def _remember(node: Node, operation: Operation | None, recipe: Recipe | None) -> None:
    """... where its saved tensors do not tell."""
    if operation is None or not (operation.carriers or operation.is_view):
        node.metadata[MEMO] = BOUNDARY if recipe is None else weakref.ref(recipe)


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
    if internals.replace_saved(node, name, value):
        value.expect()

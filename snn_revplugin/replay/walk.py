"""The walk: from a neuron's current down the autograd graph to the spikes below.

Wherever a node on the way saved a tensor that can be computed from those spikes and the parameters, a recipe takes its
place and autograd lets go of the tensor. The graph itself stays as the host built it: in backward autograd runs its own
kernels in its own order, and a node that asks for what it saved has it computed again.

A node that the table of operations does not know is a *boundary*. What it saved stays, its output is kept where another node
saved it, and the ledger remembers its name. Unknown never means wrong, only larger.
"""

from __future__ import annotations

import weakref
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
BOUNDARY = False  # ... or that it has none
SMALLEST_MASK = 1024  # elements below which packing a dropout mask costs more than it saves


class Operand(NamedTuple):
    """One input of an operation: its value, if it can be had, and what the node saved of it."""

    value: Value | None
    known: bool
    name: str | None
    saved: Tensor | None


def recipe_of(current: Tensor, reversal: Reversal) -> Value | None:
    """How a neuron's current can be had again in backward; replaces what was saved on the way to it.

    Returns:
        None if the current depends on neither spikes nor data through operations that are known, so that the neuron had
        better keep its membrane potential.
    """
    if current.grad_fn is None:
        return None
    value = _value_of((current.grad_fn, current.output_nr), current, reversal)
    return value if value is not None and value.derived else None


def _value_of(edge: Edge, tensor: Tensor | None, reversal: Reversal) -> Value | None:
    """The value of the output of a node; ``tensor`` is that output, where somebody has it."""
    node, output = edge
    if internals.is_leaf_edge(node):
        return Kept(node.variable)
    fired = getattr(node, FIRED, None)
    if fired is not None and output == 0 and (tensor is None or tensor._version == 0):
        return fired
    name = internals.name_of(node)
    operation = OPERATIONS.get(name)
    memo = node.metadata.get(MEMO)
    recipe = memo() if memo else None
    if recipe is None and memo is not BOUNDARY:
        if operation is None:
            reversal.ledger.boundary(name)
        else:
            recipe = _replay(node, operation, tensor, reversal)
        node.metadata[MEMO] = BOUNDARY if recipe is None else weakref.ref(recipe)
    if recipe is None:
        return None if tensor is None else Kept(tensor)
    return Output(recipe, output) if operation.several else recipe


def _replay(node: Node, operation: Operation, tensor: Tensor | None, reversal: Reversal) -> Recipe | None:
    """The recipe of a known operation, after what its node saved has been replaced."""
    operands = _operands(node, operation, reversal)
    derived = operation.weighs or any(each.value is not None and each.value.derived for each in operands)
    recipe = None
    function, values = _function_of(node, operation, operands, tensor)
    if function is not None:
        if operation.layout and tensor is not None:
            function = _laid_out(function, tensor.stride())
        recipe = _shared(reversal, function, values, operation.is_view, derived)
        reversal.ledger.replayed(operation.node)
    elif derived:
        reversal.ledger.boundary(operation.node)
    for each in operands:
        if each.saved is not None and each.value is not None and each.value.derived:
            # Where strides decide what backward does, zeros without strides will not do.
            shape_only = each.name in operation.shape_only and each.saved.is_contiguous()
            _replace(node, each.name, Shape(each.saved) if shape_only else each.value)
    if recipe is not None and derived:
        for name, position in operation.outputs.items():
            _replace(node, name, Output(recipe, position) if operation.several else recipe)
    return recipe


def _shared(reversal: Reversal, function: Replay, values: tuple[Value | None, ...], is_view: bool, derived: bool) -> Recipe:
    """A recipe; the same one again for an operation that an earlier time step did on the very same tensors.

    An image shown at every time step goes through the same first layer each time: computed once a backward pass, it serves
    them all.
    """
    identities = tuple(each and each.identity for each in values)
    if any(each is not None and identity is None for each, identity in zip(values, identities, strict=True)):
        return Recipe(function, values, is_view, derived)
    identity = _identity(function), identities
    recipe = reversal.static.get(identity)
    if recipe is None:
        recipe = reversal.static[identity] = Recipe(function, values, is_view, derived, identity)
    return recipe


def _identity(function: Replay) -> object:
    if isinstance(function, partial):
        return function.func, function.args, tuple(function.keywords.items())
    return function


def _operands(node: Node, operation: Operation, reversal: Reversal) -> list[Operand]:
    edges = node.next_functions
    names = operation.inputs or (None,) * len(edges)
    absent = operation.absent(node)
    operands = []
    for position, name in enumerate(names):
        if position in absent:
            operands.append(Operand(None, True, name, None))
            continue
        saved = None if name is None else internals.saved_by(node, name)
        below, output = edges[position] if position < len(edges) else (None, 0)
        value = None
        if below is not None:
            value = _value_of((below, output), saved, reversal)
        elif saved is not None:
            value = _constant(saved)
        if saved is not None and (value is None or not value.derived):
            value = Kept(saved)  # a parameter, cast or transposed once, and shared by every time step
        operands.append(Operand(value, value is not None, name, saved))
    return operands


def _function_of(node: Node, operation: Operation, operands: list[Operand], tensor: Tensor | None):
    """The operation as a function of the values that are known, and those values."""
    values = tuple(each.value for each in operands)
    if all(each.known for each in operands):
        return operation.replay(node), values
    if operation.constant and tensor is not None and values[0] is not None and values[0].cheap:
        return constant_of(node, values[0].peek(), tensor), values[:1]
    return None, values


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

"""The table of operations that can be recomputed: one small :class:`Operation` each, found by the
name of its autograd node.

To add an operation, write its entry beside similar ones in this room, and give it a row in
``tests/test_operations.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ...torch_internals.graph import Node, attributes_of, name_of, plain
from ..kind import Kind
from ..recipe import Replay

VARIADIC = ()
ONE = (None,)  # one operand, which the node does not save
WRITE_INTO_VIEW = "CopySlices"  # autograd's name for an operation that wrote into a view
MAX_FUNCTIONS = 1024


class DecidedBy:
    """A ``replay`` that some attributes of the node decide: nodes with equal attributes share one
    function.

    Args:
        build: takes the attributes' values to the function.
        *names: of the attributes, without ``_saved_``.
        read: reads one hashable value off the node, which decides in place of attributes.
    """

    def __init__(
        self,
        build: Callable[..., Replay],
        *names: str,
        read: Callable[[Node], Hashable] | None = None,
    ) -> None:
        self.build, self.single, self.read = build, len(names) <= 1, read or attributes_of(*names)
        self.functions: dict[Hashable, Replay] = {}

    def __call__(self, node: Node) -> Replay:
        key = self.read(node)
        function = self.functions.get(key)
        if function is None:
            if len(self.functions) == MAX_FUNCTIONS:  # a slice that moves with time, say
                self.functions.clear()
            values = plain(key)
            function = self.build(values) if self.single else self.build(*values)
            self.functions[key] = function
        return function


def _nothing_absent(node: Node) -> tuple[int, ...]:
    return ()


@dataclass(frozen=True)
class Operation:
    """How the operation of one kind of graph node is recomputed.

    Attributes:
        node: the name of its autograd node, ``type(output.grad_fn).__name__``.
        kind: see :mod:`snn_revplugin.replay.kind`.
        inputs: for each tensor operand, in the order of ``node.next_functions``, the name under
            which the node saves it (``_saved_<name>``), or None where the node does not save it.
            ``VARIADIC`` for an operation on a list of tensors.
        replay: takes the node to a function of the operands' tensors that recomputes the outputs
            bit for bit, or to None where this node's cannot be recomputed. The function must not
            hold the node: the node holds the recipe, so that would be a reference cycle.
            :class:`DecidedBy` builds one function for all nodes with equal attributes.
        outputs: the names of outputs that the node saves, with their positions.
        absent: takes the node to the positions of operands that the call left out (a bias, an
            affine weight); the function gets None for them.
        shape_only: the saved inputs of which backward reads the shape and no element.
        of_spikes: ``replay`` for a first operand of zeros and ones, where another kernel is faster.
        of_output: takes the node and its output to the function, for an operation whose node does
            not save all that is needed. The function must not hold the output.
        solve_constant: takes the node, one of two operands and the output to a function of both,
            where the other is a constant that the node does not save: the function gets None.
        solved: the position of that constant.
        before: takes the node, an operand's position and the output to that operand, for an
            operation that only moves elements; the operation below can then read its own output.
        reads_spikes_as: takes the node to the memory format in which its backward reads unpacked
            spikes fastest, its first operand; None for the format that the node saved.
        by_sample: the position of the operand whose samples, along dimension 0, the operation
            treats one by one. So the function takes those of several time steps side by side, where
            the other operands are the same at all of them.
        weight_and_bias: the positions of a weight and of its bias. The node does not save the bias,
            and refers to it only if it has a gradient: a frozen one is found through the weight.
    """

    node: str
    kind: Kind
    inputs: tuple[str | None, ...]
    replay: Callable[[Node], Replay | None]
    outputs: dict[str, int] = field(default_factory=dict)
    absent: Callable[[Node], tuple[int, ...]] = _nothing_absent
    shape_only: tuple[str, ...] = ()
    of_spikes: Callable[[Node], Replay | None] | None = None
    of_output: Callable[[Node, Tensor], Replay | None] | None = None
    solve_constant: Callable[[Node, Tensor, Tensor], Replay | None] | None = None
    solved: int = 1
    before: Callable[[Node, int, Tensor], Tensor] | None = None
    reads_spikes_as: Callable[[Node], torch.memory_format | None] | None = None
    by_sample: int | None = None
    weight_and_bias: tuple[int, int] | None = None

    @cached_property
    def is_view(self) -> bool:
        """Whether the output shares memory with the first operand."""
        return self.kind.is_view

    @cached_property
    def saves(self) -> bool:
        """Whether the node saves any tensor."""
        return bool(self.outputs) or any(name is not None for name in self.inputs)

    @cached_property
    def multiple_outputs(self) -> bool:
        """Whether the function gives a tuple."""
        return self.kind.multiple_outputs or any(self.outputs.values())

    @cached_property
    def carriers(self) -> tuple[str, ...]:
        """The names of saved tensors in whose place a later walk finds the node's recipe: those
        that every such node saves. Empty where that depends on the call, as of a product."""
        if self.kind.is_elementwise:
            return ()
        return (
            *self.outputs,
            *(name for name in self.inputs if name is not None and name not in self.shape_only),
        )

    def __post_init__(self) -> None:
        if "Backward" not in self.node and self.node != WRITE_INTO_VIEW:
            raise ValueError(f"node: {self.node!r} is not the name of an autograd node")
        if self.is_view and self.outputs:
            raise ValueError(f"{self.node}: a view computes nothing, so it saves no output")


OPERATIONS: dict[str, Operation] = {}


def operation_of(node: Node) -> Operation | None:
    """The operation that a graph node stands for, if it is in the table."""
    return OPERATIONS.get(name_of(node))


def register(*operations: Operation) -> None:
    """Add operations to the table.

    Raises:
        ValueError: the table has an entry for the same node.
    """
    for each in operations:
        if each.node in OPERATIONS:
            raise ValueError(f"{each.node} is registered twice")
        OPERATIONS[each.node] = each

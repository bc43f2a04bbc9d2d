"""The table of operations that can be computed again: one small :class:`Operation` each, found by
its node's name.

To add one, write its entry beside its kin in :mod:`.linear`, :mod:`.normalisation`,
:mod:`.pooling`, :mod:`.shape` or :mod:`.pointwise` and give it a row in
``tests/test_operations.py``. What an entry has to say:

* ``node``: the name of its autograd node, ``type(output.grad_fn).__name__``;
* ``inputs``: for each tensor operand, in the order of ``node.next_functions``, the name under which
  the node saves it (``_saved_<name>``), or None where it saves none. ``VARIADIC`` for an operation
  on a list of tensors;
* ``replay``: takes the node to a function of the operands' tensors that gives the outputs again,
  bit for bit. It must not hold on to the node: a node reaches the recipe, so that would be a cycle.
  :class:`DecidedBy` builds it once for all nodes with the same attributes;
* ``of_spikes``: ``replay`` for a first operand of zeros and ones, where another kernel is faster;
* ``outputs``: the names of outputs that the node saves, with their positions;
* ``absent``: which operands the call left out (a bias, an affine weight), to be passed as None;
* ``weighs``: whether the first operand is an activation whatever it comes from, so that even an
  operation on plain data is computed again rather than kept (a convolution of the input image);
* ``remade``: whether it is computed again also where it is made of parameters alone, for autograd
  not to keep one copy of a parametrised weight a time step;
* ``is_view``: whether the output shares memory with the first operand;
* ``several``: whether the outputs are more than one, so that ``replay`` gives a tuple;
* ``shape_only``: the saved inputs of which backward reads the shape and no element;
* ``constant``: whether an operand may be a number that the node does not save;
* ``of_output``: ``replay`` from the node and the output itself, for what the node does not tell
  otherwise; it is asked only where somebody has the output at hand, and must not hold on to it;
* ``before``: where the operation only moves elements about: takes the node, an operand's position
  and the output to that operand, for an operation below it to look at;
* ``pointwise``: whether the output has the strides of its operands;
* ``reads_spikes_as``: takes the node to the memory format in which its backward had better read
  unpacked spikes, its first operand, or to None: as they were;
* ``layout``: whether the output's strides are the caller's choice, which the node does not tell
  (``contiguous``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ...torch_internals.graph import Node, attributes_of, name_of, plain

VARIADIC = ()
WRITE_INTO_VIEW = "CopySlices"  # autograd's name for an operation that wrote into a view
MOST_MADE = 1024
Replay = Callable[..., Tensor | tuple[Tensor, ...]]


class DecidedBy:
    """A ``replay`` that some attributes of the node decide: nodes with the same ones share one
    function.

    Args:
        build: takes the attributes' values to the function.
        *names: theirs, without ``_saved_``.
        read: reads what decides off the node instead, one hashable value.
    """

    def __init__(
        self,
        build: Callable[..., Replay],
        *names: str,
        read: Callable[[Node], Hashable] | None = None,
    ) -> None:
        self.build, self.single, self.read = build, len(names) <= 1, read or attributes_of(*names)
        self.made: dict[Hashable, Replay] = {}

    def __call__(self, node: Node) -> Replay:
        key = self.read(node)
        function = self.made.get(key)
        if function is None:
            if len(self.made) == MOST_MADE:  # a slice that moves with time, say
                self.made.clear()
            values = plain(key)
            function = self.made[key] = self.build(values) if self.single else self.build(*values)
        return function


def _nothing_absent(node: Node) -> tuple[int, ...]:
    return ()


@dataclass(frozen=True)
class Operation:
    """How one kind of graph node is computed again; see the module's documentation."""

    node: str
    inputs: tuple[str | None, ...]
    replay: Callable[[Node], Replay | None]
    outputs: dict[str, int] = field(default_factory=dict)
    absent: Callable[[Node], tuple[int, ...]] = _nothing_absent
    recompute_on_data: bool = False
    recompute_always: bool = False
    is_view: bool = False
    multiple_outputs: bool = False
    shape_only: tuple[str, ...] = ()
    pointwise: bool = False
    layout: bool = False
    constant: bool = False
    of_output: Callable[[Node, Tensor], Replay | None] | None = None
    before: Callable[[Node, int, Tensor], Tensor] | None = None
    of_spikes: Callable[[Node], Replay | None] | None = None
    reads_spikes_as: Callable[[Node], torch.memory_format | None] | None = None

    @cached_property
    def carriers(self) -> tuple[str, ...]:
        """The names of saved tensors in whose place a recipe of the node can be found again: those
        that every such node saves. Empty where that depends on the call, as of a product."""
        if self.pointwise:
            return ()
        return (
            *self.outputs,
            *(name for name in self.inputs if name is not None and name not in self.shape_only),
        )

    def __post_init__(self) -> None:
        if "Backward" not in self.node and self.node != WRITE_INTO_VIEW:
            raise ValueError(f"node: {self.node!r} is not the name of an autograd node")
        if self.is_view and (self.recompute_on_data or self.outputs):
            raise ValueError(
                f"{self.node}: a view computes nothing, so it can neither weigh nor save an output"
            )


OPERATIONS: dict[str, Operation] = {}


def operation_of(node: Node) -> Operation | None:
    """The operation that a graph node stands for, if it is in the table."""
    return OPERATIONS.get(name_of(node))


def register(*operations: Operation) -> None:
    """Add operations to the table.

    Raises:
        ValueError: one of them is there already.
    """
    for each in operations:
        if each.node in OPERATIONS:
            raise ValueError(f"{each.node} is registered twice")
        OPERATIONS[each.node] = each

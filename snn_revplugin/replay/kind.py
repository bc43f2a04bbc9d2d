"""The kinds of operations: when an operation is recomputed, and what its output is like."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What all operations of one kind have in common.

    An operation of any kind is recomputed where one of its operands is.

    Attributes:
        name: for messages.
        is_view: the output shares memory with the first operand; nothing is computed.
        is_elementwise: the output has the strides of its operands.
        light: forward may recompute it to learn what its node does not save.
        chooses_layout: the caller chose the output's strides, which the node does not save.
        recompute_on_data: it is recomputed even where its first operand is plain data.
        recompute_always: it is recomputed even where it reads parameters alone. Otherwise autograd
            would save one copy of a computed weight per time step.
        multiple_outputs: it has more than one output, whatever its node saves.
    """

    name: str
    is_view: bool = False
    is_elementwise: bool = False
    light: bool = False
    chooses_layout: bool = False
    recompute_on_data: bool = False
    recompute_always: bool = False
    multiple_outputs: bool = False


# another shape of the same memory
VIEW = Kind("view", is_view=True, light=True)
# several views of the same memory
SPLIT = Kind("split", is_view=True, light=True, multiple_outputs=True)
# the same elements in another dtype or memory format; of a weight, too, as autocast makes one
COPY = Kind("copy", light=True, chooses_layout=True, recompute_always=True)
# a function of one element of each operand
ELEMENTWISE = Kind("elementwise", is_elementwise=True, light=True, recompute_always=True)
# whose first operand is an activation: a weight layer, a normalisation, pooling
LAYER = Kind("layer", recompute_on_data=True)
# of which weights are computed, too: a selection by index, a product of vectors, a norm
PARAMETRISATION = Kind("parametrisation", recompute_always=True)
# the same, with several outputs
PARAMETRISATIONS = Kind("parametrisations", recompute_always=True, multiple_outputs=True)
# a reduction, a rearrangement, whatever else
PLAIN = Kind("plain")

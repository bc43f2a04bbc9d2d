"""Residual streams: sums of sums of sums, ``x[l] = x[l-1] + f(x[l-1])``, each read by some layer.

Recomputed from the spikes, the last sum would take the whole network, and all sums below it would
stand in memory until their blocks have been through backward. So of a stream over T time steps the
last sum is kept. As backward goes down, the sums below are reconstructed from it by reversing the
stream in depth:

    x[l-1] = x[l] - f(x[l-1])

where ``f`` ends at the spikes of its block, so ``f`` can be recomputed without ``x[l-1]``. Sums of
spikes are small whole numbers: they are kept at a few bits each, and the difference is exact. Sums
of floats are kept as they are, one per stream and an anchor every ``BETWEEN_ANCHORS`` sums. The
difference is rounded once per sum. A neuron whose current it is reads its spikes from their bits
and decides none again.

A product of spikes with spikes with spikes (AND and IAND of SEW-ResNet) loses its factors and is
not reversed. It is kept, too, at one bit per element, every few products, rather than recomputed
from all below.

A single time step needs none of this: its values are small next to what all steps together keep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..packed.integers import PackedIntegers
from ..torch_internals import capture, graph
from ..torch_internals.graph import Node
from .recipe import HeldTensor, Integers, Output, Recipe, Recomputable

SUM = "AddBackward0"
RESIDUAL = (SUM, "MulBackward0")  # the operations of residual connections of spikes
# operations, other than views, above which a sum is a stream: an ordinary residual block has fewer
MAX_WORK = 6
# sums, over which the rounding of float32 adds up to about 1e-6 of the largest
BETWEEN_ANCHORS = 16
REVERSED = f"reversal of {SUM}"


class Stream(Recomputable):
    """One sum of a residual stream: kept as long as it is the last one, reconstructed from the sum
    above it afterwards.

    Args:
        total: the sum; a copy is kept, into which no other code can write.
        below: the sum before it, if that is part of the stream.
    """

    __slots__ = ("__weakref__", "exact", "index", "readers", "source")
    derived = True
    work = 0

    def __init__(self, total: Tensor, below: Stream | None = None) -> None:
        packed = PackedIntegers.of(total.detach())
        self.exact = packed is not None
        self.source: Recomputable = (
            Integers(packed) if self.exact else HeldTensor(total.detach().clone())
        )
        self.index = 0 if below is None else below.index + 1
        self.readers = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for the sum."""
        if isinstance(self.source, Integers):
            return self.source.packed.nbytes
        return self.source.held.tensor.nbytes if isinstance(self.source, HeldTensor) else 0

    def reverse(self, above: Stream, step: Recomputable) -> bool:
        """Release the sum: from now on it is ``above - step``.

        Returns:
            False, and the sum is kept, where it is an anchor or was released before, where the
            difference would be less exact than the sum, and where the step is computed from this
            very sum.
        """
        if not isinstance(self.source, Integers | HeldTensor) or _reaches(step, self):
            return False
        if not (above.exact and step.exact if self.exact else (self.index + 1) % BETWEEN_ANCHORS):
            return False
        self.source = Recipe(torch.sub, (above, step))
        for _ in range(self.readers):
            self.source.add_reader()
        return True

    def value(self) -> Tensor:
        return self.source.value()

    def consume(self) -> tuple[Tensor, bool]:
        return self.source.consume()

    def compute(self, known: dict[int, Tensor] | None = None) -> Tensor:
        return self.source.compute(known)

    def add_reader(self) -> None:
        self.readers += 1
        self.source.add_reader()

    def drop_reader(self) -> None:
        self.source.drop_reader()


def may_be_stream(node: Node, total: Recipe, tensor: Tensor | None) -> bool:
    """Whether :func:`stream_of` may take a sum, from the graph alone."""
    if tensor is None or graph.name_of(node) not in RESIDUAL:
        return False
    is_sum = graph.name_of(node) == SUM and graph.attribute_of(node, "alpha") == 1
    continues = is_sum and any(isinstance(each, Stream) for each in total.inputs)
    return (continues or total.work > MAX_WORK) and _has_like_operands(node, total)


def stream_of(node: Node, total: Recipe, tensor: Tensor) -> tuple[Stream, int] | None:
    """Take a sum into a residual stream, and release the sum before it.

    A product of spikes with spikes with spikes is kept, too, rather than recomputed from all of
    them.

    Args:
        node: of the sum, which :func:`may_be_stream`.
        total: its recipe, which gives the tensor.
        tensor: the sum itself.

    Returns:
        The sum as part of the stream, and the bytes of the sum before it that were released. None
        if the sum is no part of a stream.
    """
    if not capture.may_synchronise(tensor):
        return None
    is_sum = graph.name_of(node) == SUM and graph.attribute_of(node, "alpha") == 1
    below = next((each for each in total.inputs if is_sum and isinstance(each, Stream)), None)
    stream = Stream(tensor, below)
    # Shorter mantissas have no bits to lose.
    if not stream.exact and not (is_sum and tensor.dtype in (torch.float32, torch.float64)):
        return None
    if below is None:
        return stream, 0
    step = total.inputs[1] if total.inputs[0] is below else total.inputs[0]
    before = below.nbytes
    return stream, before if below.reverse(stream, step) else 0


def _has_like_operands(node: Node, total: Recipe) -> bool:
    """Whether both operands of a sum have its shape and dtype."""
    if len(total.inputs) != 2:
        return False
    shape, kind = graph.shape_of_output(node), graph.type_of_output(node)
    return all(
        below is not None
        and graph.shape_of_output(below, output) == shape
        and graph.type_of_output(below, output) == kind
        for below, output in node.next_functions
    )


def _reaches(value: Recomputable | None, stream: Stream) -> bool:
    """Whether a value is computed from a stream's sum."""
    seen, values = set(), [value]
    while values:
        each = values.pop()
        if each is stream:
            return True
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Stream):
            values.append(each.source)
        elif isinstance(each, Output):
            values.append(each.recipe)
        elif isinstance(each, Recipe):
            values.extend(each.inputs)
    return False

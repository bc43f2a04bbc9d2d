"""Residual streams: sums of sums of sums, each of which some layer reads, ``x[l] = x[l-1] +
f(x[l-1])``.

Computed again from the spikes, the last sum takes the whole network, and all the sums below it
stand in memory until their blocks have been through backward. So of a stream over T time steps the
last sum is kept, and those below are had from it as backward goes down, by reversing the stream in
depth:

    x[l-1] = x[l] - f(x[l-1])

where ``f`` ends at the spikes of its block, so ``x[l-1]`` is not needed to have it. Sums of spikes
are small whole numbers: they are kept at a few bits each, and the difference is exact. Sums of
floats are kept as they are, one a stream and an anchor every ``BETWEEN_ANCHORS`` sums, and the
difference is rounded once a sum; a neuron whose current it becomes has its spikes from their bits
and decides none again.

A product of spikes with spikes with spikes (AND and IAND of SEW-ResNet) loses what it was made of
and is not reversed; but it too is kept, at a bit an element, every few products rather than
computed from all below.

A single time step needs none of this: its values are small next to what all steps together keep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..packed.integers import PackedIntegers
from .recipe import HeldTensor, Output, Recipe, Recomputable

# operations, other than views, from which on a sum is a stream: an ordinary residual block has
# fewer
MOST_WORK = 6
BETWEEN_ANCHORS = (
    16  # sums, over which the rounding of float32 adds up to about 1e-6 of the largest
)
REVERSED = "reversal of AddBackward0"


class Integers(Recomputable):
    """Small whole numbers, packed. Unpacking is cheap, so every reader gets a copy of its own and
    nothing is counted."""

    __slots__ = ("packed",)
    derived = True

    def __init__(self, packed: PackedIntegers) -> None:
        self.packed = packed

    def value(self) -> Tensor:
        with torch.no_grad():
            return self.packed.numbers()

    def consume(self) -> tuple[Tensor, bool]:
        return self.value(), True


class Stream(Recomputable):
    """One sum of a residual stream: kept as long as it is the last one, had from the sum above it
    afterwards.

    Args:
        total: the sum; a copy is kept, so that nobody writes into it.
        below: the sum that it goes on from, if that is part of the stream.
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

    def reverse(self, above: Stream, step: Recomputable) -> bool:
        """Let go of the sum: from now on it is ``above - step``.

        Returns:
            False, and the sum is kept, where it is an anchor or has been let go already, where the
            difference would be less exact than what is kept, and where the step is computed from
            this very sum.
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

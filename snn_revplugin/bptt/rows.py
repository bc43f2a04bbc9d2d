"""Rows of a call: neurons that a call of a module does not mix, nearly always the samples of a
batch. Backward runs the call on some of them at a time, so that only their graph stands.

Gradients at parameters add up over the rows. Whether a module mixes rows is tried, on two of them
together and one by one: outputs, states and all gradients must agree to rounding. (A batch norm
mixes rows forward; a gradient that is scaled by the number of elements mixes them backward.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..neurons.transition import Gradients, States
from ..torch_internals.tensors import Watch

# A call of a copy of the module: outputs and states after, and the copy's parameters.
Run = Callable[[Tensor, States], tuple[tuple[Tensor, ...], list[Tensor]]]
MOST_PARTS = 8
# That an operation makes in a part, on average: with fewer most time is that of calling operations.
FEWEST_ELEMENTS = 3 * 2**12
TOLERANCE = 1e-3  # of a gradient's norm; a cut graph makes a difference of its own size


@dataclass(frozen=True)
class Rows:
    """Where the rows of a call lie.

    Attributes:
        inputs: the dimension of the input, and of each state before.
        given: the dimension of the outputs, and of each state after.
        elements: of a row, how many an operation of the call makes on average.
    """

    inputs: tuple[int, ...]
    given: tuple[int, ...]
    elements: float

    def parts(self, x: Tensor) -> Iterator[tuple[int, int]]:
        """The parts in which backward takes the rows of an input: of each the first row, and how
        many it has."""
        rows = x.shape[self.inputs[0]]
        affordable = int(rows * self.elements / FEWEST_ELEMENTS)
        size = -(-rows // min(MOST_PARTS, max(1, affordable)))
        yield from ((first, min(size, rows - first)) for first in range(0, rows, size))


def rows_of(
    tensors: Sequence[Tensor | None], dims: Sequence[int], first: int, count: int
) -> Gradients:
    """Some rows of tensors, dense as the whole tensors are; None stays None."""
    return tuple(
        each if each is None else each.narrow(dim, first, count).contiguous()
        for each, dim in zip(tensors, dims, strict=True)
    )


def find_rows(run: Run, x: Tensor, states: States) -> Rows | None:
    """The rows of a call that starts from some states; None where it mixes all of them."""
    # Enough of them for all parts; and the batch rather than neurons, neurons rather than time.
    order = sorted(range(x.dim()), key=lambda dim: (x.shape[dim] < MOST_PARTS, dim == 0, dim))
    for dim in order:
        dims = [dim + each.dim() - x.dim() for each in (x, *states)]
        if x.shape[dim] > 1 and min(dims) >= 0:
            try:
                found = _try(run, rows_of((x, *states), dims, 0, 2), tuple(dims))
            except Exception:  # of the module's code, which takes no other shape
                continue
            if found is not None:
                return found
    return None


def _try(run: Run, two: States, dims: tuple[int, ...]) -> Rows | None:
    together, *one_by_one = (
        _Result(run, rows_of(two, dims, first, count)) for first, count in ((0, 2), (0, 1), (1, 1))
    )
    given = []
    for whole, part in zip(together.given, one_by_one[0].given, strict=True):
        differ = [i for i, (a, b) in enumerate(zip(whole.shape, part.shape, strict=True)) if a != b]
        if len(differ) != 1:
            return None
        given += differ
    first, second = one_by_one
    whole = *together.given, *together.at_inputs
    parts = zip((*first.given, *first.at_inputs), (*second.given, *second.at_inputs), strict=True)
    joined = [torch.cat(rows, dim) for rows, dim in zip(parts, (*given, *dims), strict=True)]
    sums = [a + b for a, b in zip(first.at_parameters, second.at_parameters, strict=True)]
    if not all(map(close, (*whole, *together.at_parameters), (*joined, *sums))):
        return None
    return Rows(dims, tuple(given), together.elements / 2)


class _Result:
    """What a call gives, and the gradients of a loss that adds up over its rows.

    Attributes:
        given, at_inputs, at_parameters: these.
        elements: how many an operation makes on average.
    """

    def __init__(self, run: Run, inputs: States) -> None:
        made: list[int] = []
        watch = Watch(lambda read: None, lambda made_: made.append(sum(e.numel() for e in made_)))
        with torch.enable_grad(), watch:
            leaves = [each.detach().requires_grad_() for each in inputs]
            self.given, parameters = run(leaves[0], tuple(leaves[1:]))
            loss = sum(each.sin().sum() for each in self.given)
            wanted = [*leaves, *parameters]
            found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        self.at_inputs, self.at_parameters = found[: len(leaves)], found[len(leaves) :]
        self.elements = sum(made) / len(made)


def close(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two gradients agree; None stands for zeros."""
    if a is None or b is None:
        return all(each is None or not each.any() for each in (a, b))
    return bool((a - b).norm() <= TOLERANCE * (a.norm() + b.norm()).clamp_min(1e-30)) or bool(
        a.isnan().any() and torch.equal(a.isnan(), b.isnan())
    )

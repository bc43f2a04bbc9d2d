"""A choice from a large product of options in which every two values still meet."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from heapq import heapify, heappop, heappush
from itertools import combinations, cycle, product
from typing import Any, TypeVar

Row = TypeVar("Row")


def itself(row: Row) -> Row:
    return row


def every_pair(
    rows: Iterable[Row], options: Callable[[Row], Iterable[Hashable]] = itself, together: int = 2
) -> list[Row]:
    """Rows such that each two values that occur together in any of the given rows, in the same
    columns, occur together in one that is chosen.

    The choice is the same at every call: the row with the most pairs that no row before it has, and
    among several the first.

    Args:
        rows: such as ``itertools.product`` makes them, less the combinations that cannot be.
        options: takes a row to its values, one for each column.
        together: how many values are to occur together: 3 for every three.
    """
    rows = list(rows)
    met = [set(combinations(enumerate(options(row)), together)) for row in rows]
    missing = set().union(*met)
    heap = [(-len(tuples), i) for i, tuples in enumerate(met)]
    heapify(heap)
    chosen = []
    while missing:
        promised, i = heappop(heap)
        new = met[i] & missing
        if len(new) == -promised:
            missing -= new
            chosen.append(i)
        elif new:
            heappush(heap, (-len(new), i))
    return [rows[i] for i in sorted(chosen)]


def each_with(
    names: Iterable[str],
    *others: Iterable[Any],
    options: Callable[[str], Iterable[Hashable]],
    together: int = 2,
) -> list[tuple]:
    """Every name, with other options: as :func:`every_pair` of all of them, and the names that this
    leaves out.

    Args:
        options: takes a name to the options that it stands for.
    """
    names, others = list(names), [list(each) for each in others]
    chosen = every_pair(product(names, *others), lambda row: (*options(row[0]), *row[1:]), together)
    there = {name for name, *_ in chosen}
    rest = zip((name for name in names if name not in there), cycle(product(*others)), strict=False)
    return chosen + [(name, *values) for name, values in rest]

"""A memory budget: which values a training step keeps though backward could recompute them.

A step is a list of units in the order of forward: the calls of its neurons. Of each unit some bytes
stay until its backward, more stand while it runs, and some values could be kept. Backward frees the
last units first, so what unit u holds meets what all units before it hold:

    stays[0] + kept[0] + ... + stays[u] + kept[u] + standing[u] + later gradients  <=  peak

What a unit keeps therefore costs nothing as long as this holds for the unit and all that follow. So
late units, whose layers are often small, keep values under the peak that an early, large unit
makes. The plan takes the values that save most work for their bytes, and of equal ones the last.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

LEAST, PEAK, HOST = "least", "peak", "host"
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9} | {
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
}
AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(%|" + "|".join(UNITS) + "|)")
WRONG = (
    "memory_budget must be 'least', 'peak', 'host', a number of bytes, an amount such as '2 GiB',"
    " or a share of the device's memory such as '60%', got {!r}"
)
# How many times the bytes of a unit's largest tensor stand while forward or backward run through
# it: the fewest, by which a peak is estimated, and the most, by which the room under it is.
FEWEST, MOST = 3, 4
MOST_WEIGHED = 24  # values of which all choices are weighed
Choice = tuple[int, int]  # a unit, and which of its values


class Value(NamedTuple):
    """A value that could be kept.

    Attributes:
        nbytes: its size.
        work: what keeping it saves, as the bytes that could be moved in the same time.
    """

    nbytes: int
    work: float


@dataclass(slots=True)
class Unit:
    """A call of a neuron, as a step was seen to make it.

    Attributes:
        stays: the bytes that the unit holds from its forward to its backward in any case.
        largest: the bytes of the largest tensor on the way to the neuron.
        values: what could be kept, in the order in which it is met.
        gradients: the bytes of the weights' gradients that the unit's backward makes first.
    """

    stays: int
    largest: int
    values: list[Value]
    gradients: int = 0


class Plan(NamedTuple):
    """What a step keeps.

    Attributes:
        kept: for each unit, whether each of its values is kept.
        least: the estimated peak of the step in bytes, if nothing were kept.
        kept_bytes: of all values that are kept.
    """

    kept: tuple[tuple[bool, ...], ...]
    least: int
    kept_bytes: int


def check_budget(budget: object) -> None:
    """Check a memory budget.

    Raises:
        ValueError: it is none.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | float | str):
        raise ValueError(WRONG.format(budget))
    if isinstance(budget, str):
        known = budget in (LEAST, PEAK, HOST)
        if not known and AMOUNT.fullmatch(budget) is None:
            raise ValueError(WRONG.format(budget))
    elif not budget > 0:
        raise ValueError(WRONG.format(budget))


def bytes_of(budget: float | str, device_bytes: int) -> float | None:
    """A memory budget in bytes; None for ``"peak"``, whose number follows from the step.

    Args:
        budget: it; any but ``"least"``.
        device_bytes: the memory of the device, for a share of it.

    >>> [bytes_of(each, device_bytes=1000) for each in (5, "7", "2 KiB", "60%", "host")]
    [5, 7.0, 2048.0, 600.0, inf]
    """
    if not isinstance(budget, str):
        return budget
    if budget in (PEAK, HOST):
        return None if budget == PEAK else float("inf")
    number, unit = AMOUNT.fullmatch(budget).groups()
    return float(number) * (device_bytes / 100 if unit == "%" else UNITS[unit or "B"])


def plan_of(units: Sequence[Unit], limit: float | None) -> Plan:
    """Plan what a step keeps.

    Args:
        units: in the order of forward.
        limit: the bytes that the step may hold at its peak; None for the peak that it has anyway.

    Returns:
        The plan. It keeps nothing where the limit is below the peak that the step has anyway.
    """
    least, room = _room(units, limit)
    chosen = _best(units, room)
    if chosen is None:
        chosen = _by_work_per_byte(units, room)
    kept = tuple(
        tuple((u, i) in chosen for i in range(len(unit.values))) for u, unit in enumerate(units)
    )
    return Plan(kept, least, sum(units[u].values[i].nbytes for u, i in chosen))


def _best(units: Sequence[Unit], room: Sequence[float]) -> set[Choice] | None:
    """The values that save most work; None where there are too many to weigh all choices."""
    if sum(len(each.values) for each in units) > MOST_WEIGHED:
        return None
    # Of all choices so far those that no other one beats in bytes and in work, fewest bytes first.
    choices: list[tuple[int, float, tuple[Choice, ...]]] = [(0, 0.0, ())]
    for u, unit in enumerate(units):
        for i, value in enumerate(unit.values):
            more = [(n + value.nbytes, w + value.work, (*c, (u, i))) for n, w, c in choices]
            merged = sorted(
                [*choices, *(each for each in more if each[0] <= room[u])],
                key=lambda each: (each[0], -each[1]),
            )
            choices, most = [], -1.0
            for each in merged:
                if each[1] > most:
                    choices.append(each)
                    most = each[1]
    return set(choices[-1][2])


def _by_work_per_byte(units: Sequence[Unit], room: list[float]) -> set[Choice]:
    """The values that save most work per byte, one after the other as long as there is room."""
    order = [
        (value.work / max(value.nbytes, 1), u, i)
        for u, unit in enumerate(units)
        for i, value in enumerate(unit.values)
        if value.work > 0
    ]
    order.sort(reverse=True)
    taken = _Prefixes(room)
    return {(u, i) for _, u, i in order if taken.take(u, units[u].values[i].nbytes)}


def _room(units: Sequence[Unit], limit: float | None) -> tuple[int, list[float]]:
    """The peak of a step that keeps nothing, and how many bytes the units up to each one may
    keep."""
    held, stays, least = 0, [], 0
    for each in units:
        held += each.stays
        stays.append(held)
        least = max(least, held + FEWEST * each.largest)
    peak, gradients, room = least if limit is None else limit, 0, []
    bound = float("inf")  # what an earlier unit keeps stands at later ones, too
    for held, each in zip(reversed(stays), reversed(units), strict=True):
        gradients += each.gradients
        bound = min(bound, peak - held - gradients - MOST * each.largest)
        room.append(bound)
    return least, room[::-1]


class _Prefixes:
    """Amounts at positions, under a bound for the sum of those up to each position.

    Args:
        bounds: not falling from one position to the next.
    """

    def __init__(self, bounds: list[float]) -> None:
        self.size = 1 << max(len(bounds) - 1, 0).bit_length()
        # A tree over the positions: of each node the sum below it, and the least bound less the sum
        # up to that position from the node's first one.
        self.sums = [0.0] * (2 * self.size)
        self.slack = [float("inf")] * (2 * self.size)
        self.slack[self.size : self.size + len(bounds)] = bounds
        for node in range(self.size - 1, 0, -1):
            self.slack[node] = min(self.slack[2 * node], self.slack[2 * node + 1])

    def take(self, position: int, amount: float) -> bool:
        """Add an amount, if no bound is exceeded by it; whether it was."""
        if self.slack[1] < amount and self._slack_from(position) < amount:
            return False
        node = position + self.size
        self.sums[node] += amount
        self.slack[node] -= amount
        while node > 1:
            node >>= 1
            left, right = 2 * node, 2 * node + 1
            self.sums[node] = self.sums[left] + self.sums[right]
            self.slack[node] = min(self.slack[left], self.slack[right] - self.sums[left])
        return True

    def _slack_from(self, position: int) -> float:
        """The least slack of all positions from this one on."""
        node = position + self.size
        slack = self.slack[node]
        before = 0.0  # the sum of all positions before those of ``node``
        path = []
        while node > 1:
            path.append(node)
            node >>= 1
        for node in reversed(path):
            if node & 1:
                before += self.sums[node - 1]
        slack -= before
        for node in path:
            if node & 1:
                before -= self.sums[node - 1]
            else:
                slack = min(slack, self.slack[node + 1] - before - self.sums[node])
        return slack

"""The choice from a product of options, which other tests rely on."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from pairs import every_pair


def met(rows: list[tuple], together: int) -> set[tuple]:
    return {each for row in rows for each in combinations(enumerate(row), together)}


@pytest.mark.parametrize(("together", "at_most"), [(2, 20), (3, 60)])
def test_all_that_can_meet_does(together: int, at_most: int) -> None:
    rows = [row for row in product("abc", "def", (False, True), range(4)) if row[:2] != ("a", "d")]
    chosen = every_pair(rows, together=together)
    assert met(chosen, together) == met(rows, together)
    assert len(chosen) <= at_most < len(rows)
    assert chosen == every_pair(rows, together=together)


def test_a_row_may_be_told_by_other_names() -> None:
    names = ["soft detached", "soft kept", "hard detached", "hard kept", "hard kept"]
    assert every_pair(names, str.split) == names[:4]

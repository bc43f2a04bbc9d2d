"""The results as a page of Markdown: a table for each part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from .case import FAILED, OUTCOMES, Finding
from .parts import PARTS


def page_of(findings: Sequence[Finding], quick: bool) -> str:
    """A page of what was found."""
    counts = Counter(each.outcome for each in findings)
    summary = ", ".join(f"{counts[each]} {each}" for each in OUTCOMES if counts[each])
    lines = ["# Acceptance", "", f"Results: {summary or 'none'}."]
    if quick:
        lines += ["", "In small (`--quick`): this shows that the code runs, and measures nothing."]
    for name, part in PARTS.items():
        found = [each for each in findings if each.case.part == name]
        if found:
            lines += ["", f"## {name}: {part.title}", "", *_table(found)]
    return "\n".join((*lines, ""))


def _table(findings: Sequence[Finding]) -> Iterable[str]:
    """A row for each finding, a column for each figure that there is."""
    rows = [each.texts() for each in findings]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    yield f"| subject | way | T | batch | result | {' | '.join((*columns, 'why'))} |"
    yield "|" + " --- |" * (len(columns) + 6)
    for each, row in zip(findings, rows, strict=True):
        case = each.case
        sizes = (str(size or "") for size in (case.time_steps, case.batch))
        outcome = f"**{each.outcome}**" if each.outcome == FAILED else each.outcome
        cells = (case.subject, case.way, *sizes, outcome, *(row.get(name, "") for name in columns))
        yield f"| {' | '.join(_escaped(cell) for cell in (*cells, each.why))} |"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")

"""All cases of the chosen parts, one after another; results are written as they come."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

from .case import FAILED, LATE, QUICK, Case, Finding, Findings, Sizes
from .page import page_of
from .parts import PARTS
from .process import in_a_fresh_process, in_this_process


def run(
    say: Callable[[str], None],
    device: str,
    out: Path,
    quick: bool = False,
    parts: Iterable[str] = PARTS,
    examined: Callable[[Case], Findings] | None = None,
) -> bool:
    """Examine all cases of some parts; write ``acceptance.jsonl``, a line for each finding as soon
    as it is there, and ``acceptance.md`` after each part.

    Args:
        say: takes a line to read for every finding.
        device: where.
        out: the folder of the two files.
        quick: in small.
        parts: keys of :data:`.parts.PARTS`.
        examined: examines a case; by default :func:`.process.in_a_fresh_process`, and in small
            :func:`.process.in_this_process`.

    Returns:
        Whether nothing failed.
    """
    examined = examined or (in_this_process if quick else in_a_fresh_process)
    out.mkdir(parents=True, exist_ok=True)
    findings: list[Finding] = []
    with (out / "acceptance.jsonl").open("w") as lines:
        for name in parts:
            for found in _within(name, QUICK if quick else Sizes(), device, examined):
                findings.append(found)
                lines.write(json.dumps(asdict(found)) + "\n")
                lines.flush()
                say(str(found))
            (out / "acceptance.md").write_text(page_of(findings, quick))
    return all(each.outcome != FAILED for each in findings)


def _within(name: str, sizes: Sizes, device: str, examined: Callable[[Case], Findings]) -> Findings:
    """The findings of a part, within its time."""
    part = PARTS[name]
    end = time.monotonic() + part.seconds
    for case in part.cases(sizes, device):
        left = min(part.seconds_of_case, end - time.monotonic())
        if left <= 0:
            yield case.found(LATE, why="the part's time is over")
        else:
            yield from examined(replace(case, seconds=left))

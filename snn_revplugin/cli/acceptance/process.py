"""A case in a process of its own, within its time: ``python -m
snn_revplugin.cli.acceptance.process CASE`` prints what it finds, a line of JSON each.

An error of a peer or of the host is no failure of ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from ..workloads import HOST
from .case import ABSENT, FAILED, LATE, Case, Finding, Findings
from .floor import COMPILED
from .parts import PARTS
from .works import CHECKPOINT, MEMOPT

PEERS = (COMPILED, CHECKPOINT, *MEMOPT)
INTERPRETED = {"TRITON_INTERPRET": "1"}  # kernels without a GPU


def in_a_fresh_process(case: Case) -> Findings:
    """What a case finds; and why it ended, if it did not come to its end."""
    command = sys.executable, "-m", __name__, json.dumps(asdict(case))
    environment = os.environ | (INTERPRETED if case.part == "kernels" and not case.on_cuda else {})
    is_late = threading.Event()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):

        def stop() -> None:
            is_late.set()
            process.kill()

        alarm = threading.Timer(case.seconds, stop)
        alarm.start()
        try:
            for line in process.stdout:
                yield _finding_of(json.loads(line))
            code = process.wait()
        finally:
            alarm.cancel()
            process.kill()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [f"exit code {code}"])[-1]
    if is_late.is_set():
        yield case.found(LATE, why=f"stopped after {case.seconds:.0f} s")
    elif code:
        yield case.found(_outcome_of_error(case), why=last)


def in_this_process(case: Case) -> Findings:
    """The same without a limit of time and without a fresh memory, but for kernels on a CPU: their
    interpreter has to be asked for before the library is imported."""
    yield from (in_a_fresh_process if case.part == "kernels" else examine)(case)


def _outcome_of_error(case: Case) -> str:
    return ABSENT if case.way == HOST or case.way in PEERS else FAILED


def _finding_of(line: dict[str, Any]) -> Finding:
    return Finding(**(line | {"case": Case(**line["case"])}))


def examine(case: Case) -> Iterator[Finding]:
    """What a case finds, in this process."""
    try:
        yield from PARTS[case.part].examine(case)
    except torch.OutOfMemoryError:
        yield case.found(ABSENT, why="out of memory")
    except Exception as error:
        message = str(error).partition("\n")[0]
        yield case.found(_outcome_of_error(case), why=f"{type(error).__name__}: {message}")


if __name__ == "__main__":
    lines = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # libraries may print
        for each in examine(Case(**json.loads(sys.argv[1]))):
            print(json.dumps(asdict(each)), file=lines, flush=True)

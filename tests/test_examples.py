"""The scripts of ``examples/``: those for snnTorch as they stand, and with their neurons swapped
while they run; those with neurons of one's own, which train both nets themselves."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from snn_revplugin.cli.script import SwapOnRegistration
from snn_revplugin.report.explain import Explanation

EXAMPLES = Path(__file__).parent.parent / "examples"
ARGUMENTS = ["--iterations", "3", "--time-steps", "6", "--batch", "20"]
ITERATION = re.compile(r"^iteration \d+: loss (.*)$", re.MULTILINE)
SCRIPTS = sorted(
    each.stem for each in EXAMPLES.glob("snntorch_*.py") if each.stem != "snntorch_digits"
)


@pytest.fixture
def _as_a_program(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "argv", ["example", *ARGUMENTS])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for shared in ("digits", "both"):
        sys.modules.pop(shared, None)


CUSTOM = sorted(each.stem for each in EXAMPLES.glob("neuron_*.py"))
MEMORY = re.compile(r"^retained: (\d+) KiB, converted (\d+) KiB$", re.MULTILINE)


def output_of(script: str) -> str:
    printed = StringIO()
    with redirect_stdout(printed):
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    return printed.getvalue()


def swapped(script: str) -> tuple[str, Explanation]:
    with SwapOnRegistration() as swaps:
        printed = output_of(script)
    return printed, swaps.explain()


def losses(printed: str) -> list[float]:
    return [float(each) for line in ITERATION.findall(printed) for each in line.split(" and ")]


@pytest.mark.usefixtures("_as_a_program")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_with_its_neurons_swapped(script: str) -> None:
    """The same losses to rounding (three steps of the optimiser let it grow), every neuron
    reversible, nothing in the way."""
    host, (ours, explanation) = output_of(script), swapped(script)
    assert len(losses(host)) >= 3
    assert losses(ours) == pytest.approx(losses(host), rel=2e-4, abs=1e-5)
    assert explanation.rows
    for row in explanation.rows:
        assert row.calls > 0, row
        assert not row.boundaries, row
        assert not row.left, row
        assert set(row.reasons) <= {"no gradient is recorded"}, row


@pytest.mark.usefixtures("_as_a_program")
@pytest.mark.parametrize("script", CUSTOM)
def test_a_script_with_a_neuron_of_its_own(script: str) -> None:
    """The converted net has the losses of the other one, in less memory."""
    printed = output_of(script)
    both = losses(printed)
    assert len(both) == 2 * 3
    assert both[1::2] == pytest.approx(both[::2], rel=1e-5)
    assert both[0] != both[2], "nothing was learned"
    assert "0 left" in printed and ", by its own step" in printed
    ((host, ours),) = MEMORY.findall(printed)
    assert int(host) > 4 * int(ours)


def test_the_neurons_of_ones_own_are_those_that_are_documented() -> None:
    assert CUSTOM == ["neuron_adaptive_threshold", "neuron_learned_leak", "neuron_plain_cell"]


def test_every_kind_of_network_has_its_script() -> None:
    named = {
        "quickstart",
        "feedforward",
        "events",
        "population",
        "regression",
        "autoencoder",
        "forward_forward",
    }
    assert {script.removeprefix("snntorch_") for script in SCRIPTS} >= named

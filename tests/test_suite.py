"""``snn-revplugin bench --suite gpu``: its code runs, in small and on a CPU. What a GPU would show
is not tested here."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from snn_revplugin.cli import suite
from snn_revplugin.cli.app import app
from snn_revplugin.cli.workloads import HOST, OURS

WORK = suite.Case("work", "digits-spikingjelly", OURS, 2, 2, "cpu", 1)
pytestmark = pytest.mark.filterwarnings("ignore")  # those of compilers and of memopt


def measured(case: suite.Case) -> dict:
    """In this process, and without a compiler, so that the test is short."""
    if case.way == suite.COMPILED:
        return {"why": "left out"}
    try:
        return suite.measure(case)
    except RuntimeError as error:
        return {"why": str(error)}


def test_in_small(tmp_path: Path) -> None:
    lines: list[str] = []
    suite.run(lines.append, "cpu", tmp_path, quick=True, measured=measured)
    with (tmp_path / "gpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["work"], row["neurons"], row["metric"]): float(row["p50"]) for row in rows}
    for way in (HOST, OURS):
        assert found["lif_kernel", way, "forward_over_floor"] > 0
        assert found["lif_kernel", way, "copy_bandwidth"] > 1e6
    for work in ("digits-snntorch", "digits-spikingjelly"):
        assert found[work, OURS, "retained"] < found[work, suite.CHECKPOINT, "peak"]
        assert found[work, OURS, "retained"] < found[work, HOST, "retained"]
        for axis in ("time_steps", "batch"):
            assert found[work, OURS, f"largest_{axis}"] >= found[work, HOST, f"largest_{axis}"]
    assert ("digits-spikingjelly", "memopt level 1", "step") in found
    assert any("memopt level 4: not measured" in line for line in lines)
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


def test_a_case_in_a_process_of_its_own() -> None:
    fit = replace(WORK, part="fit")
    assert suite.in_a_fresh_process(replace(fit, limit=1)) == {"fits": False}
    missing = suite.in_a_fresh_process(replace(fit, work="nowhere"))
    assert "nowhere" in missing["why"]


def test_every_way_computes_the_hosts_gradients() -> None:
    gradients = {}
    for way in (HOST, OURS, suite.CHECKPOINT):
        for work in ("digits-snntorch", "digits-spikingjelly"):
            case = replace(WORK, way=way, work=work)
            net = suite.net_of(case)
            case.setup.loss(net, case.setup.data()).backward()
            gradients.setdefault(work, []).append(
                [each.grad for each in net.parameters() if each.grad is not None]
            )
    for host, *others in gradients.values():
        for other in others:
            for a, b in zip(host, other, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * a.abs().max().item())


@pytest.mark.parametrize("largest", [0, 1, 2, 5, 37, 64])
def test_searching_for_what_fits(largest: int) -> None:
    def fits(case: suite.Case) -> dict:
        return {"fits": case.batch <= largest} if case.batch != 38 else {"why": "out of memory"}

    found = suite.largest_that_fits(WORK, "batch", 64, fits)
    assert found <= largest <= max(found * suite.CLOSE_ENOUGH, found)


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    result = CliRunner().invoke(app, ["bench", "--suite", "gpu"])
    assert result.exit_code == 2
    assert "needs a CUDA device" in result.output


def test_the_process_prints_one_line_of_json() -> None:
    command = (
        sys.executable,
        "-m",
        "snn_revplugin.cli.suite",
        json.dumps(asdict(replace(WORK, part="fit"))),
    )
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == {"fits": True}

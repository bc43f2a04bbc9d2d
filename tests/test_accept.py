"""``snn-revplugin accept``: its code runs, in small and on a CPU. What a GPU would show is in the
test that is marked for one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from snn_revplugin.cli.acceptance import case, fit, process, replay, works
from snn_revplugin.cli.acceptance.case import QUICK, Case, Finding, Sizes
from snn_revplugin.cli.acceptance.parts import PARTS
from snn_revplugin.cli.acceptance.run import run
from snn_revplugin.cli.app import app
from snn_revplugin.cli.workloads import HOST, OURS, WORKLOADS
from snn_revplugin.replay import HeldTensor

WORK = Case("works", "digits-spikingjelly", OURS, "cpu", 2, 2)
pytestmark = pytest.mark.filterwarnings("ignore")  # those of memopt


def test_in_small(tmp_path: Path) -> None:
    parts = ("environment", "steps", "fit")
    assert run(lambda line: None, "cpu", tmp_path, quick=True, parts=parts)
    lines = [json.loads(each) for each in (tmp_path / "acceptance.jsonl").open()]
    assert {each["case"]["part"] for each in lines} == set(parts)
    found = {(each["case"]["subject"], each["case"]["way"]): each for each in lines}
    for work in ("digits-snntorch", "digits-spikingjelly"):
        settings = found[f"{work}, settings", OURS]
        assert settings["outcome"] == case.PASSED
        assert settings["figures"]["gradient_error"] < 1e-5
        absent = found[f"{work}, synchronisation", OURS]
        assert (absent["outcome"], absent["why"]) == (case.ABSENT, case.NO_CUDA)
    largest = {way: found["digits-snntorch", way]["figures"] for way in (HOST, OURS)}
    assert largest[OURS]["largest_time_steps"] >= largest[HOST]["largest_time_steps"] > 0
    page = (tmp_path / "acceptance.md").read_text()
    assert all(f"## {name}: " in page for name in parts)
    assert "| digits-snntorch, settings | ours | 4 | 2 | passed |" in page


def test_every_part_has_cases_and_the_parts_fit_into_ten_minutes() -> None:
    for sizes in (Sizes(), QUICK):
        assert all(list(part.cases(sizes, "cpu")) for part in PARTS.values())
    assert sum(part.seconds for part in PARTS.values()) <= 600


@pytest.mark.parametrize("way", Sizes().precisions)
def test_every_operation_is_recomputed_in_backward(way: str) -> None:
    found = list(replay.examine(Case("replay", "every operation", way, "cpu")))
    assert all(each.outcome in (case.PASSED, case.ABSENT) for each in found), [*map(str, found)]
    assert len(found) == 1 or all(each.figures["off"] == 0.0 for each in found)


@pytest.mark.gpu
@pytest.mark.parametrize("way", Sizes().precisions)
def test_every_operation_is_recomputed_in_backward_on_a_gpu(way: str) -> None:
    found = list(replay.examine(Case("replay", "every operation", way, "cuda")))
    assert all(each.outcome == case.PASSED for each in found), [*map(str, found)]


def test_an_operation_that_is_off_or_kept_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not equal at the second call: as a library that takes another algorithm in backward."""
    monkeypatch.setattr(
        replay, "attach_recipes", lambda outputs, record: HeldTensor(outputs * 1.001)
    )
    found = replay.compare_operation(Case("replay", "", "float32", "cpu"), "relu")
    assert found.outcome == case.FAILED
    assert found.figures["off"] == pytest.approx(1e-3, rel=1e-2)
    assert found.figures["host_off"] == 0
    monkeypatch.setattr(replay, "attach_recipes", lambda outputs, record: None)
    found = replay.compare_operation(Case("replay", "", "float32", "cpu"), "relu")
    assert found.outcome == case.FAILED and "kept" in found.why


@pytest.mark.parametrize("work", ["digits-snntorch", "digits-spikingjelly"])
def test_ours_agree_with_the_host_at_each_budget(work: str) -> None:
    found = list(works.agreements(replace(WORK, subject=work, way=works.AGREEMENT)))
    assert len(found) == len(works.BUDGETS)
    for each in found:
        assert each.outcome == case.PASSED, str(each)
        assert each.figures["host_gradient_error"] < 1e-6


@pytest.mark.parametrize("work", ["digits-snntorch", "digits-spikingjelly", "sew_resnet18"])
def test_checkpoints_compute_the_hosts_gradients(work: str) -> None:
    gradients = []
    for way in (HOST, works.CHECKPOINT):
        each = replace(WORK, way=way, subject=work)
        net = works.net_of(each)
        each.setup.loss(net, each.setup.data()).backward()
        gradients.append([each.grad for each in net.parameters() if each.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * a.abs().max().item())


def test_memory_of_every_way() -> None:
    ways = (HOST, OURS, works.CHECKPOINT, "memopt level 1")
    held = {way: works.measured(replace(WORK, way=way)).figures["retained_bytes"] for way in ways}
    assert max(held, key=held.__getitem__) == HOST
    assert held[OURS] < held[HOST] / 2


def test_memory_at_each_budget() -> None:
    figures = {
        budget: works.measured(replace(WORK, time_steps=8, batch=16, way=way)).figures
        for way, budget in works.BUDGETS.items()
    }
    assert figures["least"]["retained_bytes"] <= figures["peak"]["retained_bytes"]
    assert figures["peak"]["retained_bytes"] < figures["host"]["retained_bytes"]
    halfway = figures[works.HALFWAY]
    assert figures["least"]["retained_bytes"] < halfway["retained_bytes"]
    assert halfway["peak_bytes"] <= halfway["budget_bytes"] < figures["host"]["peak_bytes"]


def test_a_case_in_a_process_of_its_own() -> None:
    (found,) = process.in_a_fresh_process(replace(WORK, part="fit", batch=0, limit=1, longest=2))
    assert found.figures == {"largest_batch": 0}
    (found,) = process.in_a_fresh_process(replace(WORK, seconds=0.05))
    assert found.outcome == case.LATE


def test_an_error_of_the_host_is_no_failure_of_ours() -> None:
    for way, outcome in ((OURS, case.FAILED), (HOST, case.ABSENT)):
        (found,) = process.examine(replace(WORK, subject="nowhere", way=way))
        assert found.outcome == outcome and "nowhere" in found.why


def test_memopt_that_needs_a_gpu_is_no_failure() -> None:
    (found,) = process.examine(replace(WORK, way="memopt level 4"))
    assert found.outcome == case.ABSENT and "CUDA" in found.why


def test_results_are_written_as_they_come_and_a_failure_is_told(tmp_path: Path) -> None:
    seen = []

    def examined(each: Case) -> Iterator[Finding]:
        seen.append((tmp_path / "acceptance.jsonl").read_text().count("\n"))
        yield each.found(case.FAILED if each.way == OURS else case.PASSED)

    assert not run(lambda line: None, "cpu", tmp_path, True, ("steps",), examined)
    assert seen == [0, 1, 2, 3]
    assert "2 passed, 2 failed" in (tmp_path / "acceptance.md").read_text()


@pytest.mark.parametrize("largest", [0, 1, 2, 5, 37, 64])
def test_searching_for_what_fits(largest: int) -> None:
    found, is_settled = fit.largest_that_fits(lambda size: size <= largest, 64, lambda: False)
    assert is_settled and found <= largest <= max(found * fit.CLOSE_ENOUGH, found)
    assert fit.largest_that_fits(lambda size: True, 64, lambda: True) == (0, False)


@pytest.mark.parametrize("name", ["spiking_resnet18", "sew_resnet18", "spikformer"])
def test_models_have_blocks(name: str) -> None:
    net = WORKLOADS[name].build(HOST)
    block = WORKLOADS[name].in_blocks(net)
    assert any(isinstance(each, block) for each in net.modules())


def test_the_command(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--part", "environment"]
    result = CliRunner().invoke(app, ["accept", *options])
    assert result.exit_code == 0, result.output
    assert "environment, versions: measured" in result.output
    assert "acceptance.md" in result.output
    if not torch.cuda.is_available():
        result = CliRunner().invoke(app, ["accept", "--out", str(tmp_path)])
        assert result.exit_code == 2 and "cannot compute on 'cuda'" in result.output

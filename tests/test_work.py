"""The works of the README: how much less they hold, and that nothing else changes."""

import runpy
from pathlib import Path

import pytest
import torch

from snn_revplugin.cli import comparison as cli_comparison
from snn_revplugin.cli.comparison import (
    Comparison,
    Row,
    Setup,
    compare,
    rows_of,
    steps_of,
    take_turns,
    write_csv,
)
from snn_revplugin.cli.demo import accuracy_of, train
from snn_revplugin.cli.workloads import COUPLED, HOST, OURS, WORKLOADS, digits


def assert_nothing_else_changed(comparison: Comparison, tolerance: float) -> None:
    assert comparison.spikes_equal
    assert comparison.potentials_equal
    assert comparison.gradient_error <= tolerance


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison takes no step to warm up either."""
    monkeypatch.setattr(cli_comparison, "take_turns", lambda steps, *_, **__: {})


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize(
    ("name", "time_steps", "batch", "retained", "peak"),
    [("csnn", 100, 32, 90, 45), ("csnn", 400, 4, 118, 82), ("vgg", 16, 4, 26, 3.2)],
)
def test_a_work_holds_so_many_times_less(
    name: str, time_steps: int, batch: int, retained: float, peak: float
):
    setup = Setup.usual(WORKLOADS[name], time_steps=time_steps, batch=batch)
    comparison = compare(setup, repeats=0)
    assert_nothing_else_changed(comparison, 2e-5)
    assert comparison.retained_ratio >= retained
    assert comparison.peak_ratio >= peak


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize(("name", "time_steps"), [("csnn", 100), ("vgg", 6)])
def test_gradients_agree_in_float64(name: str, time_steps: int):
    setup = Setup.usual(WORKLOADS[name], time_steps=time_steps, batch=2, dtype=torch.float64)
    comparison = compare(setup, repeats=0)
    assert_nothing_else_changed(comparison, 1e-10)
    assert comparison.retained_ratio > 1


@pytest.mark.parametrize(
    ("name", "time_steps", "epochs"), [("digits-snntorch", 6, 3), ("digits-spikingjelly", 4, 2)]
)
def test_the_digits_networks_reach_the_accuracy_of_the_host(
    name: str, time_steps: int, epochs: int
):
    setup = Setup.usual(WORKLOADS[name], time_steps=time_steps, batch=32)
    training, test = digits(setup.workload.image[-1])
    nets, _ = train(setup, training, epochs, sides=(HOST, OURS, COUPLED))
    accuracy = {whose: accuracy_of(setup, net, test) for whose, net in nets.items()}
    assert accuracy[HOST] > 0.9
    assert abs(accuracy[OURS] - accuracy[HOST]) <= 0.02
    assert accuracy[COUPLED] >= accuracy[HOST] - 0.02


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone(name: str):
    state = torch.get_rng_state()
    host, ours = WORKLOADS[name].build(HOST, seed=3), WORKLOADS[name].build(OURS, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(host.state_dict()) == list(ours.state_dict())
    assert all(map(torch.equal, host.state_dict().values(), ours.state_dict().values()))
    other = WORKLOADS[name].build(HOST, seed=4)
    assert not all(map(torch.equal, host.parameters(), other.parameters()))


def test_the_digits_are_split_without_overlap():
    training, test = digits(8)
    assert training.images.shape == (1348, 1, 8, 8)
    assert test.images.shape == (449, 1, 8, 8)
    assert len(training.classes) == 1348 and set(test.classes.tolist()) == set(range(10))
    assert training.images.min() >= 0 and training.images.max() <= 1
    rows = {tuple(each.flatten().tolist()) for each in training.images}
    assert (
        sum(tuple(each.flatten().tolist()) in rows for each in test.images) < 5
    )  # a few digits were drawn twice
    again, _ = digits(8)
    assert torch.equal(again.images, training.images)


def small(**choices: object) -> Setup:
    return Setup.usual(WORKLOADS["digits-snntorch"], **({"time_steps": 3, "batch": 2} | choices))


def test_a_comparison_sees_a_difference():
    comparison = compare(small(), repeats=0)
    assert_nothing_else_changed(comparison, 2e-5)
    other_weights = small(seed=1).net(OURS)

    class Different(Setup):
        def net(self, whose: str):
            return super().net(whose) if whose == HOST else other_weights

    setup = Different(**vars(small()))
    comparison = compare(setup, repeats=0)
    assert not comparison.potentials_equal
    assert comparison.gradient_error > 0.1


def test_the_benchmark_prints_a_cell_for_every_column():
    namespace = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "work.py"))
    comparison = compare(small(), repeats=1)
    cells = dict(
        zip(namespace["COLUMNS"], namespace["cells_of"]("work 0", comparison), strict=True)
    )
    assert cells["work"] == "work 0" and cells["T"] == "3"
    assert cells["spikes"] == cells["potentials"] == "equal"
    assert cells["host retained"].endswith("MiB") and cells["host step"].endswith("ms")


def test_functions_take_turns():
    order = []
    seconds = take_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, warm_ups=1
    )
    assert order == ["a", "b"] * 3
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 2, "b": 2}


def test_every_step_is_announced():
    taken = []
    compare(small(), repeats=2, on_step=lambda: taken.append(1))
    assert len(taken) == steps_of(2)


def test_rows_tell_how_they_were_measured(tmp_path):
    comparison = compare(small(seed=5), repeats=3)
    rows = rows_of(comparison)
    assert {(row.neurons, row.metric, row.unit) for row in rows} == {
        *(
            (whose, metric, "B")
            for whose in (HOST, OURS)
            for metric in ("retained", "peak", "left")
        ),
        *((whose, "step", "s") for whose in (HOST, OURS)),
        *((OURS, metric, "1") for metric in ("gradient_error", "spikes_equal", "potentials_equal")),
    }
    step = next(row for row in rows if row.metric == "step")
    assert 0 < step.p20 <= step.p50 <= step.p80
    assert (step.work, step.time_steps, step.batch, step.dtype, step.device, step.seed) == (
        "digits-snntorch", 3, 2, "float32", "cpu", 5,
    )  # fmt: skip
    assert f"torch={torch.__version__.partition('+')[0]}" in step.versions

    write_csv(rows, tmp_path / "rows.csv")
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert len(lines) == 1 + len(rows)
    assert lines[0].split(",") == list(Row.__dataclass_fields__)

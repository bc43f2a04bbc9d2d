"""The networks of snnTorch's tutorials that the benchmark measures: equal to the host's, smaller,
nothing in the way."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from snn_revplugin import explain
from snn_revplugin.cli.comparison import Setup, compare
from snn_revplugin.cli.workloads import OURS, Workload

MODELS = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "models_snntorch.py"))[
    "MODELS"
]


@pytest.mark.parametrize("workload", [pytest.param(each, id=each.name) for each, _ in MODELS])
def test_a_tutorials_network(workload: Workload) -> None:
    setup = Setup.usual(workload, time_steps=8, batch=2)
    comparison = compare(setup, repeats=0)
    assert comparison.spikes_equal and comparison.potentials_equal
    assert comparison.gradient_error <= 2e-5
    assert comparison.retained_ratio > 2
    net = setup.net(OURS)
    setup.loss(net, setup.data()).backward()
    rows = explain(net).rows
    assert rows and not any(row.boundaries or row.fallback_calls for row in rows)

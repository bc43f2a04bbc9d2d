"""The command line: what it prints, what it leaves, and that a script cannot tell that it is run by
it."""

import csv
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import snntorch
import torch
import torch.nn as nn
from snntorch import surrogate
from typer.testing import CliRunner, Result

from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.cli import demo
from snn_revplugin.cli.app import app
from snn_revplugin.cli.script import SwapOnRegistration
from snn_revplugin.cli.workloads import Batch, digits
from snn_revplugin.swap import module

SCRIPT = """
import sys

import snntorch
import torch
import torch.nn as nn
from spikingjelly.activation_based import functional, layer, neuron

import companion

print("arguments", sys.argv[1:], __name__)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3)
        self.leaky = snntorch.Leaky(beta=0.9)
        self.block = nn.Sequential(layer.Linear(24, 8), neuron.LIFNode(), layer.Linear(8, 3))
        self.unlike = snntorch.Alpha(0.9, 0.8)
        functional.set_step_mode(self.block, "m")

    def forward(self, x, time_steps):
        mem, spikes = self.leaky.reset_mem(), []
        for _ in range(time_steps):
            spike, mem = self.leaky(self.conv(x), mem)
            spikes.append(spike.flatten(1))
        return self.block(torch.stack(spikes))


def main():
    torch.manual_seed(0)
    net = Net()
    assert isinstance(net.leaky, snntorch.Leaky)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    x, y = torch.rand(4, 1, 8), torch.tensor([0, 1, 2, 0])
    for _ in range(3):
        functional.reset_net(net.block)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x, int(sys.argv[1])).mean(0), y)
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.5f}")


if __name__ == "__main__":
    main()
    companion.finish(sys.argv[2:])
"""
COMPANION = """
import sys


def finish(how):
    if how == ["raise"]:
        raise ArithmeticError("the script's own")
    if how == ["interrupt"]:
        raise KeyboardInterrupt
    if how:
        sys.exit(eval(how[0]))
"""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "companion.py").write_text(COMPANION)
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    yield path
    sys.modules.pop("companion", None)


def test_run_changes_nothing_that_a_script_prints(script: Path):
    plain = subprocess.run(
        [sys.executable, script, "6"], capture_output=True, text=True, check=True
    )
    result = invoke("run", script, "6")
    assert result.exit_code == 0
    assert result.stdout == plain.stdout
    assert "loss" in plain.stdout


def test_run_tells_what_every_neuron_kept_and_why(script: Path):
    report = invoke("run", script, "6").stderr
    assert "2 of 3 spiking neurons ran as reversible ones" in report
    assert "Net.leaky: RevLeaky\n  reversible: 18 calls, 18 time steps" in report
    assert "Net.block.1: RevLIFNode\n  reversible: 3 calls, 18 time steps" in report
    assert "Net.unlike: RevAlpha\n  never called" in report


@pytest.mark.parametrize(
    ("how", "code"),
    [("0", 0), ("7", 7), ("None", 0), ("'a message'", 1), ("raise", 1), ("interrupt", 130)],
)
def test_run_keeps_the_exit_code_and_reports_all_the_same(script: Path, how: str, code: int):
    result = invoke("run", script, "4", how)
    assert result.exit_code == code
    assert "2 of 3 spiking neurons ran as reversible ones" in result.stderr
    assert ("a message\n" in result.stderr) == (how == "'a message'")


def test_run_shows_the_traceback_of_the_script_and_nothing_of_its_own(script: Path):
    trace, _, _ = invoke("run", script, "4", "raise").stderr.partition("snn-revplugin:")
    assert trace.startswith("Traceback (most recent call last):")
    assert trace.rstrip().endswith("ArithmeticError: the script's own")
    assert str(script) in trace
    assert "runpy" not in trace


@pytest.mark.parametrize("how", ["0", "raise"])
def test_run_restores_everything(script: Path, how: str):
    before = list(sys.path), list(sys.argv), sys.modules["__main__"]
    invoke("run", script, "4", how)
    assert (sys.path, sys.argv, sys.modules["__main__"]) == before
    assert type(nn.Sequential(snntorch.Leaky(0.9))[0]) is snntorch.Leaky


def test_run_passes_options_on_to_the_script(tmp_path: Path):
    path = tmp_path / "echo.py"
    path.write_text("import sys\nprint(sys.argv)\n")
    result = invoke("run", path, "--help", "-x", "--", "--out", "y")
    assert result.stdout.strip() == str([str(path), "--help", "-x", "--", "--out", "y"])
    assert "no spiking neuron" in result.stderr


def test_run_of_no_script(tmp_path: Path):
    result = invoke("run", tmp_path / "missing.py")
    assert result.exit_code == 2
    assert "Invalid value for 'SCRIPT'" in result.output


def test_run_of_a_script_that_is_no_python(tmp_path: Path):
    path = tmp_path / "broken.py"
    path.write_text("def\n")
    result = invoke("run", path)
    assert result.exit_code == 1
    assert "SyntaxError" in result.stderr


def test_neurons_are_swapped_as_they_become_submodules_and_given_back():
    with SwapOnRegistration() as swaps:
        net = nn.Sequential(nn.Linear(2, 2), snntorch.Leaky(0.9, init_hidden=True))
        shared = nn.ModuleDict({"again": net[1]})
        loose = snntorch.Leaky(0.9)
        assert type(net[1]) is RevLeaky
        assert type(loose) is snntorch.Leaky
        net(torch.rand(3, 2)).sum().backward()
    assert type(net[1]) is type(shared["again"]) is snntorch.Leaky
    (row,) = swaps.explain().rows
    assert (row.kind, row.calls) == ("RevLeaky", 1)


def test_nets_of_the_same_class_are_told_apart_also_when_they_are_gone():
    with SwapOnRegistration() as swaps:
        for _ in range(2):
            nn.Sequential(nn.Sequential(snntorch.Leaky(0.9)))
    assert [row.name for row in swaps.explain().rows] == ["Sequential.0.0", "Sequential (2).0.0"]


def test_a_reversible_neuron_of_the_script_itself_is_reported_and_left_as_it_is():
    with SwapOnRegistration() as swaps:
        net = nn.Sequential(RevLeaky(beta=0.9))
    assert type(net[0]) is RevLeaky
    assert [row.name for row in swaps.explain().rows] == ["Sequential.0"]


def test_a_neuron_with_dynamics_of_its_own_goes_by_its_own_step():
    class Mine(snntorch.Leaky):
        def forward(self, input_, mem=None):
            return super().forward(2 * input_, mem)

    with SwapOnRegistration() as swaps:
        net = nn.Sequential(Mine(0.9))
    assert type(net[0]) is Mine  # again
    (row,) = swaps.explain().rows
    assert (row.kind, row.left) == ("RevMine", "")


@dataclasses.dataclass
class Unhashable(nn.Module):
    """A dataclass compares by its fields, so it has no hash."""

    scale: float

    def __post_init__(self) -> None:
        super().__init__()


class HashedByState(nn.Module):
    """As torchmetrics' metrics: the hash reads what the constructor has yet to set."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.states = [1, 2]

    def __hash__(self) -> int:
        return hash(tuple(self.states))

    def __eq__(self, other: object) -> bool:
        raise RecursionError("compared")


def test_modules_are_told_apart_by_identity():
    with SwapOnRegistration() as swaps:
        net = nn.Module()
        net.first, net.second = HashedByState(), HashedByState()
        net.plain, net.other = Unhashable(1.0), Unhashable(1.0)
        net.plain.leaky = snntorch.Leaky(0.9)
        net.other.leaky = snntorch.Leaky(0.9)
    assert [row.name for row in swaps.explain().rows] == [
        "Module.plain.leaky",
        "Module.other.leaky",
    ]
    assert type(net.plain.leaky) is snntorch.Leaky


def test_a_metric_as_a_submodule():
    torchmetrics = pytest.importorskip("torchmetrics")
    with SwapOnRegistration() as swaps:
        net = nn.Module()
        net.leaky = snntorch.Leaky(0.9)
        net.accuracy = torchmetrics.MetricCollection([torchmetrics.MeanMetric()])
    assert [row.name for row in swaps.explain().rows] == ["Module.leaky"]


def test_run_of_a_notebook_names_nbconvert(tmp_path: Path):
    path = tmp_path / "train.ipynb"
    path.write_text("{}")
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["run", str(path)])
    assert result.exit_code == 2
    assert "jupyter nbconvert --to script" in result.output


def test_run_of_a_directory(tmp_path: Path):
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["run", str(tmp_path)])
    assert result.exit_code == 2
    assert "is a directory" in result.output


def test_run_of_a_module(script: Path, monkeypatch: pytest.MonkeyPatch):
    package = script.parent / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "train.py").write_text(f"{SCRIPT}\nprint(__package__, sys.argv[0], sys.path[0])\n")
    monkeypatch.chdir(script.parent)
    arguments = ["-m", "package.train", "6"]
    plain = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    result = invoke("run", *arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == plain.stdout
    assert "2 of 3 spiking neurons ran as reversible ones" in result.stderr


def test_run_passes_options_on_to_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "echo_arguments.py").write_text("import sys\nprint(sys.argv[1:])\n")
    monkeypatch.chdir(tmp_path)
    result = invoke("run", "-m", "echo_arguments", "--help", "-x", "--", "--out", "y")
    assert result.stdout.strip() == str(["--help", "-x", "--", "--out", "y"])


@pytest.mark.parametrize("how", [["budget_of_run.py"], ["-m", "budget_of_run"]], ids=" ".join)
def test_run_under_a_memory_budget(
    how: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from snn_revplugin import get_settings\nprint(get_settings().memory_budget)\n"
    (tmp_path / "budget_of_run.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    assert invoke("run", "--memory-budget", "2 GiB", *how).stdout.strip() == "2 GiB"
    result = invoke("run", "--memory-budget", "plenty", *how)
    assert result.exit_code == 2
    assert "memory_budget must be" in result.output


def test_run_of_a_module_that_does_not_exist():
    result = invoke("run", "-m", "no_such_package.train")
    assert result.exit_code == 1
    assert result.stderr.startswith("snn-revplugin: ")
    assert "no_such_package" in result.stderr and "Traceback" not in result.stderr


def test_run_says_that_classes_were_swapped(script: Path):
    report = invoke("run", script, "6").stderr
    assert "the classes of 3 of them were swapped" in report
    assert "type(m) == ItsClass" in report


def test_run_counts_what_ran_reversibly():
    with SwapOnRegistration() as swaps:
        net = nn.Sequential(nn.Linear(2, 2), snntorch.Leaky(0.9, init_hidden=True))
        unused = nn.Sequential(snntorch.Leaky(0.9))
        with torch.no_grad():
            net(torch.rand(3, 2))
    assert swaps.report().startswith("snn-revplugin: 0 of 2 spiking neurons ran as reversible ones")
    assert "Sequential (2).0: RevLeaky\n  never called" in swaps.report()
    del unused


@pytest.mark.parametrize("has_compiler", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_run_tells_what_was_compiled(has_compiler: bool, monkeypatch: pytest.MonkeyPatch):
    """Also of a net that is gone; with an older torch the host's path is compiled."""
    if has_compiler and not module.HAS_COMPILER:
        pytest.skip(f"operators need torch {module.OLDEST_COMPILER}")
    monkeypatch.setattr(module, "HAS_COMPILER", has_compiler)
    torch.compiler.reset()

    def train() -> None:
        net = nn.Sequential(
            nn.Linear(2, 2),
            snntorch.Leaky(0.9, init_hidden=True, spike_grad=surrogate.atan()),
        )
        net[1].reset_mem()
        torch.compile(net, backend="eager")(torch.rand(3, 2)).sum().backward()

    with SwapOnRegistration() as swaps:
        train()
    count, line = (1, "compiled, as an operator") if has_compiler else (0, "on the host's own path")
    assert swaps.report().startswith(f"snn-revplugin: {count} of 1 spiking neurons ran")
    assert line in swaps.report()


def test_doctor_prints_versions_devices_and_what_is_supported():
    result = invoke("doctor")
    assert result.exit_code == 0
    for expected in (
        version("torch"),
        version("snntorch"),
        "RevLeaky",
        "RevParametricLIFNode",
        "cores",
    ):
        assert expected in result.stdout
    for expected in ("fast_sigmoid", "ATan", "convolution", "batch norm", "lost_bits"):
        assert expected in result.stdout


def test_bench_prints_a_table_and_writes_figures(tmp_path: Path):
    path = tmp_path / "figures.csv"
    result = invoke(
        "bench", "--net", "digits-spikingjelly", "-T", 3, "-N", 2, "--repeats", 2, "--csv", path
    )
    assert result.exit_code == 0
    assert "digits-spikingjelly: T 3, batch 2, float32 on cpu" in result.stdout
    assert "spikes equal bit for bit" in result.stdout
    rows = list(csv.DictReader(path.read_text().splitlines()))
    retained = {row["neurons"]: float(row["p50"]) for row in rows if row["metric"] == "retained"}
    assert retained["host"] > retained["ours"] > 0
    assert all(row["time_steps"] == "3" and row["batch"] == "2" for row in rows)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_bench_in_another_dtype(dtype: str):
    result = invoke(
        "bench", "--net", "digits-snntorch", "-T", 3, "-N", 2, "--repeats", 1, "--dtype", dtype
    )
    assert result.exit_code == 0
    assert f"{dtype} on cpu" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--net", "resnet"), "resnet"),
        (("-T", "0"), "-T"),
        (("--dtype", "int8"), "int8"),
        (("--device", "nowhere"), "cannot compute on 'nowhere'"),
    ],
)
def test_bench_refuses_what_it_cannot_measure(arguments: tuple[str, ...], message: str):
    result = invoke("bench", *arguments)
    assert result.exit_code == 2
    assert message in result.output


def first_digits(size: int, **options: int) -> list[Batch]:
    return [Batch(*(each[:96] for each in part)) for part in digits(size, **options)]


def test_demo_trains_both_networks_and_saves_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On the first of the digits; ``test_work.py`` trains on all of them."""
    monkeypatch.setattr(demo, "digits", first_digits)
    monkeypatch.setattr(demo, "NETS", dict.fromkeys(demo.NETS, (2, 4)))
    out = tmp_path / "a" / "out"
    result = invoke("demo", "--epochs", 1, "--out", out)
    assert result.exit_code == 0, result.output
    for expected in ("digits-snntorch", "digits-spikingjelly", "÷", "training"):
        assert expected in result.stdout
    assert result.stdout.count("the peak is in the") == 4
    for picture in ("memory", "layers-digits-snntorch", "layers-digits-spikingjelly"):
        assert (out / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    rows = csv.DictReader((out / "figures.csv").read_text().splitlines())
    assert {row["work"] for row in rows} == {"digits-snntorch", "digits-spikingjelly"}


@pytest.mark.parametrize("missing", ["typer", "rich", "matplotlib"])
def test_a_missing_extra_is_named(missing: str):
    program = (
        f"import sys; sys.modules[{missing!r}] = None; from snn_revplugin.cli import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.strip() == (
        f"snn-revplugin needs {missing}, which is not installed: pip install 'snn-revplugin[cli]'"
    )


def test_the_command_is_installed():
    result = subprocess.run(
        [Path(sys.executable).parent / "snn-revplugin", "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0
    for command in ("demo", "bench", "accept", "doctor", "run"):
        assert command in result.stdout

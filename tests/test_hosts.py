"""The core knows no host: adapters register what it calls, and what they change in a host's modules
is undone."""

from __future__ import annotations

import ast
import copy
import gc
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from hosts import only_pure
from spikingjelly.activation_based import base, layer, neuron

import snn_revplugin
from snn_revplugin import adapters
from snn_revplugin.adapters import snntorch as snntorch_adapter
from snn_revplugin.adapters import spikingjelly as spikingjelly_adapter
from snn_revplugin.swap.hosts import is_neuron
from snn_revplugin.swap.patches import Patch, Patches
from snn_revplugin.swap.table import known_swaps

PACKAGE = Path(snn_revplugin.__file__).parent
ADAPTERS = Path(adapters.__file__).parent  # beside the package in an editable installation
# The command line builds the hosts' networks and names the hosts there.
CORE = [
    each
    for each in sorted(PACKAGE.rglob("*.py"))
    if each.relative_to(PACKAGE).parts[0] not in ("adapters", "cli")
]
# Classes, attributes and packages of the hosts. (``Leaky`` is the name of our equations too.)
OF_A_HOST = re.compile(
    r"(?i:snntorch|spikingjelly)|\b(Base|SimpleBase|IF|LIF|ParametricLIF)Node\b"
    r"|\b(SpikingNeuron|MemoryModule|RevLeaky|step_mode|_memories|reset_mem|init_hidden)\b"
)


def words_of_code(path: Path) -> Iterator[tuple[int, str]]:
    """Names, attributes and strings of a file, docstrings and comments left out."""
    tree = ast.parse(path.read_text())
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    docstrings = {
        id(each.body[0].value)
        for each in ast.walk(tree)
        if isinstance(each, documented) and each.body and isinstance(each.body[0], ast.Expr)
    }
    for each in ast.walk(tree):
        if isinstance(each, ast.Constant) and isinstance(each.value, str):
            if id(each) not in docstrings:
                yield each.lineno, each.value
        elif isinstance(each, ast.Name):
            yield each.lineno, each.id
        elif isinstance(each, ast.Attribute):
            yield each.lineno, each.attr
        elif isinstance(each, ast.arg):
            yield each.lineno, each.arg
        elif isinstance(each, ast.Import | ast.ImportFrom):
            module = getattr(each, "module", None) or ""
            yield each.lineno, " ".join([module, *(name.name for name in each.names)])


class TestTheCore:
    def test_there_is_one(self) -> None:
        assert len(CORE) > 50

    def test_its_code_names_no_host(self) -> None:
        found = [
            f"{path.relative_to(PACKAGE)}:{line}: {word}"
            for path in CORE
            for line, word in words_of_code(path)
            if OF_A_HOST.search(word)
        ]
        assert found == []

    @pytest.mark.parametrize("host", ["snntorch", "spikingjelly"])
    def test_one_file_registers_the_hosts(self, host: str) -> None:
        assert f'register_adapter("{host}"' in (ADAPTERS / "__init__.py").read_text()

    def test_one_file_names_the_older_release_of_spikingjelly(self) -> None:
        files = ADAPTERS.glob("*.py")
        choices = {each.name: each.read_text().count("StatefulTransitions") for each in files}
        assert choices.pop("spikingjelly_0_0_0_0_14.py") == 1
        assert choices.pop("spikingjelly.py") == 2  # imported and chosen
        assert set(choices.values()) == {0}


# --------------------------------------------------------------------- neurons that are not swapped


class Counts(base.MemoryModule):
    """A user's neuron with a state and a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_memory("count", 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count = self.count + x
        return (self.count > 1).to(x)


def left(reason: str, *, name: str, **options: Any) -> Any:
    """A case of a neuron that not every release of SpikingJelly has."""
    has_it = pytest.mark.skipif(not hasattr(neuron, name), reason=f"this release has no {name}")
    return pytest.param(name, lambda: getattr(neuron, name)(**options), reason, marks=has_it)


LEFT = [
    left("learns online: no graph connects its steps", name="OTTTLIFNode"),
    ("Counts", Counts, "overrides forward"),
]


@pytest.mark.parametrize(("name", "make", "reason"), LEFT)
def test_every_stateful_neuron_that_is_left_is_named(name: str, make: Any, reason: str) -> None:
    net = nn.Sequential(nn.Linear(3, 3), make())
    left = snn_revplugin.convert(net).left["1"]
    assert name in left and reason in left
    (row,) = snn_revplugin.explain(net).rows
    assert row.left == left


@pytest.mark.parametrize(
    "make", [nn.ReLU, lambda: layer.Dropout(0.5), lambda: layer.Linear(2, 2), nn.LSTMCell]
)
def test_other_modules_are_no_neurons(make: Any) -> None:
    assert not is_neuron(make(2, 2) if make is nn.LSTMCell else make())


def test_a_single_neuron_is_counted_in_the_singular() -> None:
    report = snn_revplugin.convert(snn.Leaky(0.9))
    assert str(report).startswith("1 neuron swapped, 0 left\n")


# --------------------------------------------------------------------------------------- signatures


def shown(kind: type) -> list[str]:
    return list(inspect.signature(kind).parameters)


@pytest.mark.parametrize("swap", known_swaps(), ids=lambda swap: swap.reversible.__name__)
def test_a_signature_shows_the_hosts_arguments(swap: Any) -> None:
    theirs, ours = (inspect.signature(each).parameters for each in (swap.host, swap.reversible))
    assert list(ours) == [*theirs, "reversible"]
    assert all(ours[name] == theirs[name] for name in theirs)
    assert ours["reversible"].default is True


@pytest.mark.parametrize(
    "kind", [snntorch_adapter.CoupledLeaky, spikingjelly_adapter.CoupledLIFNode]
)
def test_a_coupled_neuron_shows_its_own_arguments(kind: type) -> None:
    assert {"tau", "alpha", "beta", "split_dim"} < set(shown(kind))
    assert shown(kind)[-1] == "reversible"


def test_signatures_of_subclasses_and_instances() -> None:
    class Labelled(snn.Leaky):
        def __init__(self, label: str, **others: Any) -> None:
            super().__init__(beta=0.9, **others)

    class Ours(snntorch_adapter.RevLeaky):
        def __init__(self, label: str) -> None:
            super().__init__(beta=0.9)

    labelled = Labelled("a")
    snn_revplugin.convert(labelled)
    assert shown(type(labelled)) == ["label", "reversible", "others"]
    assert shown(Ours) == ["label"]
    assert "beta" not in inspect.signature(labelled).parameters  # those of a call


# ------------------------------------------------------------------------------------------ patches


def tool_of(kind: str) -> tuple[Any, str]:
    """The owner and the name of a function of a host's that is patched."""
    if kind == "snntorch":
        return importlib.import_module("snntorch.export_nir"), "_extract_snntorch_module"
    package = "spikingjelly.activation_based"
    if kind == "nir":
        return importlib.import_module(f"{package}.nir_exchange.to_nir")._ModuleMapper, "map_dict"
    return importlib.import_module(f"{package}.precision.api"), "_configure_triton_neurons"


@pytest.fixture
def no_neurons(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Other tests' neurons, which the hosts themselves may hold for ever, do not count."""
    both = snntorch_adapter.NIR_REFUSAL, spikingjelly_adapter.RevLIFNode.tool_patches
    held = [dict(each._holders) for each in both]
    for each in both:
        each._holders.clear()
        each.release(object())
    yield
    for each, neurons in zip(both, held, strict=True):
        for one in neurons.values():
            each.hold(one)


@pytest.mark.usefixtures("no_neurons")
class TestPatches:
    def test_snntorchs_exporter(self) -> None:
        pytest.importorskip("nir")
        owner, name = tool_of("snntorch")
        original = getattr(owner, name)
        made = snntorch_adapter.CoupledLeaky()
        assert getattr(owner, name) is not original
        snn_revplugin.restore(made)
        assert getattr(owner, name) is not original  # a coupled neuron is left
        del made
        snn.SpikingNeuron.instances.pop()
        gc.collect()  # a neuron refers to itself through a bound method
        snn_revplugin.restore(nn.ReLU())
        assert getattr(owner, name) is original

    @only_pure
    @pytest.mark.parametrize("tool", ["nir", "precision"])
    def test_restore_of_the_last_net_undoes_them(self, tool: str) -> None:
        owner, name = tool_of(tool)
        original = inspect.getattr_static(owner, name)
        nets = [nn.Sequential(neuron.LIFNode()), nn.Sequential(neuron.IFNode())]
        for net in nets:
            snn_revplugin.convert(net)
        assert inspect.getattr_static(owner, name) is not original
        snn_revplugin.restore(nets[0])
        assert inspect.getattr_static(owner, name) is not original
        snn_revplugin.restore(nets[1])
        assert inspect.getattr_static(owner, name) is original

    @only_pure
    def test_a_copy_holds_them(self) -> None:
        owner, name = tool_of("precision")
        original = getattr(owner, name)
        net = nn.Sequential(neuron.LIFNode())
        snn_revplugin.convert(net)
        twin = copy.deepcopy(net)
        snn_revplugin.restore(net)
        assert getattr(owner, name) is not original
        del twin
        snn_revplugin.restore(net)
        assert getattr(owner, name) is original


class Tool:
    @staticmethod
    def translate() -> str:
        return "theirs"


def patches(attribute: str, module: str = __name__) -> Patches:
    return Patches(Patch("the tool", module, attribute, lambda theirs: lambda: f"not {theirs()}"))


class TestOnePatch:
    def test_it_stands_while_it_is_held(self) -> None:
        module = importlib.import_module(__name__)
        both, first, second = patches("Tool.translate"), nn.ReLU(), nn.ReLU()
        both.hold(first), both.hold(second)
        assert module.Tool.translate() == "not theirs"
        both.release(first)
        assert module.Tool.translate() == "not theirs"
        both.release(second)
        assert module.Tool.translate() == "theirs"

    def test_what_another_library_patched_since_stays(self) -> None:
        module = importlib.import_module(__name__)
        ours, holder, before = patches("Tool.translate"), nn.ReLU(), Tool.__dict__["translate"]
        ours.hold(holder)
        module.Tool.translate = lambda: "another's"
        ours.release(holder)
        assert module.Tool.translate() == "another's"
        module.Tool.translate = before

    def test_a_function_that_has_moved_is_a_warning(self) -> None:
        with pytest.warns(UserWarning, match=r"the tool does not know reversible neurons.*moved"):
            patches("Tool.moved").hold(nn.ReLU())

    def test_a_tool_that_cannot_be_imported_is_none(self) -> None:
        patches("anything", "no_such_package.at_all").hold(nn.ReLU())

    def test_a_tool_that_breaks_is_a_warning(self, tmp_path: Path, monkeypatch: Any) -> None:
        (tmp_path / "broken_tool.py").write_text("raise RuntimeError('no operator nms')")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.warns(UserWarning, match="RuntimeError: no operator nms"):
            patches("anything", "broken_tool").hold(nn.ReLU())

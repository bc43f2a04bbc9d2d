"""The examples of README, docs and docstrings run and print what they say, and so do the scripts in
``examples/``. The tables that the documentation makes of the library's registries leave nothing
out, and its pictures are those that are drawn."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

import snn_revplugin
import snn_revplugin.adapters
from snn_revplugin import replay
from snn_revplugin.cli.app import app
from snn_revplugin.swap import table as swap

ROOT = Path(__file__).parent.parent
# A block of Python, and the block of output that may follow it.
EXAMPLES = re.compile(
    r"^(?P<indent>"
    r" *)```python\n(?P<source>.*?)^(?P=indent)```\n(?:\n```output\n(?P<output>.*?)```)?",
    re.DOTALL | re.MULTILINE,
)
PAGES = ["README.md", *sorted(f"docs/{each.name}" for each in (ROOT / "docs").glob("*.md"))]
MODULES = [
    each.name
    for package in (snn_revplugin, snn_revplugin.adapters)
    for each in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    result = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert result.failed == 0


@pytest.fixture
def operations_of_the_page_only() -> Iterator[None]:
    """A page may add operations to the table."""
    before = set(replay.OPERATIONS)
    yield
    for added in set(replay.OPERATIONS) - before:
        del replay.OPERATIONS[added]


@pytest.mark.usefixtures("operations_of_the_page_only")
@pytest.mark.parametrize("page", PAGES)
def test_pages(page: str) -> None:
    """One example after the other, as a reader would; each prints what the page says, where it says
    so. Blocks that name their file are a neuron's, which ``test_adding.py`` runs."""
    text, names = (ROOT / page).read_text(), {}
    for example in EXAMPLES.finditer(text):
        if re.match(r"# \S+\.py\n", example["source"]):
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(textwrap.dedent(example["source"]), page, "exec"), names)
        if example["output"] is not None:
            assert_prints(example["output"], printed.getvalue())
    assert text.count("```python") == sum(1 for _ in EXAMPLES.finditer(text))


def assert_prints(expected: str, printed: str) -> None:
    """Both the same; ``...`` stands for anything."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.OutputChecker().check_output(expected, printed, flags), (
        f"expected\n{expected}\nprinted\n{printed}"
    )


@pytest.fixture(scope="module")
def registries() -> ModuleType:
    return module_of_docs("registries")


def module_of_docs(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestTables:
    def test_every_operation_is_listed_once(self, registries: ModuleType) -> None:
        listed = re.findall(r"\| `(\w+)` \|", registries.operations())
        assert sorted(listed) == sorted(replay.OPERATIONS)

    def test_an_operation_that_is_added_is_listed(
        self, registries: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(
            replay.OPERATIONS,
            "NewBackward7",
            replay.Operation("NewBackward7", replay.LAYER, ("self",), lambda _: None),
        )
        assert "| new | `NewBackward7` | `self` |" in registries.operations()

    def test_every_neuron_is_listed(self, registries: ModuleType) -> None:
        table = registries.neurons()
        assert swap.known_swaps()
        for each in swap.known_swaps():
            assert (
                f"{each.reversible.__name__}` | `" in table and f".{each.host.__name__}` |" in table
            )

    @pytest.mark.parametrize("name", ["Leaky", "IFNode", "LIFNode", "ParametricLIFNode"])
    def test_every_option_is_tried(self, registries: ModuleType, name: str) -> None:
        (found,) = (each for each in swap.known_swaps() if each.host.__name__ == name)
        table = registries.options(found.reversible, found.host)
        options = set(inspect.signature(found.host.__init__).parameters) - {
            "self",
            "args",
            "kwargs",
        }
        assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == options
        assert "the host's own path" not in table or name == "Leaky"

    def test_every_surrogate_of_the_adapters_is_listed(self, registries: ModuleType) -> None:
        tables = registries.tables()
        for host, names in (
            ("snntorch", registries.snntorch_adapter.SURROGATES),
            (
                "spikingjelly",
                [each.__name__ for each in registries.spikingjelly_adapter.SURROGATES],
            ),
        ):
            assert all(
                f"| `{name}` | closed form |" in tables[f"surrogates_{host}"] for name in names
            )

    def test_every_setting_is_described(self, registries: ModuleType) -> None:
        rows = registries.settings().splitlines()[2:]
        assert [row.split("`")[1] for row in rows] == list(
            snn_revplugin.Settings.__dataclass_fields__
        )
        assert all(len(row.split("|")[3].split()) > 3 for row in rows)

    def test_every_table_is_on_the_page(self, registries: ModuleType) -> None:
        asked_for = re.findall(r"{{ (\w+) }}", (ROOT / "docs" / "supported.md").read_text())
        assert sorted(asked_for) == sorted(registries.tables())


def test_pictures_are_those_that_are_drawn() -> None:
    pictures = module_of_docs("pictures")
    drawn = {f"{name}.svg": str(draw()) for name, draw in pictures.PICTURES.items()}
    assert drawn == {each.name: each.read_text() for each in (ROOT / "docs" / "pictures").iterdir()}


@pytest.mark.parametrize("script", ["snntorch_digits.py", "spikingjelly_digits.py"])
def test_examples_run_with_the_neurons_swapped(script: str) -> None:
    arguments = ["--epochs", "1", "--time-steps", "2"]
    done = CliRunner().invoke(app, ["run", str(ROOT / "examples" / script), *arguments])
    assert done.exit_code == 0, done.output
    assert "test accuracy" in done.stdout
    assert "ran as reversible ones" in done.stderr and "recomputed: " in done.stderr

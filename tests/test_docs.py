"""The examples of README, docs and docstrings run, and so do the scripts in ``examples/``."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import snn_revplugin
import snn_revplugin.adapters

ROOT = Path(__file__).parent.parent
EXAMPLES = re.compile(r"```python\n(.*?)```", re.DOTALL)
MODULES = [
    each.name
    for package in (snn_revplugin, snn_revplugin.adapters)
    for each in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("page", ["README.md", "docs/tools.md"])
def test_pages(page: str) -> None:
    """One example after the other, as a reader would."""
    names: dict = {}
    for source in EXAMPLES.findall((ROOT / page).read_text()):
        exec(compile(source, page, "exec"), names)


@pytest.mark.parametrize("script", ["snntorch_digits.py", "spikingjelly_digits.py"])
def test_examples_run_with_the_neurons_swapped(script: str) -> None:
    command = [str(Path(sys.executable).parent / "snn-revplugin"), "run", str(ROOT / "examples" / script)]
    arguments = ["--epochs", "1", "--time-steps", "4"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    assert "ran as reversible ones" in done.stderr and "computed again: " in done.stderr

"""No function outside ``kernels/`` is longer than 60 lines or has more than seven parameters.

A Triton kernel is one long function by nature. Two kinds of signature may be longer: a constructor
that repeats its host's, and a command whose parameters are its options.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES, MAX_PARAMETERS = 60, 7

# Functions that are still too large. These lists may only shrink: the test also fails for a name
# that is no longer too large.
TOO_LONG: set[str] = set()
TOO_MANY_PARAMETERS: set[str] = set()


class Function(NamedTuple):
    """A function: "file Class.name", its number of lines and of parameters."""

    name: str
    lines: int
    parameters: int


def functions() -> Iterator[Function]:
    for folder in ("snn_revplugin", "adapters"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            if not file.startswith(("snn_revplugin/kernels/", "snn_revplugin/adapters/")):
                yield from functions_in(ast.parse(path.read_text()), f"{file} ")


def functions_in(parent: ast.AST, prefix: str) -> Iterator[Function]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef):
            yield from functions_in(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = 0 if signature_is_given(node, prefix) else parameters(node)
            yield Function(prefix + node.name, node.end_lineno - node.lineno + 1, count)
            yield from functions_in(node, f"{prefix}{node.name}.")
        else:
            yield from functions_in(node, prefix)


def signature_is_given(node: ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> bool:
    """Whether a host's constructor or a command line decides the parameters."""
    constructor = prefix.startswith("adapters/") and node.name == "__init__"
    command = any(ast.unparse(each).startswith("app.command") for each in node.decorator_list)
    return constructor or command


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """``self`` and ``cls`` are no parameters; ``*args`` and ``**kwargs`` count as one each."""
    given = node.args
    named = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    packed = sum(each is not None for each in (given.vararg, given.kwarg))
    return len(named) + packed - (named[:1] in (["self"], ["cls"]))


@pytest.mark.parametrize(
    ("measure", "limit", "still_larger"),
    [("lines", MAX_LINES, TOO_LONG), ("parameters", MAX_PARAMETERS, TOO_MANY_PARAMETERS)],
    ids=["lines", "parameters"],
)
def test_functions_are_small(measure: str, limit: int, still_larger: set[str]) -> None:
    sizes = [(each.name, getattr(each, measure)) for each in functions()]
    larger = {name: size for name, size in sizes if size > limit}
    assert len(sizes) > 500, "the functions of the library were not found"
    assert larger.keys() <= still_larger, f"more than {limit} {measure}: {larger}"
    assert still_larger <= larger.keys(), (
        f"at most {limit} {measure} by now, so take them off the list: "
        f"{sorted(still_larger - larger.keys())}"
    )

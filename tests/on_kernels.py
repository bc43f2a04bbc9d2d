"""What the tests of the kernels share: devices, training steps compared between backends, launches
that are looked into."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from compare import assert_close, assert_exact
from torch import Tensor

from snn_revplugin import use_settings
from snn_revplugin.kernels import launch

STATIC = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "kernels_static.py"))
NoDevice = STATIC["NoDevice"]
DEVICES = [
    pytest.param("cpu", id="interpreter", marks=pytest.mark.interpreter),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]
InterpretedFunction = pytest.importorskip(
    "triton.runtime.interpreter", reason="Triton is not installed"
).InterpretedFunction
COMPILES_BESIDE_THE_INTERPRETER = pytest.mark.skipif(
    not hasattr(InterpretedFunction, "run"),
    reason=(
        "once a kernel has been interpreted, this release of Triton compiles none any more in the"
        " same process"
    ),
)
ON_EVERY_DEVICE = pytest.mark.parametrize("device", DEVICES)


def trained(
    run: Callable[[], tuple[list[Tensor], list[Tensor]]], backend_: str
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The outputs of a program and the gradients of its leaves, under a backend."""
    with use_settings(backend=backend_):
        outputs, leaves = run()
        torch.manual_seed(7)
        loss = sum(
            (each.double() * torch.randn(each.shape, dtype=torch.float64).to(each.device)).sum()
            for each in outputs
        )
        for leaf in leaves:
            leaf.grad = None
        loss.backward()
    return [each.detach() for each in outputs], [leaf.grad for leaf in leaves]


def assert_trains_alike(
    run: Callable[[], tuple[list[Tensor], list[Tensor]]], tolerance: float | None = None
) -> None:
    (plain, grads), (ours, our_grads) = trained(run, "torch"), trained(run, "triton")
    for i, (a, b) in enumerate(zip(plain, ours, strict=True)):
        assert_exact(f"output {i}", a, b)
    largest = max(each.abs().max().item() for each in grads if each is not None)
    for i, (a, b) in enumerate(zip(grads, our_grads, strict=True)):
        assert_close(f"leaf {i}", a, b, tolerance, floor=largest)


class Launch(NamedTuple):
    """A launch as it was made."""

    kernel: str
    arguments: dict[str, Any]
    constants: dict[str, Any]

    @property
    def kind(self) -> tuple:
        return (
            self.kernel,
            *(self.constants.get(name) for name in ("PART", "FROM_AFTER", "WHOLE", "SEVERAL")),
            *(value is None for value in self.arguments.values()),
        )


def launches(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> dict[tuple, Launch]:
    """What a program launches in the interpreter, one launch of every kind."""
    seen: dict[tuple, Launch] = {}
    interpreted = type(launch.kernels(True).forward_kernel)
    original = interpreted.run

    def spy(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        made = Launch(self.__name__, dict(zip(self.arg_names, args, strict=False)), constants)
        seen[made.kind] = made
        return original(self, *args, grid=grid, warmup=warmup, **constants)

    monkeypatch.setattr(interpreted, "run", spy)
    run()
    return seen

"""One work done with the host's neurons and with ours, in one run: memory, time, spikes,
gradients."""

from __future__ import annotations

import csv
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..report.memory import MemoryReport, memory_report, reset_peaks
from .workloads import HOST, NEURONS, OURS, Batch, Workload

SIDES = (HOST, OURS)
WARM_UPS = 1  # steps of each that are not timed


@dataclass(frozen=True)
class Setup:
    """A work with everything that was chosen about it.

    Args:
        workload: the work.
        time_steps, batch: its sizes.
        dtype, device: where and in what it computes.
        seed: of weights and data.
    """

    workload: Workload
    time_steps: int
    batch: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    @classmethod
    def usual(cls, workload: Workload, **choices: Any) -> Setup:
        """A work in its usual sizes, but for what is chosen; a choice of None is none."""
        sizes = {"time_steps": workload.time_steps, "batch": workload.batch}
        return cls(
            workload,
            **(sizes | {name: value for name, value in choices.items() if value is not None}),
        )

    def net(self, whose: str) -> nn.Module:
        return self.workload.build(whose, self.seed).to(self.device, self.dtype)

    def data(self) -> Batch:
        return self.place(self.workload.data(self.batch, self.seed))

    def place(self, batch: Batch) -> Batch:
        return Batch(batch.images.to(self.device, self.dtype), batch.classes.to(self.device))

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        return self.workload.loss(net(batch.images, self.time_steps), batch.classes)


@dataclass(frozen=True)
class Comparison:
    """The host's neurons and ours over the same work; dictionaries are keyed by ``HOST`` and
    ``OURS``.

    Attributes:
        memory: of one training step.
        seconds: of training steps, taken in turns.
        spikes_equal, potentials_equal: bit for bit, of every neuron that hands them out, at every
            step.
        gradient_error: the largest over the parameters of ``|ours - host| / |host|``.
    """

    setup: Setup
    memory: dict[str, MemoryReport]
    seconds: dict[str, list[float]]
    spikes_equal: bool
    potentials_equal: bool
    gradient_error: float

    @property
    def retained_ratio(self) -> float:
        return self.memory[HOST].retained / self.memory[OURS].retained

    @property
    def peak_ratio(self) -> float:
        return self.memory[HOST].peak / self.memory[OURS].peak

    @property
    def time_ratio(self) -> float:
        """How many times the host's step ours takes: the median over steps that were taken one
        after the other."""
        return statistics.median(
            b / a for a, b in zip(self.seconds[HOST], self.seconds[OURS], strict=True)
        )


def compare(
    setup: Setup,
    repeats: int = 5,
    batch: Batch | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Comparison:
    """Do a work with the host's neurons and with ours.

    Args:
        repeats: how many training steps of each are timed.
        batch: the data; those of ``setup``, random, if they are not given.
        on_step: called after every training step, of which there are ``steps_of(repeats)``.
    """
    batch = setup.data() if batch is None else setup.place(batch)
    traces, gradients = {}, {}
    for whose in SIDES:
        traces[whose], gradients[whose] = observe(setup, whose, batch)
        on_step()
    spikes_equal, potentials_equal = traces[HOST].equals(traces[OURS])
    gradient_error = largest_relative_difference(gradients[HOST], gradients[OURS])
    del traces, gradients

    memory, steps = {}, {}
    for whose in SIDES:
        net = setup.net(whose)
        if setup.device != "cpu":
            setup.loss(
                net, batch
            ).backward()  # libraries allocate their workspaces when they are first used
            net.zero_grad(set_to_none=True)
        reset_peaks(setup.device)
        memory[whose] = memory_report(lambda net=net: setup.loss(net, batch), device=setup.device)
        steps[whose] = _step(setup, net, batch)
        on_step()
    return Comparison(
        setup,
        memory,
        take_turns(steps, repeats, on_step=on_step),
        spikes_equal,
        potentials_equal,
        gradient_error,
    )


def observe(
    setup: Setup, whose: str, batch: Batch, earlier_steps: int = 0
) -> tuple[Trace, list[Tensor]]:
    """What the neurons of a fresh net hand out in one training step, and its gradients; after
    earlier steps that change no weight."""
    net = setup.net(whose)
    for _ in range(earlier_steps):
        setup.loss(net, batch).backward()
        net.zero_grad(set_to_none=True)
    with Trace(net, setup.workload.neuron(HOST)) as trace:
        setup.loss(net, batch).backward()
    return trace, [each.grad for each in net.parameters() if each.grad is not None]


def steps_of(repeats: int) -> int:
    """How many training steps :func:`compare` takes, all in all."""
    return len(SIDES) * (2 + WARM_UPS + repeats)


def print_head(columns: Sequence[str], threads: int) -> None:
    """Print the versions that a table of a benchmark depends on, and the table's head."""
    print(
        ", ".join(f"{name} {version}" for name, version in versions().items() if version), end=", "
    )
    print(f"{threads} thread(s)\n")
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)


def write_table(page: Path, begin: str, end: str, printed: str) -> None:
    """Put a table into a page, in the place of the one that it has.

    Args:
        begin, end: the lines around it.

    Raises:
        ValueError: the page has no line ``begin``.
    """
    before, found, rest = page.read_text().partition(begin)
    if not found:
        raise ValueError(f"{page} has no line {begin!r}, where the table belongs")
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{printed.strip()}\n{end}{after}")


def take_turns(
    steps: dict[str, Callable[[], None]],
    repeats: int,
    warm_ups: int = WARM_UPS,
    on_step: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds that each of some functions takes, called in turns so that a busy machine is as
    unkind to all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warm_ups + repeats):
        for name in steps:
            start = clock()
            steps[name]()
            if turn >= warm_ups:
                seconds[name].append(clock() - start)
            on_step()
    return seconds


def _step(setup: Setup, net: nn.Module, batch: Batch) -> Callable[[], None]:
    def step() -> None:
        net.zero_grad(set_to_none=True)
        setup.loss(net, batch).backward()
        if setup.device != "cpu":
            torch.accelerator.synchronize()

    return step


class Trace:
    """What the neurons of a net hand out while it runs: spikes, and potentials where they hand
    those out too."""

    def __init__(self, net: nn.Module, neuron: type[nn.Module]) -> None:
        self.neurons = [each for each in net.modules() if isinstance(each, neuron)]
        self.spikes: list[Tensor] = []
        self.potentials: list[Tensor] = []

    def __enter__(self) -> Trace:
        self._hooks = [each.register_forward_hook(self._keep) for each in self.neurons]
        return self

    def __exit__(self, *exception: object) -> None:
        for each in self._hooks:
            each.remove()

    def _keep(
        self, neuron: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, Tensor]
    ) -> None:
        if isinstance(output, tuple):
            spikes, potential = output
        else:
            spikes, potential = output, neuron.mem if hasattr(neuron, "mem") else neuron.v
        self.spikes.append(spikes.detach().to(torch.int8))
        self.potentials.append(potential.detach())

    def equals(self, other: Trace) -> tuple[bool, bool]:
        """Whether spikes, and potentials, are equal bit for bit."""
        return _all_equal(self.spikes, other.spikes), _all_equal(self.potentials, other.potentials)


def _all_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) > 0 and all(map(torch.equal, some, others))


def largest_relative_difference(truth: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    """The largest of ``|other - truth| / |truth|`` over pairs of tensors, in the Euclidean norm; of
    ``|other|`` alone where the truth is zero."""
    errors = []
    for a, b in zip(truth, others, strict=True):
        a, b = a.detach().double(), b.detach().double()
        errors.append(((b - a).norm() / (a.norm() or 1.0)).item())
    return max(errors)


@dataclass(frozen=True)
class Row:
    """One measured figure, with all that is needed to measure it again."""

    work: str
    neurons: str
    metric: str
    unit: str
    p20: float
    p50: float
    p80: float
    time_steps: int
    batch: int
    dtype: str
    device: str
    seed: int
    threads: int = field(default_factory=torch.get_num_threads)
    versions: str = field(
        default_factory=lambda: " ".join(f"{k}={v}" for k, v in versions().items() if v)
    )

    @classmethod
    def of(
        cls, values: list[float], setup: Setup, neurons: str, metric: str, unit: str, work: str = ""
    ) -> Row:
        """What some measurements of one thing came to."""
        p20, p50, p80 = (
            torch.tensor(values, dtype=torch.float64)
            .quantile(torch.tensor([0.2, 0.5, 0.8]).double())
            .tolist()
        )
        where = (
            setup.time_steps,
            setup.batch,
            str(setup.dtype).removeprefix("torch."),
            setup.device,
            setup.seed,
        )
        return cls(work or setup.workload.name, neurons, metric, unit, p20, p50, p80, *where)


def rows_of(comparison: Comparison) -> list[Row]:
    """A comparison as rows of figures."""
    setup, rows = comparison.setup, []

    def add(neurons: str, metric: str, unit: str, values: list[float]) -> None:
        rows.append(Row.of(values, setup, neurons, metric, unit))

    for whose in SIDES:
        memory = comparison.memory[whose]
        for each in fields(memory):
            value = getattr(memory, each.name)
            if each.name != "device" and value is not None:
                add(whose, each.name, "B", [value])
        if comparison.seconds[whose]:
            add(whose, "step", "s", comparison.seconds[whose])
    add(OURS, "gradient_error", "1", [comparison.gradient_error])
    add(OURS, "spikes_equal", "1", [float(comparison.spikes_equal)])
    add(OURS, "potentials_equal", "1", [float(comparison.potentials_equal)])
    return rows


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Rows of figures as a file, one line each under a line of names."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def versions() -> dict[str, str | None]:
    """Versions of all that has a say in a figure; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("snn-revplugin", "torch", "triton", "numpy", *NEURONS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found

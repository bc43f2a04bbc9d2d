"""``snn-revplugin demo``: two real networks learn handwritten digits, with the host's neurons and
with ours."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ..report.memory import MIB, MemoryReport, memory_report, mib, reset_peaks
from ..report.timeline import LayerReport
from .bench import progress
from .comparison import SIDES, Comparison, Setup, compare, rows_of, steps_of, take_turns, write_csv
from .workloads import HOST, OURS, WORKLOADS, Batch, digits

# The networks, with T for the picture.
NETS = {"digits-snntorch": (10, 25, 50, 75, 100), "digits-spikingjelly": (4, 8, 16, 24, 32)}
TITLES = {
    "digits-snntorch": "snnTorch, conv-Leaky in a time loop",
    "digits-spikingjelly": "SpikingJelly, conv-BN-LIF, step_mode 'm'",
}
LEARNING_RATE = 1e-2
COLOURS = {HOST: "#c44e52", OURS: "#1f77b4"}
LABELS = {HOST: "host's neurons", OURS: "reversible neurons"}


@dataclass(frozen=True)
class Trained:
    """What training a network both ways came to; dictionaries are keyed by ``HOST`` and ``OURS``.

    Attributes:
        comparison: of one training step on a batch of digits, at the first weights.
        milliseconds: the median training step, optimizer included.
        accuracy: on the test set.
        memory: of one training step for some numbers of time steps.
        by_layer: the memory of one training step, ours beside the host's.
    """

    comparison: Comparison
    milliseconds: dict[str, float]
    accuracy: dict[str, float]
    memory: dict[str, dict[int, MemoryReport]]
    by_layer: LayerReport


def run(console: Console, epochs: int, out: Path, device: str, seed: int) -> None:
    """Train, print the table, save the pictures and the figures."""
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, several in NETS.items():
        setup = Setup.usual(WORKLOADS[name], device=device, seed=seed)
        console.print(
            f"[bold]{name}[/bold]: {setup.workload.title}; T {setup.time_steps}, batch"
            f" {setup.batch}",
            highlight=False,
        )
        layers = out / f"layers-{name}.png"
        results[name] = _both_ways(console, setup, epochs, several, layers)
        for whose, report in zip(
            SIDES, (results[name].by_layer.host, results[name].by_layer), strict=True
        ):
            console.print(f"{LABELS[whose]}: {report.peak_in_words}", highlight=False)
        console.print(f"memory by layer in {layers}", highlight=False, soft_wrap=True)
    console.print(table_of(results))
    picture, figures = out / "memory.png", out / "figures.csv"
    draw(results).savefig(picture, dpi=150)
    write_csv((row for each in results.values() for row in rows_of(each.comparison)), figures)
    console.print(
        f"memory over T in {picture}, figures in {figures}", highlight=False, soft_wrap=True
    )


def _both_ways(
    console: Console, setup: Setup, epochs: int, several: tuple[int, ...], layers: Path
) -> Trained:
    training, test = (
        setup.place(each) for each in digits(setup.workload.image[-1], seed=setup.seed)
    )
    first = Batch(training.images[: setup.batch], training.classes[: setup.batch])
    batches = -(-len(training.images) // setup.batch)
    with progress(console) as bars:
        bar = bars.add_task("one step  ", total=steps_of(0))
        comparison = compare(setup, 0, first, lambda: bars.advance(bar))
        bar = bars.add_task("training  ", total=epochs * batches * len(SIDES))
        nets, milliseconds = train(setup, training, epochs, lambda: bars.advance(bar))
        bar = bars.add_task("memory    ", total=len(several) * len(SIDES))
        memory = _memory_over_time_steps(setup, first, several, lambda: bars.advance(bar))
    accuracy = {whose: accuracy_of(setup, net, test) for whose, net in nets.items()}
    by_layer = _memory_by_layer(setup, first, layers)
    return Trained(comparison, milliseconds, accuracy, memory, by_layer)


def train(
    setup: Setup,
    training: Batch,
    epochs: int,
    on_step: Callable[[], None] = lambda: None,
    sides: tuple[str, ...] = SIDES,
) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """Train a net with the host's neurons and one with ours, step by step in turns, on the same
    batches from the same weights.

    Args:
        sides: whose neurons, as in :data:`..workloads.NEURONS`.

    Returns:
        The nets, and the median milliseconds that a step of theirs took.
    """
    nets = {whose: setup.net(whose) for whose in sides}
    optimizers = {
        whose: torch.optim.Adam(net.parameters(), LEARNING_RATE) for whose, net in nets.items()
    }
    batches = -(-len(training.images) // setup.batch)
    schedules = [
        torch.optim.lr_scheduler.LinearLR(each, 1.0, 0.0, epochs * batches)
        for each in optimizers.values()
    ]
    seconds: dict[str, list[float]] = {whose: [] for whose in sides}
    shuffle = torch.Generator().manual_seed(setup.seed)

    def step(whose: str, batch: Batch) -> None:
        optimizers[whose].zero_grad()
        setup.loss(nets[whose], batch).backward()
        optimizers[whose].step()

    for _ in range(epochs):
        for chosen in torch.randperm(len(training.images), generator=shuffle).split(setup.batch):
            batch = Batch(training.images[chosen], training.classes[chosen])
            turn = {whose: lambda whose=whose, batch=batch: step(whose, batch) for whose in sides}
            for whose, taken in take_turns(turn, 1, warm_ups=0, on_step=on_step).items():
                seconds[whose] += taken
            for schedule in schedules:
                schedule.step()
    return nets, {whose: 1000 * statistics.median(taken) for whose, taken in seconds.items()}


@torch.no_grad()
def accuracy_of(setup: Setup, net: nn.Module, test: Batch) -> float:
    """The share of images whose class has the largest output, summed over time."""
    net.eval()
    return (
        (net(test.images, setup.time_steps).sum(0).argmax(1) == test.classes).double().mean().item()
    )


def _memory_over_time_steps(
    setup: Setup, batch: Batch, several: tuple[int, ...], on_step: Callable[[], None]
) -> dict[str, dict[int, MemoryReport]]:
    memory: dict[str, dict[int, MemoryReport]] = {whose: {} for whose in SIDES}
    for whose in SIDES:
        for time_steps in several:
            sized = Setup.usual(
                setup.workload,
                time_steps=time_steps,
                batch=setup.batch,
                device=setup.device,
                seed=setup.seed,
            )
            net = sized.net(whose)
            reset_peaks(setup.device)
            memory[whose][time_steps] = memory_report(
                lambda net=net, sized=sized: sized.loss(net, batch), device=setup.device
            )
            on_step()
    return memory


def _memory_by_layer(setup: Setup, batch: Batch, picture: Path) -> LayerReport:
    host, ours = (setup.net(whose) for whose in SIDES)
    beside = memory_report(lambda: setup.loss(host, batch), by="layer", device=setup.device)
    return memory_report(
        lambda: setup.loss(ours, batch),
        by="layer",
        host=beside,
        plot=picture,
        device=setup.device,
    )


def table_of(results: dict[str, Trained]) -> Table:
    """The figures, a row for each network and neuron."""
    columns = (
        "network",
        "neurons",
        "retained",
        "peak",
        "step",
        "test\naccuracy",
        "gradient\ndifference",
    )
    table = Table(
        *columns, title="One training step, and what training came to", title_justify="left"
    )
    for name, each in results.items():
        difference = {HOST: "", OURS: f"{each.comparison.gradient_error:.1e}"}
        for whose in SIDES:
            memory = each.comparison.memory[whose]
            table.add_row(
                WORKLOADS[name].host if whose == HOST else "",
                "host's" if whose == HOST else "ours",
                mib(memory.retained),
                mib(memory.peak),
                f"{each.milliseconds[whose]:.0f} ms",
                f"{100 * each.accuracy[whose]:.1f}%",
                difference[whose],
            )
        less = each.comparison.retained_ratio, each.comparison.peak_ratio
        times = each.milliseconds[OURS] / each.milliseconds[HOST]
        table.add_row(
            "",
            "",
            *(f"[bold]÷ {ratio:.1f}" for ratio in less),
            f"[bold]× {times:.2f}",
            "",
            "",
            end_section=True,
        )
    return table


def draw(results: dict[str, Trained]) -> Figure:
    """Memory over the number of time steps, a panel for each network."""
    figure = Figure(figsize=(5.5 * len(results), 4.2), layout="constrained")
    for axes, (name, each) in zip(
        figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True
    ):
        for whose, reports in each.memory.items():
            for what, style in (("peak", "o-"), ("retained", "s--")):
                sizes = [getattr(report, what) / MIB for report in reports.values()]
                label = f"{LABELS[whose]}, {what}"
                axes.plot(
                    list(reports), sizes, style, color=COLOURS[whose], label=label, markersize=4
                )
        axes.set_title(f"{TITLES[name]}\n{_saving(each.memory)}")
        axes.set_xlabel("time steps T")
        axes.set_ylabel("memory of one training step (MiB)")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def _saving(memory: dict[str, dict[int, MemoryReport]]) -> str:
    longest = max(memory[HOST])
    host, ours = (memory[whose][longest] for whose in SIDES)
    return (
        f"T = {longest}: retained {host.retained / ours.retained:.1f}x less, peak"
        f" {host.peak / ours.peak:.1f}x less"
    )

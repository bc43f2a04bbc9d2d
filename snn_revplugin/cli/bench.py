"""``snn-revplugin bench``: one training step, the host's neurons and ours."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..report.memory import mib
from .comparison import Comparison, Row, Setup, compare, rows_of, steps_of, versions, write_csv
from .workloads import HOST, OURS


def run(console: Console, setup: Setup, repeats: int, csv: Path | None) -> None:
    """Measure a workload, print the figures, and write them to ``csv`` if that is given."""
    with progress(console) as bars:
        bar = bars.add_task(setup.workload.name, total=steps_of(repeats))
        comparison = compare(setup, repeats, on_step=lambda: bars.advance(bar))
    rows = rows_of(comparison)
    console.print(table_of(comparison, rows))
    console.print(
        " ".join(f"{name} {version}" for name, version in versions().items() if version),
        highlight=False,
    )
    if csv is not None:
        write_csv(rows, csv)
        console.print(f"figures in {csv}", highlight=False)


def progress(console: Console) -> Progress:
    """Bars that say what is done, how far it is and how long it took."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
    )
    return Progress(*columns, TimeElapsedColumn(), console=console)


def table_of(comparison: Comparison, rows: list[Row]) -> Table:
    """A comparison, host and ours side by side."""
    setup = comparison.setup
    dtype = str(setup.dtype).removeprefix("torch.")
    title = (
        f"{setup.workload.name}: T {setup.time_steps}, batch {setup.batch}, {dtype} on"
        f" {setup.device}"
    )
    table = Table("of one training step", "host's", "ours", "", title=title, title_justify="left")
    table.caption, table.caption_justify = _verdict(comparison), "left"
    measured = {(row.neurons, row.metric): row for row in rows}
    for metric in ("retained", "peak", "left", "retained_reserved", "peak_reserved"):
        if (HOST, metric) in measured:
            host, ours = (measured[whose, metric].p50 for whose in (HOST, OURS))
            table.add_row(
                metric.replace("_", ", "),
                mib(host),
                mib(ours),
                f"{host / ours:.1f}x less" if ours else "",
            )
    host, ours = (measured[whose, "step"] for whose in (HOST, OURS))
    table.add_row(
        "time (p20 p50 p80)",
        _milliseconds(host),
        _milliseconds(ours),
        f"{comparison.time_ratio:.2f}x the time",
    )
    return table


def _verdict(comparison: Comparison) -> str:
    spikes, potentials = (
        "equal bit for bit" if equal else "NOT EQUAL"
        for equal in (comparison.spikes_equal, comparison.potentials_equal)
    )
    return (
        f"spikes {spikes}, potentials {potentials}, gradients within"
        f" {comparison.gradient_error:.1e} of the host's"
    )


def _milliseconds(row: Row) -> str:
    return " ".join(f"{1000 * value:.0f}" for value in (row.p20, row.p50, row.p80)) + " ms"

"""The five commands and their options; what they do is in the files beside this one."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from typer.core import TyperCommand

from ..budget import LEAST, check_budget
from ..settings import use_settings
from . import bench as benching
from . import demo as demonstration
from . import doctor as examination
from . import script
from .acceptance.parts import PARTS
from .acceptance.run import run as run_acceptance
from .comparison import Setup
from .workloads import WORKLOADS

app = typer.Typer(
    name="snn-revplugin",
    help=(
        "Reversible neurons for snnTorch and SpikingJelly: the same spikes and gradients in a"
        " fraction of the memory."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Net = StrEnum("Net", {name: name for name in WORKLOADS})
Part = StrEnum("Part", {name: name for name in PARTS})
DType = StrEnum("DType", {name: name for name in ("float32", "float64", "float16", "bfloat16")})

Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
Seed = Annotated[int, typer.Option(help="Of weights and data.")]


def _budget(value: str) -> str:
    try:
        check_budget(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return value


MemoryBudget = Annotated[
    str,
    typer.Option(
        callback=_budget,
        help="What a training step may keep: least, peak, host, or an amount such as '2 GiB'.",
    ),
]


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Times the training set is gone through.")] = 6,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for the picture and the figures.")
    ] = Path("out"),
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Train two real networks on handwritten digits, with the host's neurons and with ours, and
    compare."""
    _check_device(device)
    demonstration.run(Console(), epochs, out, device, seed)


@app.command()
def bench(
    net: Annotated[
        Net,
        typer.Option(help="; ".join(f"{each.name}: {each.title}" for each in WORKLOADS.values())),
    ] = Net.csnn,
    time_steps: Annotated[
        int | None,
        typer.Option("--time-steps", "-T", min=1, help="T; by default the net's usual one."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", "-N", min=1, help="Images a step, likewise.")
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Of weights and images.")] = DType.float32,
    device: Device = "cpu",
    repeats: Annotated[
        int, typer.Option(min=1, help="Training steps of each that are timed, in turns.")
    ] = 5,
    csv: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write the figures to this file too.")
    ] = None,
    seed: Seed = 0,
    memory_budget: MemoryBudget = LEAST,
) -> None:
    """Measure one network's training step with the host's neurons and with ours: memory, time,
    spikes, gradients."""
    _check_device(device)
    choices = {"time_steps": time_steps, "batch": batch, "device": device, "seed": seed}
    workload, dtype_ = WORKLOADS[net.value], getattr(torch, dtype.value)
    with use_settings(memory_budget=memory_budget):
        benching.run(Console(), Setup.usual(workload, dtype=dtype_, **choices), repeats, csv)


@app.command()
def accept(
    part: Annotated[
        list[Part] | None,
        typer.Option(
            help="Run this part alone, or with others: "
            + "; ".join(f"{name}: {each.title}" for name, each in PARTS.items())
        ),
    ] = None,
    device: Device = "cuda",
    quick: Annotated[bool, typer.Option("--quick", help="In small, to see that it runs.")] = False,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for acceptance.jsonl and acceptance.md.")
    ] = Path("out"),
) -> None:
    """Examine on a device what only the device can show, in at most ten minutes; see
    docs/accept.md."""
    _check_device(device)
    parts = PARTS if part is None else [each.value for each in part]
    went_well = run_acceptance(typer.echo, device, out, quick, parts)
    typer.echo(f"results in {out / 'acceptance.jsonl'} and {out / 'acceptance.md'}")
    raise typer.Exit(0 if went_well else 1)


@app.command()
def doctor() -> None:
    """Print versions, devices and what is supported."""
    examination.run(Console())


class _LikePython(TyperCommand):
    """A command whose option ``-m MODULE`` ends the options, as Python's does."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        at = 2 if args[:1] == ["--memory-budget"] else 0
        if args[at : at + 1] == ["-m"]:
            args = [*args[: at + 2], "--", *args[at + 2 :]]
        return super().parse_args(ctx, args)


@app.command(cls=_LikePython, context_settings={"allow_interspersed_args": False})
def run(
    path: Annotated[
        str | None, typer.Argument(metavar="SCRIPT", help="A training script, unmodified.")
    ] = None,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGS...", help="The script's arguments.")
    ] = None,
    module: Annotated[
        str | None,
        typer.Option("-m", metavar="MODULE", help="Run a module in place of SCRIPT, as python -m."),
    ] = None,
    memory_budget: MemoryBudget = LEAST,
) -> None:
    """Run a training script with its supported neurons swapped; at the end, report what each kept
    and why."""
    arguments = arguments or []
    if module is not None:
        target, arguments = module, arguments if path is None else [path, *arguments]
    else:
        target = _script(path)
    with use_settings(memory_budget=memory_budget):
        code, report = script.run(target, arguments, is_module=module is not None)
    typer.echo(report, err=True)
    raise typer.Exit(code)


def _script(path: str | None) -> str:
    """The path of a script, or an error that says what to name in its place."""
    if path is None:
        problem = "name a script, or a module with -m"
    elif not Path(path).exists():
        problem = f"{path!r} does not exist"
    elif Path(path).is_dir():
        problem = f"{path!r} is a directory; name the script in it, or a module with -m"
    elif Path(path).suffix == ".ipynb":
        problem = (
            f"{path!r} is a notebook; make a script of it with 'jupyter nbconvert --to script"
            f" {path}', or call snn_revplugin.convert(net) in the notebook"
        )
    else:
        return path
    raise typer.BadParameter(problem, param_hint="'SCRIPT'")


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise typer.BadParameter(
            f"cannot compute on {device!r}: {reason}", param_hint="--device"
        ) from error

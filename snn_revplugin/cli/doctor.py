"""``snn-revplugin doctor``: versions, devices, and what is supported here."""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch
from rich.console import Console
from rich.table import Table

from ..kernels.backend import BY_SETTING, INTERPRETED, TRITON, why_not
from ..replay import OPERATIONS
from ..report.explain import operation_name
from ..report.memory import mib
from ..settings import get_settings
from ..swap.hosts import adapters, imported_hosts
from ..swap.table import known_swaps
from .comparison import versions


def _arithmetic() -> str:
    """What computes a neuron's time steps on this machine's devices, under the current
    settings."""
    wanted, reason = get_settings().backend, why_not()
    if wanted == "torch":
        return BY_SETTING
    if reason is not None:
        return f"torch code everywhere: {reason}"
    if INTERPRETED:
        return f"{TRITON}, in Triton's interpreter (TRITON_INTERPRET=1)"
    where = (
        f"{TRITON} on CUDA{'' if torch.cuda.is_available() else ', which is not available here'};"
        " torch code elsewhere"
    )
    return (
        where
        if wanted == "triton"
        else f"{where}. A kernel is compared with the torch code at a neuron's first call"
    )


def run(console: Console) -> None:
    """Print it."""
    table = Table(title="Versions", title_justify="left", show_header=False)
    for name, version in versions().items():
        table.add_row(name, version or "not installed")
    console.print(table)

    table = Table(title="Devices", title_justify="left", show_header=False)
    table.add_row("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        table.add_row(f"cuda:{index}", f"{properties.name}, {mib(properties.total_memory)}")
    if not torch.cuda.is_available():
        table.add_row("cuda", "not available")
    console.print(table)

    console.print(f"[italic]Arithmetic[/italic]\n{_arithmetic()}\n", highlight=False)

    table = Table("host", "neuron", "swapped for", title="Neurons", title_justify="left")
    for host, adapter in adapters().items():
        if importlib.util.find_spec(host) is None:
            table.add_row(host, "not installed", f"pip install 'snn-revplugin\\[{host}]'")
        else:
            importlib.import_module(adapter)
    for swap in known_swaps():
        table.add_row(
            swap.host.__module__.partition(".")[0], swap.host.__name__, swap.reversible.__name__
        )
    console.print(table)

    table = Table(
        "host",
        "surrogates",
        title="Surrogates with a derivative in closed form (others: through autograd)",
        title_justify="left",
    )
    for host in imported_hosts():
        table.add_row(host.name, ", ".join(host.surrogates))
    console.print(table)

    console.print("[italic]Operations that are recomputed (others: their activations are kept)")
    console.print(", ".join(sorted({operation_name(node) for node in OPERATIONS})), highlight=False)
    console.print(f"\n[italic]Settings[/italic]\n{get_settings()}", highlight=False)

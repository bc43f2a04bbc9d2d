"""The tables of docs/supported.md. The build of the documentation makes them from the library.

This file lists nothing by hand that the library knows. The neurons come from the table of swaps,
the operations from ``replay.OPERATIONS``, and the options from the parameters of the hosts'
constructors. It tries each option, and the table gives what ``explain`` then says.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn as nn

import snn_revplugin
from snn_revplugin.adapters import snntorch as snntorch_adapter
from snn_revplugin.adapters import spikingjelly as spikingjelly_adapter
from snn_revplugin.kernels import surrogate_constants as spec
from snn_revplugin.neurons.surrogate import Surrogate
from snn_revplugin.replay import OPERATIONS
from snn_revplugin.report.explain import operation_name
from snn_revplugin.swap.module import ReversibleNeuron
from snn_revplugin.swap.table import known_swaps

ADAPTERS = {"snntorch": snntorch_adapter, "spikingjelly": spikingjelly_adapter}
TIME_STEPS = 3


def _half(potential: torch.Tensor) -> torch.Tensor:
    return potential.half().to(potential.dtype)


# The values to try for each option of a neuron, of any host and version.
TRIED: dict[str, tuple[Any, ...]] = {
    # snntorch.Leaky, Synaptic, Lapicque
    "alpha": (0.8, torch.full((8,), 0.8)),
    "beta": (0.9, torch.full((8,), 0.9)),
    "R": (2.0,),
    "C": (3.0,),
    "time_step": (0.5,),
    "threshold": (0.5, torch.ones(8)),
    "spike_grad": (snntorch_adapter.snntorch.surrogate.fast_sigmoid(),),
    "surrogate_disable": (True,),
    "init_hidden": (True,),
    "inhibition": (True,),
    "learn_alpha": (True,),
    "learn_beta": (True,),
    "learn_threshold": (True,),
    "reset_mechanism": ("subtract", "zero", "none"),
    "state_quant": (_half,),
    "output": (True,),
    "graded_spikes_factor": (2.0,),
    "learn_graded_spikes_factor": (True,),
    "reset_delay": (False,),
    # spikingjelly.activation_based.neuron
    "tau": (2.0,),
    "init_tau": (2.0,),
    "decay_input": (True, False),
    "v_threshold": (0.5,),
    "v_reset": (0.0, -0.1, None),
    "surrogate_function": (spikingjelly_adapter.host_surrogate.ATan(),),
    "detach_reset": (True,),
    "step_mode": ("s", "m"),
    "backend": ("torch",),
    "store_v_seq": (True,),
}

# Values for options that have no default.
NEEDED = {"alpha": 0.8, "beta": 0.9, "tau": 2.0, "decay_input": True}

# Arguments for the surrogates that need some.
SURROGATES_NEED: dict[str, tuple[Any, ...]] = {
    "custom_surrogate": (lambda input_, grad, spikes: grad,),
    "MultiLevelSpikeCount": (3,),
}


def tables() -> dict[str, str]:
    """All tables of this file in Markdown, keyed by the name that a page uses."""
    made = {"neurons": neurons(), "operations": operations(), "settings": settings()}
    for swap in known_swaps():
        made[f"options_{swap.host.__name__.lower()}"] = options(swap.reversible, swap.host)
    made["surrogates_snntorch"] = surrogates(_of_snntorch(), snntorch_adapter.surrogate_from)
    made["surrogates_spikingjelly"] = surrogates(
        _of_spikingjelly(), spikingjelly_adapter.surrogate_from
    )
    return made


def neurons() -> str:
    """The swaps of ``convert``, and our neurons that replace no neuron of a host."""
    hosts = {swap.reversible: swap.host for swap in known_swaps()}
    rows = []
    for adapter in ADAPTERS.values():
        for name, kind in vars(adapter).items():
            is_ours = (
                isinstance(kind, type)
                and issubclass(kind, ReversibleNeuron)
                and kind.__module__ == adapter.__name__
            )
            if is_ours and not name.startswith("_"):
                stands_for = _code(_path(hosts[kind])) if kind in hosts else "none"
                rows.append((_code(name), stands_for))
    return table(("neuron", "replaces"), rows)


def options(kind: type[nn.Module], host: type[nn.Module]) -> str:
    """Every parameter of the host's constructor, the values tried, and what ``explain`` says of
    each."""
    rows = []
    for name, parameter in inspect.signature(host.__init__).parameters.items():
        if name in ("self", "args", "kwargs"):
            continue
        default = "" if parameter.default is parameter.empty else _shown(parameter.default)
        outcomes: dict[str, list[str]] = {}
        for value in TRIED[name]:
            outcomes.setdefault(outcome(kind, name, value), []).append(_shown(value))
        for said, values in outcomes.items():
            rows.append((_code(name), default, ", ".join(values), said))
    return table(("option", "default", "tried", "in training"), rows)


def outcome(kind: type[nn.Module], name: str, value: object) -> str:
    """What a neuron with this option does in a few time steps behind a convolution."""
    taken = inspect.signature(kind).parameters
    needed = {
        each: given
        for each, given in NEEDED.items()
        if each in taken and taken[each].default in (inspect.Parameter.empty, False)
    }
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # of the host, for options that it calls unstable
            neuron = kind(**needed | {name: value})
        with snn_revplugin.use_settings(recompute_min_bytes=0):  # the layer is small
            take_steps(neuron)
    except (RuntimeError, TypeError):
        return "an error of the host's"
    (row,) = snn_revplugin.explain(neuron).rows
    if row.reasons:
        return f"the host's own path: {'; '.join(row.reasons)}"
    if row.steps_between_anchors is None:
        return "reversible: the sequence is scanned a second time"
    return f"reversible: an anchor every {row.steps_between_anchors} steps"


def take_steps(neuron: nn.Module) -> None:
    """A few time steps behind a convolution."""
    of_snntorch = isinstance(neuron, snntorch_adapter.snntorch.SpikingNeuron)
    current = nn.Conv1d(1, 8, 1)(torch.rand(TIME_STEPS * 4, 1, 1)).view(TIME_STEPS, 4, 8).unbind()
    if not of_snntorch and neuron.step_mode == "m":
        neuron(torch.stack(current))
        return
    states = ()
    for x in current:
        out = neuron(x, *states)
        states = out[1:] if of_snntorch and not neuron.init_hidden else ()


def surrogates(known: Iterable[tuple[str, Any]], surrogate_from: Callable[[Any], Any]) -> str:
    """The hosts' surrogate gradients with their default parameters, and how the library computes
    their derivatives."""
    rows = []
    for name, function in known:
        surrogate = surrogate_from(function)
        if surrogate is None:
            how = (
                "the host's own path: its forward is not a plain Heaviside step, or it learns"
                " parameters of its own"
            )
        elif isinstance(surrogate, Surrogate):
            how = "closed form"
        else:
            how = "by autograd"
        kernel = (
            "yes"
            if isinstance(surrogate, Surrogate) and surrogate.name in spec.SURROGATES
            else "no"
        )
        rows.append((_code(name), how, kernel))
    return table(("surrogate", "derivative", "fused kernel"), rows)


def operations() -> str:
    """``replay.OPERATIONS``: one row per graph node, with the saved tensors that recipes
    replace."""
    rows = []
    for each in sorted(
        OPERATIONS.values(), key=lambda each: (operation_name(each.node), each.node)
    ):
        saved = [name for name in (*each.inputs, *each.outputs) if name is not None]
        if each.is_view:
            told = "a view"
        elif saved:
            told = ", ".join(map(_code, saved))
        else:
            told = "nothing"
        rows.append((operation_name(each.node), _code(each.node), told))
    return table(("operation", "its node in the graph", "saved tensors that are recomputed"), rows)


def settings() -> str:
    """The fields of :class:`snn_revplugin.Settings`, with the text of its docstring."""
    described = dict(
        re.findall(
            r"^    (\w+): (.*(?:\n        .*)*)",
            inspect.getdoc(snn_revplugin.Settings),
            re.MULTILINE,
        )
    )
    defaults = snn_revplugin.Settings()
    names = type(defaults).__dataclass_fields__
    return table(
        ("setting", "default", ""),
        [
            (_code(name), _shown(getattr(defaults, name)), " ".join(described[name].split()))
            for name in names
        ],
    )


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _of_snntorch() -> Iterable[tuple[str, Any]]:
    module = importlib.import_module("snntorch.surrogate")
    for name, make in vars(module).items():
        if inspect.isfunction(make) and make.__module__ == module.__name__:
            yield name, make(*SURROGATES_NEED.get(name, ()))


def _of_spikingjelly() -> Iterable[tuple[str, Any]]:
    module = spikingjelly_adapter.host_surrogate
    for name, kind in vars(module).items():
        if (
            isinstance(kind, type)
            and issubclass(kind, module.SurrogateFunctionBase)
            and not name.endswith("Base")
        ):
            yield name, kind(*SURROGATES_NEED.get(name, ()))


def _path(kind: type) -> str:
    """Where users import a class from: the shortest module of its host that contains it."""
    parts = kind.__module__.split(".")
    modules = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return next(
        f"{name}.{kind.__name__}"
        for name in modules
        if getattr(sys.modules[name], kind.__name__, None) is kind
    )


def _shown(value: object) -> str:
    """A value of an option, in Markdown."""
    if isinstance(value, torch.Tensor):
        return "one value per neuron"
    if callable(value):
        return "a function" if inspect.isfunction(value) else _code(type(value).__name__)
    return _code(repr(value))


def _code(text: str) -> str:
    return f"`{text}`"

"""SpikingJelly's tools that find a neuron by its exact class: ours are added to their tables, or
refused with a sentence.

Most tools ask ``isinstance``, and our neurons are instances of the host's. Three do not:

* the configurations of ``distributed.vision`` have a public call to register a class;
* ``nir_exchange.export_to_nir`` makes its table anew at each export, in a private property, and
  what is not in it ends in nirtorch's bare ``KeyError``: the property is patched, so that the table
  has our rows too;
* ``precision`` sets up neurons of the host's three classes for its own Triton kernels and ignores
  any other silently: the private function is patched, so that ours are refused.

``op_counter`` knows no class, but counts the operations that run; under it our neurons run the
host's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch.nn as nn

from snn_revplugin.swap.module import ReversibleNeuron
from snn_revplugin.swap.patches import Patch, Patches, import_tool
from snn_revplugin.torch_internals import transforms

Swaps = Mapping[type[nn.Module], type[nn.Module]]

COUNTED = "SpikingJelly's op_counter counts the host's operations"


def why_counted() -> str | None:
    """The reason for the host's own path where one of SpikingJelly's counters watches the
    operations of this thread."""
    watched = any(
        type(mode).__module__.startswith("spikingjelly.") for mode in transforms.modes_at_work()
    )
    return COUNTED if watched else None


def register_in_vision(kinds: Sequence[type[nn.Module]]) -> None:
    """Register our classes with the configurations of ``distributed.vision``."""
    config = import_tool(
        "spikingjelly.activation_based.distributed.vision",
        "spikingjelly.activation_based.distributed.vision.config",
    )
    for each in kinds if config is not None else ():
        config.register_neuron_class(each)


def patches_for(swaps: Swaps, alone: Sequence[type[nn.Module]]) -> Patches:
    """The patches of the tools that this installation of SpikingJelly has.

    Args:
        swaps: our class for each of the host's.
        alone: classes of ours that no class of the host's stands for.
    """
    package = "spikingjelly.activation_based"
    return Patches(
        Patch(
            "export_to_nir",
            f"{package}.nir_exchange.to_nir",
            "_ModuleMapper.map_dict",
            lambda table: _with_our_rows(table, swaps, alone),
        ),
        Patch(
            "prepare_model_for_precision",
            f"{package}.precision.api",
            "_configure_triton_neurons",
            _refuse_ours,
        ),
    )


def _with_our_rows(hosts_table: property, swaps: Swaps, alone: Sequence[type]) -> property:
    def map_dict(mapper: Any) -> dict[type[nn.Module], Callable[[nn.Module], Any]]:
        table = hosts_table.fget(mapper)
        ours = {reversible: table[host] for host, reversible in swaps.items() if host in table}
        return {**table, **ours, **dict.fromkeys(alone, _refuse_nir)}

    return property(map_dict)


def _refuse_nir(module: nn.Module) -> NoReturn:
    raise TypeError(
        f"export_to_nir: NIR has no node for {type(module).__name__}, and SpikingJelly no neuron"
        " with its equations; export a net without it"
    )


def _refuse_ours(configure: Callable[[nn.Module, Any, Any], dict]) -> Callable:
    def configure_or_refuse(model: nn.Module, config: Any, device: Any) -> dict:
        ours = [
            name or "(the model itself)"
            for name, each in model.named_modules()
            if isinstance(each, ReversibleNeuron)
        ]
        if ours and config.neuron_storage is not None:
            raise TypeError(
                f"prepare_model_for_precision: neuron_storage={config.neuron_storage!r} asks for"
                " SpikingJelly's own Triton kernels, which reversible neurons do not use:"
                f" {', '.join(ours)}; call snn_revplugin.restore(model) first, or leave"
                " neuron_storage at None"
            )
        return configure(model, config, device)

    return configure_or_refuse

"""SpikingJelly's tools that find a neuron by its exact class: ours are entered in their tables, or
refused in words.

Most tools ask ``isinstance``, and our neurons are instances of the host's. Three do not:

* the configurations of ``distributed.vision`` have a public call to register a class;
* ``nir_exchange.export_to_nir`` makes its table anew at each export, in a private property, and
  what is not in it ends in nirtorch's bare ``KeyError``: the property is wrapped, so that the table
  has our rows too;
* ``precision`` sets up neurons of the host's three classes for its own Triton kernels and passes
  any other over in silence: the private function is wrapped, so that ours are refused.

``op_counter`` knows no class, but counts the operations that run; it is told to count the host's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch.nn as nn

from snn_revplugin.swap.module import ReversibleNeuron
from snn_revplugin.torch_internals import transforms

COUNTED = "SpikingJelly's op_counter is to count the host's operations"


def why_counted() -> str | None:
    """The reason for the host's own path where one of SpikingJelly's counters watches the
    operations of this thread."""
    watched = any(
        type(mode).__module__.startswith("spikingjelly.") for mode in transforms.modes_at_work()
    )
    return COUNTED if watched else None


def enter_in_tools(
    swaps: Mapping[type[nn.Module], type[nn.Module]], alone: Sequence[type[nn.Module]]
) -> None:
    """Make our neurons known to the tools that this installation of SpikingJelly has.

    Args:
        swaps: our class for each of the host's.
        alone: classes of ours that no class of the host's stands for.
    """
    for enter in (_enter_in_vision, _enter_in_nir, _refuse_neuron_precision):
        # Tools need packages that are missing or broken here, or were somewhere else in another
        # release: neurons do not care.
        with contextlib.suppress(Exception):
            enter(swaps, alone)


def _enter_in_vision(
    swaps: Mapping[type[nn.Module], type[nn.Module]], alone: Sequence[type[nn.Module]]
) -> None:
    from spikingjelly.activation_based.distributed.vision import config

    for each in (*swaps.values(), *alone):
        config.register_neuron_class(each)


def _enter_in_nir(
    swaps: Mapping[type[nn.Module], type[nn.Module]], alone: Sequence[type[nn.Module]]
) -> None:
    from spikingjelly.activation_based.nir_exchange import to_nir

    hosts_table = to_nir._ModuleMapper.map_dict.fget

    def map_dict(mapper: Any) -> dict[type[nn.Module], Callable[[nn.Module], Any]]:
        table = hosts_table(mapper)
        ours = {reversible: table[host] for host, reversible in swaps.items() if host in table}
        return {**table, **ours, **dict.fromkeys(alone, _refuse_nir)}

    to_nir._ModuleMapper.map_dict = property(map_dict)


def _refuse_nir(module: nn.Module) -> NoReturn:
    raise TypeError(
        f"export_to_nir: NIR has no node for {type(module).__name__}, and SpikingJelly no neuron"
        " with its equations; export a net without it"
    )


def _refuse_neuron_precision(
    swaps: Mapping[type[nn.Module], type[nn.Module]], alone: Sequence[type[nn.Module]]
) -> None:
    from spikingjelly.activation_based.precision import api

    configure = api._configure_triton_neurons

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

    api._configure_triton_neurons = configure_or_refuse

"""snnTorch's tools that would treat a neuron of ours as another one.

All of them ask ``isinstance``, which is right for ``RevLeaky`` and its kin. ``CoupledLeaky`` is a
``snntorch.Leaky`` too, for ``utils.reset`` and similar functions, but has other equations:
``export_nir`` would write a plain leaky neuron in its place. The private function that translates a
module is the only place to refuse it, so it is replaced while a coupled neuron exists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn as nn

from snn_revplugin.swap.patches import Patch, Patches


def _refuse(translate: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    def translate_or_refuse(module: nn.Module) -> Any:
        if getattr(module, "has_no_nir_node", False):
            raise TypeError(
                f"export_to_nir: NIR has no node for {type(module).__name__}, and snnTorch no"
                " neuron with its equations; export a net without it"
            )
        return translate(module)

    return translate_or_refuse


NIR_REFUSAL = Patches(
    Patch(
        "snntorch.export_nir.export_to_nir",
        "snntorch.export_nir",
        "_extract_snntorch_module",
        _refuse,
    )
)

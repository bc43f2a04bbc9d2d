"""snnTorch's tools that would take a neuron of ours for what it is not.

All of them ask ``isinstance``, which is right for ``RevLeaky``. ``CoupledLeaky`` is a
``snntorch.Leaky`` too, for the sake of ``utils.reset`` and its like, but has other equations:
``export_nir`` would write a plain leaky neuron in its place. The function that translates a module
is private and the only place to say so: it is wrapped.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch.nn as nn


def refuse_in_nir(alone: type[nn.Module]) -> None:
    """Make ``snntorch.export_nir`` raise a TypeError for a class of ours that no class of the
    host's stands for."""
    with contextlib.suppress(
        Exception
    ):  # nir is missing or broken here, or another release has the function elsewhere
        from snntorch import export_nir

        translate = export_nir._extract_snntorch_module

        def translate_or_refuse(module: nn.Module) -> Any:
            if isinstance(module, alone):
                raise TypeError(
                    f"export_to_nir: NIR has no node for {type(module).__name__}, and snnTorch no"
                    " neuron with its equations; export a net without it"
                )
            return translate(module)

        export_nir._extract_snntorch_module = translate_or_refuse

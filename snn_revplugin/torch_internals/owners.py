"""The bias that stands beside a weight in its module.

Autograd keeps no reference to a bias that needs no gradient, and a node does not know the module
that called it. So the modules of the process are looked through once, and again for a weight that
is new.
"""

from __future__ import annotations

import gc
import weakref

import torch.nn as nn
from torch.utils.weak import WeakTensorKeyDictionary

# of each weight its bias, or None where it has none
_biases: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def bias_beside(weight: nn.Parameter) -> nn.Parameter | None:
    """The bias of the module whose weight this is: ``bias`` for ``weight``, ``in_proj_bias`` for
    ``in_proj_weight``.

    Args:
        weight: a parameter of any module that is alive.

    Returns:
        None where no module has the weight, or has no bias beside it. Where several modules share
        the weight, the bias of one of them.
    """
    if weight not in _biases:
        _look_through_modules()
        _biases.setdefault(weight, None)
    found = _biases[weight]
    return found and found()


def _look_through_modules() -> None:
    for module in gc.get_objects():
        if not issubclass(type(module), nn.Module):
            continue
        parameters = module.__dict__.get("_parameters") or {}
        for name, weight in parameters.items():
            if weight is not None and "weight" in name:
                bias = parameters.get(name.replace("weight", "bias"))
                if bias is not None:
                    _biases[weight] = weakref.ref(bias)

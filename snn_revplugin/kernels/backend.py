"""The one place that decides: a neuron's arithmetic in fused Triton kernels, or in plain torch
code.

Triton is taken where the tensors are on CUDA, a kernel knows the neuron, its surrogate and its
dtypes, and has agreed with the plain code on a sample there (:mod:`.proof`); torch code everywhere
else. The setting ``backend`` overrules, see :class:`snn_revplugin.Settings`. With
``TRITON_INTERPRET=1`` in the environment before this package is imported, Triton's interpreter
stands in for CUDA, on any device: slow, and for tests.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING

from torch import Tensor

from ..settings import get_settings

if TYPE_CHECKING:
    from ..bptt.statistics import CallStatistics
    from ..neurons.coupled import Coupled
    from ..neurons.transition import Dynamics
    from .triton_coupled import TritonCoupled
    from .triton_neuron import TritonNeuron

    Equations = Dynamics | Coupled
    Kernels = TritonNeuron | TritonCoupled

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = "Triton kernels"
BY_SETTING = "torch code: the setting backend='torch'"
NO_CUDA = "torch code: the tensors are not on CUDA"


def select_backend(
    dynamics: Equations, current: Tensor, potential: Tensor, statistics: CallStatistics
) -> Equations | Kernels:
    """What computes a neuron's time steps: the dynamics themselves, or kernels behind the same
    interface.

    Args:
        current, potential: of the step, or of the first of a sequence.
        ledger: is told what was taken and why.

    Raises:
        RuntimeError: the setting asks for Triton, and it cannot be had.
    """
    wanted = get_settings().backend
    if wanted != "triton":
        if wanted == "torch":
            statistics.backend = BY_SETTING
            return dynamics
        if not (current.is_cuda or INTERPRETED):  # soon said, on a CPU
            statistics.backend = NO_CUDA
            return dynamics
    reason = why_not(current) or _why_not_for(
        dynamics, current, potential, on_trust=wanted == "triton" or INTERPRETED
    )
    if reason is None:
        statistics.backend = TRITON + (" in the interpreter" if INTERPRETED else "")
        return _fused(dynamics)
    if wanted == "triton":
        raise RuntimeError(f"backend: 'triton' was asked for by the settings, but {reason}")
    statistics.backend = f"torch code: {reason}"
    return dynamics


def why_not(tensor: Tensor | None = None) -> str | None:
    """Why Triton cannot be had here (for a tensor), or None if it can."""
    if not _installed():
        return (
            "Triton is not installed (it comes with builds of torch for CUDA; pip install triton)"
        )
    if not INTERPRETED and tensor is not None and not tensor.is_cuda:
        return (
            f"the tensors are on {tensor.device.type!r}, not on CUDA (TRITON_INTERPRET=1 runs the"
            " kernels in an interpreter)"
        )
    return None


def takes_triton(tensor: Tensor) -> bool:
    """Whether Triton's kernels pack and unpack spikes on this device. (On a CPU numpy does,
    whatever the settings say.)"""
    from .self_test import packing_failure

    wanted = get_settings().backend
    if wanted == "torch" or why_not(tensor) is not None:
        return False
    return wanted == "triton" or INTERPRETED or packing_failure(tensor.device) is None


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _why_not_for(
    dynamics: Equations, current: Tensor, potential: Tensor, on_trust: bool
) -> str | None:
    from .kernel_spec import why_no_kernel
    from .self_test import NOT_YET, failure

    key = current.dtype, potential.dtype, current.device, potential.device, on_trust
    known = dynamics.__dict__.setdefault("_why_no_kernel", {})
    reason = known.get(key, NOT_YET[0])
    if reason in NOT_YET:
        reason = why_no_kernel(dynamics, current, potential)
        if reason is None and not on_trust:
            reason = failure(dynamics, current, potential)
        known[key] = reason
    return reason


def _fused(dynamics: Equations) -> Kernels:
    """One for each dynamics, as chains of time steps go by identity."""
    from ..neurons.coupled import Coupled
    from .triton_coupled import TritonCoupled
    from .triton_neuron import TritonNeuron

    known = dynamics.__dict__.get("_fused")
    if known is None or known.plain is not dynamics or known.interpreted is not INTERPRETED:
        kind = TritonCoupled if isinstance(dynamics, Coupled) else TritonNeuron
        known = dynamics.__dict__["_fused"] = kind(dynamics, INTERPRETED)
    return known

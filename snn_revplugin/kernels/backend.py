"""The one place that decides: a neuron's arithmetic in fused Triton kernels, or in plain torch
code.

Kernels are used where the tensors are on CUDA, a kernel exists for the neuron, its surrogate and
its dtypes, and it agrees with the plain code on a sample there (:mod:`.self_test`); torch code
elsewhere. The setting ``backend`` overrides this, see :class:`snn_revplugin.Settings`. With
``TRITON_INTERPRET=1`` in the environment before this package is imported, Triton's interpreter
replaces CUDA, on any device: slow, and for tests.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Protocol

from torch import Tensor

from ..neurons.transition import States, Transition
from ..settings import get_settings

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = "Triton kernels"
BY_SETTING = "torch code: the setting backend='torch'"
OWN_CODE = "the module's own step"
NO_CUDA = "torch code: the tensors are not on CUDA"


class BackendNotes(Protocol):
    """Where a choice notes what computes a neuron's time steps, and why."""

    backend: str


class BackendChoice:
    """What computes one neuron's arithmetic: its equations in plain torch code, or fused kernels
    behind the same interface.

    The kernels for the last equations are kept: chains of time steps continue by identity.

    Args:
        notes: where the choice and its reason are noted.
    """

    __slots__ = ("_notes", "_plain", "_reasons", "_triton")

    def __init__(self, notes: BackendNotes) -> None:
        self._notes = notes
        self._plain: Transition | None = None
        self._triton: Transition | None = None
        self._reasons: dict[tuple, str | None] = {}

    def select(self, transition: Transition, current: Tensor, states: States) -> Transition:
        """The equations themselves, or kernels for them.

        Args:
            current, states: of the step, or the inputs and first states of a sequence.

        Raises:
            RuntimeError: the setting asks for Triton, and it is not available.
        """
        if transition.own_code:
            self._notes.backend = OWN_CODE
            return transition
        wanted = get_settings().backend
        if wanted == "torch":
            self._notes.backend = BY_SETTING
            return transition
        if wanted == "auto" and not (current.is_cuda or INTERPRETED):  # the usual case on a CPU
            self._notes.backend = NO_CUDA
            return transition
        reason = why_not(current) or self._why_not_for(
            transition, current, states, on_trust=wanted == "triton" or INTERPRETED
        )
        if reason is None:
            self._notes.backend = TRITON + (" in the interpreter" if INTERPRETED else "")
            return self._kernels_for(transition)
        if wanted == "triton":
            raise RuntimeError(f"backend: 'triton' was asked for by the settings, but {reason}")
        self._notes.backend = f"torch code: {reason}"
        return transition

    def _why_not_for(
        self, transition: Transition, current: Tensor, states: States, on_trust: bool
    ) -> str | None:
        from .self_test import CAPTURING, failure
        from .surrogate_constants import why_no_derivative

        if transition is not self._plain:
            self._plain, self._triton, self._reasons = transition, None, {}
        dtypes = tuple((each.dtype, each.device) for each in (current, *states))
        key = *dtypes, on_trust
        reason = self._reasons.get(key, CAPTURING)
        if reason == CAPTURING:  # the next call may test it
            reason = transition.why_no_kernel(current, states)
            reason = reason or why_no_derivative(transition.surrogate)
            if reason is None and not on_trust:
                reason = failure(transition, current, states)
            self._reasons[key] = reason
        return reason

    def _kernels_for(self, transition: Transition) -> Transition:
        from .fuse import fuse

        if self._triton is None or self._triton.interpreted is not INTERPRETED:
            self._triton = fuse(transition, INTERPRETED)
        return self._triton


def why_not(tensor: Tensor | None = None) -> str | None:
    """Why Triton is not available here (for a tensor), or None if it is."""
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

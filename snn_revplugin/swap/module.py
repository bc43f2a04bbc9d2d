"""What every adapter's neuron has, whatever its host: a switch, a ledger, and its dynamics as long
as they stay the same."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bptt.record import NeuronRecord
from ..settings import get_settings
from ..torch_internals import saved_tensors, transforms

PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
NO_GRADIENT = "no gradient is recorded"
OLDEST_COMPILER = "2.15"  # the oldest torch whose compiler was seen to trace the operators
HAS_COMPILER = torch.__version__ >= OLDEST_COMPILER


class ReversibleNeuron:
    """Mixed into a host's neuron class. Adds no parameter, buffer, memory or state_dict key.

    Attributes:
        reversible: False makes this neuron take its host's own path.
        compiled_keeps: what the backward of its last call under ``torch.compile`` reads; empty
            where there was none, or where the host's path was compiled.
    """

    reversible: bool = True
    # whether a call inside of somebody else's saved-tensor hooks is better than the host's
    saves_through_hooks = False
    compiled_keeps: str = ""

    @property
    def record(self) -> NeuronRecord:
        if (
            "_record" not in self.__dict__
        ):  # a neuron swapped in place never went through our constructor
            self.__dict__["_record"] = NeuronRecord()
        return self.__dict__["_record"]

    def note_fallback(self, reason: str) -> None:
        """The host's own path is taken."""
        if not torch.compiler.is_compiling():
            self.record.statistics.fell_back(reason)

    def why_fallback(
        self, current: Tensor, potential: Tensor | None, *parameters: Tensor
    ) -> str | None:
        """Why a call has to take the host's own path, or None if it need not."""
        if not torch.is_grad_enabled():
            return NO_GRADIENT
        if (
            transforms.is_transformed()
        ):  # before the settings: torch 2.6 cannot compile what looks them up
            return "torch.compile, tracing or a function transform is at work"
        if not self.reversible or not get_settings().reversible:
            return "switched off (reversible=False)"
        if not self.saves_through_hooks and saved_tensors.saved_tensor_hooks_active():
            return "another tool (a checkpoint, save_on_cpu) decides here how tensors are saved"
        if not isinstance(current, Tensor) or not current.is_floating_point():
            return "the input is not a floating-point tensor"
        if type(current) not in PLAIN_TENSORS or current.is_meta:
            return "the input is a tensor without elements, or of a class of its own"
        if not isinstance(potential, Tensor):
            return "the state is not a tensor"
        if not any(
            each is not None and each.requires_grad for each in (current, potential, *parameters)
        ):
            return NO_GRADIENT
        return None

    def takes_operators(self, current: Tensor, potential: Tensor, *parameters: Tensor) -> bool:
        """Under ``torch.compile``: whether :mod:`snn_revplugin.operators` can express a call.
        Otherwise the host's path is compiled. (Nothing in here may stop the tracing.)"""
        if (
            not HAS_COMPILER
            or not torch.is_grad_enabled()
            or not self.reversible
            or not get_settings().reversible
        ):
            return False
        if (
            transforms.is_transformed_while_compiling()
            or not isinstance(potential, Tensor)
            or not current.is_floating_point()
        ):
            return False
        if any(
            each.dtype != current.dtype or each.device != current.device
            for each in (potential, *parameters)
        ):
            return False
        return any(each.requires_grad for each in (current, potential, *parameters))

    def note_operators(self, keeps: str) -> None:
        """A compiled call went through operators whose backward reads ``keeps``."""
        self.compiled_keeps = (
            keeps  # written and never read by what is compiled, so that no guard hangs on it
        )

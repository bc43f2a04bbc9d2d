"""What every adapter's neuron has, whatever its host: the switch ``reversible``, a record of its
calls, and its equations for as long as they stay the same."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..bptt.record import NeuronRecord
from ..settings import get_settings
from ..torch_internals import saved_tensors, transforms
from ..torch_internals.tensors import PLAIN_TENSORS
from .patches import Patches

NO_GRADIENT = "no gradient is recorded"
# The oldest torch whose compiler traces the operators.
OLDEST_COMPILER = "2.14"
# torch.__version__ compares as a version, not as a string.
HAS_COMPILER = torch.__version__ >= OLDEST_COMPILER
COMPILED_WITHOUT_OPERATORS = (
    "no operator expresses the call"
    if HAS_COMPILER
    else f"the operators need torch {OLDEST_COMPILER}, this is {torch.__version__}"
)


class CompiledCalls:
    """What the last call under ``torch.compile`` that recorded a gradient does.

    Attributes:
        keeps: what the backward of its operator reads; empty where there was no such call.
        fallback: why the host's own path was compiled; empty where it was not.
    """

    def __init__(self) -> None:
        self.keeps = self.fallback = ""


class _HostSignature:
    """What :func:`inspect.signature` shows of a neuron class: the arguments of the host's
    constructor, then ``reversible``."""

    def __get__(self, neuron: Any, kind: type) -> inspect.Signature | None:
        if neuron is not None:
            raise AttributeError("an instance has the signature of its __call__")
        constructors = [each for each in kind.__mro__ if "__init__" in vars(each)]
        ours = constructors.index(ReversibleNeuron)
        if ours != 0:
            return None  # a subclass has a constructor of its own: its signature is that one's
        _, *shown = inspect.signature(constructors[1].__init__).parameters.values()
        place = len(shown) - (bool(shown) and shown[-1].kind is inspect.Parameter.VAR_KEYWORD)
        shown.insert(place, inspect.signature(ReversibleNeuron.__init__).parameters["reversible"])
        return inspect.Signature(shown)


class ReversibleNeuron:
    """Mixed into a host's neuron class. Adds no parameter, buffer, memory or state_dict key.

    Attributes:
        reversible: False makes this neuron take its host's own path.
        saves_through_hooks: whether a call inside another tool's saved-tensor hooks saves less than
            the host's.
        tool_patches: the changes to the host's tools that stand while such a neuron exists.
    """

    reversible: bool = True
    host_kind: ClassVar[type]  # of a class that was made at run time: what it was made from
    saves_through_hooks: ClassVar[bool] = False
    tool_patches: ClassVar[Patches] = Patches()
    __signature__ = _HostSignature()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Also how copies and unpickled neurons come to be.
        new = super().__new__
        neuron = new(cls) if new is object.__new__ else new(cls, *args, **kwargs)
        neuron.begin()
        return neuron

    def __init__(self, *args: Any, reversible: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reversible = reversible

    def begin(self) -> None:
        """Set up an instance that is new, or was of the host's class so far."""
        self.__dict__["_compiled_calls"] = CompiledCalls()
        self.tool_patches.hold(self)

    def step_from(self, current: Tensor, potential: Tensor) -> None:
        """One time step from a membrane potential, whatever state and step mode the neuron has.

        Raises:
            TypeError: the neuron runs by its own step.
        """
        raise TypeError(
            f"{type(self).__name__} runs by its own step, which is not reversed: its states are"
            " rebuilt forward, exactly"
        )

    def end(self) -> None:
        """Remove what the host's class does not have, before the instance becomes one of it."""
        for name in ("_record", "_compiled_calls", "reversible"):
            self.__dict__.pop(name, None)
        self.tool_patches.release(self)

    @property
    def record(self) -> NeuronRecord:
        """What the library remembers of this neuron. A shallow copy (a replica of
        ``nn.DataParallel``) gets one of its own, which counts in the same statistics."""
        record: NeuronRecord | None = self.__dict__.get("_record")
        if record is None or not record.belongs_to(self):
            of_other = () if record is None else (record.statistics, record.cache.memory_budget)
            record = self.__dict__["_record"] = NeuronRecord(self, *of_other)
        return record

    def note_fallback(self, reason: str) -> None:
        """Record that a call takes the host's own path."""
        if not torch.compiler.is_compiling():
            self.record.statistics.fell_back(reason)

    def why_fallback(
        self, current: Tensor, potential: Tensor | None, *parameters: Tensor
    ) -> str | None:
        """Why a call has to take the host's own path, or None if it need not."""
        if not torch.is_grad_enabled():
            return NO_GRADIENT
        if transforms.is_transformed():
            return "torch.compile, tracing or a function transform is at work"
        if not self.reversible or not get_settings().reversible:
            return "switched off (reversible=False)"
        if not self.saves_through_hooks and saved_tensors.saved_tensor_hooks_active():
            return "another tool (a checkpoint, save_on_cpu) decides how tensors are saved"
        if not isinstance(current, Tensor) or not current.is_floating_point():
            return "the input is not a floating-point tensor"
        if type(current) not in PLAIN_TENSORS or current.is_meta:
            return "the input is a tensor without elements, or of a class of its own"
        if not isinstance(potential, Tensor):
            return "the state is not a tensor"
        if current.requires_grad or potential.requires_grad:
            return None
        return None if any(each.requires_grad for each in parameters) else NO_GRADIENT

    def takes_operators(self, current: Tensor, potential: Tensor, *parameters: Tensor) -> bool:
        """Under ``torch.compile``: whether an operator of :mod:`snn_revplugin.compile` can express
        a call; otherwise the host's path is compiled. Nothing in here may stop the tracing."""
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
        """A compiled call goes through an operator whose backward reads ``keeps``."""
        # Written and never read by compiled code, so that no guard depends on it.
        self._compiled_calls.keeps, self._compiled_calls.fallback = keeps, ""

    def note_compiled_fallback(self) -> None:
        """A compiled call takes the host's own path."""
        if torch.is_grad_enabled():
            self._compiled_calls.keeps = ""
            self._compiled_calls.fallback = COMPILED_WITHOUT_OPERATORS

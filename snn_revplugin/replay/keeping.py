"""What a training step keeps under a memory budget: one step is observed, the next ones follow its
plan.

A step is the neuron calls between two backward passes, in their order. The first one keeps nothing
and notes what each call could keep. When its backward begins, :mod:`..budget` makes a plan of it,
which lives with the neuron that the step began with. A later step that begins with the same call
follows the plan as long as its calls are those of the plan. From the first other call on it keeps
nothing more, and its backward makes a new plan. So another batch size, model mode or net has a plan
of its own. A step with fewer calls keeps what the plan keeps of those; after the second one running
the next step is planned anew.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol

import torch
from torch import Tensor

from ..budget import LEAST, Plan, Unit, Value, bytes_of, plan_of
from ..settings import get_settings

# Floating-point operations of a weight layer in the time that moving a byte takes, by device type.
# A CPU core: 34e9 a second in convolutions, 25e9 bytes. An H100: data sheet.
OPERATIONS_PER_BYTE = {"cpu": 1.4, "cuda": 20.0}
MOST_PLANS = 16  # that live with a neuron
CHANGED = 2  # steps running with fewer calls than their plan
_current = threading.local()


class PlansHolder(Protocol):
    """What holds the plans of the steps that begin with a neuron, and dies with the neuron.

    Attributes:
        memory_budget: the neuron's own, in place of that of the settings; or None.
    """

    planned_steps: dict[tuple, PlannedStep]
    memory_budget: float | str | None


def observe(cache: PlansHolder, current: Tensor) -> CallInStep | None:
    """A neuron's call as part of a training step; None where the settings leave nothing to plan.

    Args:
        cache: of the neuron's walks.
        current: its input.
    """
    budget = cache.memory_budget or get_settings().memory_budget
    if budget == LEAST or current.grad_fn is None:
        return None
    step = getattr(_current, "step", None)
    if step is None or step.has_ended or step.budget != budget:
        step = _current.step = TrainingStep(budget)
    return step.call(cache, current)


class PlannedStep:
    """A step as it was observed, and the plan made of it.

    Attributes:
        calls: which neurons were called, and with what.
        units: what each call could keep.
        plan: what is kept of it.
        limit: the bytes that the budget allows, or None.
        shorter: how many of the last steps that followed the plan had fewer calls.
    """

    __slots__ = ("calls", "limit", "plan", "shorter", "units")

    def __init__(self, calls: list[tuple], units: list[Unit], limit: float | None) -> None:
        self.calls, self.units, self.limit = calls, units, limit
        self.plan: Plan = plan_of(units, limit)
        self.shorter = 0


class TrainingStep:
    """The neuron calls of a step under way.

    Args:
        budget: the setting under which it began.

    Attributes:
        has_ended: whether its backward has begun.
    """

    __slots__ = (
        "_calls",
        "_count",
        "_first",
        "_followed",
        "_units",
        "_used_last",
        "budget",
        "has_ended",
    )

    def __init__(self, budget: float | str) -> None:
        self.budget, self.has_ended = budget, False
        self._followed: PlannedStep | None = None
        self._first: tuple[weakref.ref[PlansHolder], tuple] | None = None
        self._count = 0
        self._calls: list[tuple] = []
        # of each weight that has been met, the last unit that uses it
        self._used_last: dict[tuple[int, int], Unit] = {}
        self._units: list[Unit] = []

    def call(self, cache: PlansHolder, current: Tensor) -> CallInStep:
        """The next call of the step."""
        kind = current.shape, current.dtype, current.device
        if self._first is None:
            self._first = weakref.ref(cache), (self.budget, *kind)
            self._followed = cache.planned_steps.get(self._first[1])
        position, followed = self._count, self._followed
        self._count += 1
        if followed is not None:
            if position < len(followed.calls) and _is_call(followed.calls[position], cache, kind):
                return CallInStep(self, kept=followed.plan.kept[position])
            # Another step than the plan's: keep no more of it, and plan it anew.
            self._calls, self._units = followed.calls[:position], followed.units[:position]
            self._followed = None
        unit = Unit(0, current.nbytes, [])
        self._calls.append((weakref.ref(cache), kind))
        self._units.append(unit)
        return CallInStep(self, unit=unit)

    def uses(self, weight: Tensor, unit: Unit) -> None:
        """A weight layer on the way to a unit has been met, whose gradient backward will hold."""
        if weight.requires_grad:
            key = weight.data_ptr(), weight.nbytes
            last = self._used_last.get(key)
            if last is not None:
                last.gradients -= weight.nbytes
            unit.gradients += weight.nbytes
            self._used_last[key] = unit

    def end(self) -> None:
        """Backward begins: plan the step, unless it followed a plan."""
        if self.has_ended:
            return
        self.has_ended = True
        cache, followed = self._first[0](), self._followed
        if cache is None:
            return
        plans, key = cache.planned_steps, self._first[1]
        if followed is not None:
            followed.shorter = followed.shorter + 1 if self._count < len(followed.calls) else 0
            if followed.shorter >= CHANGED:
                plans.pop(key, None)
            return
        if key not in plans and len(plans) >= MOST_PLANS:
            del plans[next(iter(plans))]
        *_, device = key
        limit = bytes_of(self.budget, device_bytes(device))
        plans[key] = PlannedStep(self._calls, self._units, limit)


def _is_call(call: tuple, cache: PlansHolder, kind: tuple) -> bool:
    return call[0]() is cache and call[1] == kind


class CallInStep:
    """A call of a neuron: whether each value that its walk meets is kept.

    Args:
        step: which the call is part of.
        unit: where the values are noted, in a step that is observed.
        kept: the plan for the values, in a step that follows one.
    """

    __slots__ = ("_kept", "_met", "_unit", "_work", "step")

    def __init__(
        self, step: TrainingStep, unit: Unit | None = None, kept: tuple[bool, ...] = ()
    ) -> None:
        self.step, self._unit, self._kept, self._met, self._work = step, unit, kept, 0, 0.0

    @property
    def observes(self) -> bool:
        """Whether the call notes what could be kept."""
        return self._unit is not None

    def computes(
        self, nbytes: int, device: torch.device, operations: float = 0, weight: Tensor | None = None
    ) -> None:
        """An operation on the way to the neuron has been met.

        Args:
            nbytes: of its output.
            device: that it runs on.
            operations: of floating-point numbers, of a weight layer.
            weight: of a weight layer.
        """
        unit = self._unit
        unit.largest = max(unit.largest, nbytes)
        self._work += nbytes + operations / OPERATIONS_PER_BYTE.get(device.type, 1.0)
        if weight is not None:
            self.step.uses(weight, unit)

    def keeps(self, nbytes: int) -> bool:
        """Whether the next value is kept: what the operations met since the last one compute."""
        work, self._work, met = self._work, 0.0, self._met
        self._met += 1
        if self._unit is None:
            return met < len(self._kept) and self._kept[met]
        self._unit.values.append(Value(nbytes, work))
        return False

    def holds(self, nbytes: int) -> None:
        """The call has kept so many bytes in any case."""
        if self._unit is not None:
            self._unit.stays += nbytes


def device_bytes(device: torch.device) -> int:
    """The memory of a device in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

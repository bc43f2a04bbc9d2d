"""Any neuron: its time step is the module's own code.

There are no equations here. Forward runs the module. Backward runs a copy of it again, forward from
the nearest states that are held, and then differentiates one time step at a time through a graph of
that step alone:

    outputs, after = step(x, before)                       forward, without a graph
    outputs, after = step(x, before), with a graph         backward, one step at a time
    grad_x, grad_before, grad_parameters = vjp of that graph

So the neuron keeps its outputs, its input as a recipe, and all its states every few steps. What an
adapter tells of its host is a :class:`HostStep`; what :mod:`.trial` found out about the module is a
:class:`StepTraits`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn as nn
from torch import Tensor

from ..neurons.differentiable import differentiable_outputs, differentiable_step
from ..neurons.transition import (
    Derivative,
    Gradients,
    GraphNodes,
    Needed,
    States,
    Transition,
)
from ..packed.integers import PackedIntegers
from ..packed.values import PackedValues
from ..torch_internals import capture
from ..torch_internals.autocast import AutocastState
from ..torch_internals.pass_cache import pass_cache
from ..torch_internals.versioned import Versioned
from .chain import ChainLink, StepView
from .module_copy import Snapshot, copy_of
from .outputs import HeldOutputs, PackedOutputs
from .rows import Rows
from .surroundings import Places, Positions, Surroundings, Watch


class HostStep(Protocol):
    """How an adapter runs one time step of its host's modules, whose states the module holds.

    Attributes:
        kind: the host's (or the user's) class, whose step it is.
        whole: whether the step is a call on a whole sequence, which may give out more than outputs
            and states: what else it gives counts as states after it.
    """

    kind: type[nn.Module]
    whole: bool

    def states(self, module: nn.Module) -> tuple:
        """The states that the module holds."""

    def hold(self, module: nn.Module, states: tuple) -> None:
        """Make the module hold other states."""

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """One step from the states that the module holds: the outputs."""

    def fire(self, module: nn.Module, state: Tensor) -> Tensor | None:
        """The outputs from the last state after the step, where the host computes them so."""


@dataclass(frozen=True)
class StepTraits:
    """What is known of a module's time step.

    Attributes:
        nodes: ``GraphNodes.FIRE`` where the outputs are computed from the last state that is given
            out, else ``GraphNodes.ONE``.
        fed_back: whether the outputs are the first state, as in a recurrent neuron.
        writes_states: whether the step writes into the states in place.
        written: the names of the module's entries that a step writes, the states among them.
        counters: those of them that are numbers or strings.
        draws: whether a step drew random numbers when it was tried.
        detached: which of the outputs and the states after have no gradient, by position.
        rows: of a call on a whole sequence, the rows that it does not mix.
    """

    nodes: GraphNodes
    fed_back: bool
    writes_states: bool
    written: frozenset[str]
    counters: Places = ()
    draws: bool = False
    detached: tuple[int, ...] = ()
    rows: Rows | None = None


def run_step(host: HostStep, module: nn.Module, x: Tensor, states: States) -> tuple[Tensor, States]:
    """One time step of a module from explicit states, which it holds afterwards as the host leaves
    them."""
    host.hold(module, states)
    outputs = host.run(module, x)
    return outputs, host.states(module)


class AnyNeuron(Transition):
    """A module's time step as a transition.

    Args:
        host: runs it.
        module: held weakly: its states refer to this transition through the graph.
        traits: of the step.
        x: an input of the step.
    """

    reads_input = True
    reads_before = True
    single_steps_only = True
    own_code = True

    def __init__(self, host: HostStep, module: nn.Module, traits: StepTraits, x: Tensor) -> None:
        self.host, self.traits = host, traits
        self.nodes, self.fed_back = traits.nodes, traits.fed_back
        self.parameters = tuple(each for each in module.parameters() if each.requires_grad)
        self._module = weakref.ref(module)
        self._snapshot = Snapshot(module, traits.written)
        self._copy, self._lock = copy_of(module, host.kind), threading.Lock()
        self._aliases = tuple(each for each in self._copy.parameters() if each.requires_grad)
        self._autocast = AutocastState.now(x.device.type)
        self._watch = Watch(self._copy, x, traits.counters)
        self._link: ChainLink | None = None
        self.note_versions()

    def still_fits(self, module: nn.Module) -> bool:
        """Whether nothing but what a step writes has changed in the module."""
        if self._module() is not module or next(self._snapshot.written(), None) is not None:
            return False
        return self._autocast == AutocastState.now(self._autocast.device_type)

    # ------------------------------------------------------------------------------ one time step

    def begin(self, x: Tensor, states: States) -> AnyParts:
        module = self._module()  # it is alive: it is being called
        noted = self._watch.now(module, x)
        outputs, after = run_step(self.host, module, x, self._writable(states))
        return AnyParts(outputs, after, self._watch.since(noted))

    def again(self, view: StepView, states: States) -> tuple[None, States]:
        return None, self.run(view.current, states, view.link)[1]

    def charged_of(self, view: StepView) -> Tensor:
        return view.after[-1]  # from which the node that fires computes the outputs

    def vjp(
        self, view: StepView, grad_outputs: Tensor | None, grad_states: Gradients, needed: Needed
    ) -> Derivative:
        if self.fed_back:
            grad_states = None, *grad_states
        return self._vjp(view, (grad_outputs, *grad_states), needed)

    def vjp_of_charge(self, view: StepView, grad_charged: Gradients, needed: Needed) -> Derivative:
        return self._vjp(view, (None, *grad_charged), needed)

    def _vjp(self, view: StepView, gradients: Gradients, needed: Needed) -> Derivative:
        before = tuple(map(_leaf, view.before))
        with torch.enable_grad():
            x = _leaf(view.current)
            outputs, after = self.run(x, before, view.link)
        inputs = x, *before, *self._chosen(needed)
        found = _gradients((outputs, *after), inputs, gradients)
        if view.link.surroundings is not None:
            pass_cache().pop(view.link.surroundings, None)  # where the step left the generators
        count = 1 + len(before)
        grad_x = torch.zeros_like(x) if found[0] is None else found[0]
        return grad_x, found[1:count], _for_needed(found[count:], needed)

    def vjp_of_fire(
        self, view: StepView, grad_outputs: Tensor, needed: Needed
    ) -> tuple[Tensor, Gradients]:
        state = _leaf(view.after[-1])
        with torch.enable_grad():
            outputs = self.fire(state)
        found = _gradients((outputs,), (state, *self._chosen(needed)), (grad_outputs,))
        return found[0], _for_needed(found[1:], needed)

    def _chosen(self, needed: Needed) -> list[Tensor]:
        return [each for each, wanted in zip(self._aliases, needed, strict=True) if wanted]

    def run(self, x: Tensor, states: States, link: ChainLink) -> tuple[Tensor, States]:
        """A step of the copy, which holds no state afterwards, in the surroundings of a step that
        has been taken."""
        if link.surroundings is None:
            return self._run(x, states)
        start = self._start_of(link)
        with self._watch.restored(self._copy, start, link.surroundings.counters) as left:
            result = self._run(x, states)
        if left:
            pass_cache()[link.surroundings] = tuple(left)
        return result

    def _run(self, x: Tensor, states: States) -> tuple[Tensor, States]:
        with self._lock, self._autocast.restored():
            held = self.host.states(self._copy)
            try:
                return run_step(self.host, self._copy, x, self._writable(states))
            finally:
                self.host.hold(self._copy, held)

    def _start_of(self, link: ChainLink) -> Positions | None:
        """Where the generators stood before a step that drew: kept, or where the step before left
        them, which is repeated if it has not been in this pass."""
        found, below = link.surroundings, link.before
        if not found.drew or found.start is not None:
            return found.start
        left = pass_cache().get(below.surroundings)
        if left is None:
            self.run(below.current.compute(), below.before.states(), below)
            left = pass_cache().get(below.surroundings)
        return left

    def fire(self, state: Tensor) -> Tensor:
        """The outputs from the last state."""
        with self._lock, self._autocast.restored():
            return self.host.fire(self._copy, state)

    def note_versions(self) -> None:
        # By version alone: a recurrent layer's weights are large.
        self._versions, self._values = [Versioned(each.detach()) for each in self.parameters], ()

    def _writable(self, states: States) -> States:
        return tuple(each.clone() for each in states) if self.traits.writes_states else states

    # ----------------------------------------------------- gradients that are differentiated again

    def with_parameters(self, parameters: Sequence[Tensor]) -> AnyNeuron:
        other = object.__new__(AnyNeuron)
        other.__dict__.update(self.__dict__)
        other._copy = copy_of(self._copy, self.host.kind)
        _give_parameters(other._copy, list(parameters))
        return other

    def at(self, link: ChainLink) -> AnyNeuron:
        other = object.__new__(AnyNeuron)
        other.__dict__.update(self.__dict__)
        other._link = link
        return other

    def charge_again(self, x: Tensor, states: States) -> States:
        return self.run(x, states, self._link)[1]


@differentiable_step.register
def _(transition: AnyNeuron, x: Tensor, states: States) -> tuple[Tensor, States]:
    return transition.run(x, states, transition._link)


@differentiable_outputs.register
def _(transition: AnyNeuron, charged: Tensor) -> Tensor:
    return transition.fire(charged)


class AnyParts:
    """A time step that has been taken, see ``neurons.transition.StepParts``."""

    __slots__ = ("_after", "_outputs", "surroundings")

    charged = None
    reset_signal = None

    def __init__(self, outputs: Tensor, after: States, surroundings: Surroundings | None) -> None:
        self._outputs, self._after, self.surroundings = outputs, after, surroundings

    def fire(self) -> tuple[Tensor | PackedOutputs | HeldOutputs, Tensor]:
        return kept_outputs(self._outputs), self._outputs

    def states(self) -> States:
        return self._after


def kept_outputs(outputs: Tensor) -> Tensor | PackedOutputs | HeldOutputs:
    """What is kept of a step's outputs: zeros and ones, to be packed; small whole numbers, or few
    different numbers, packed; other numbers as they are."""
    if not capture.may_synchronise(outputs):
        return HeldOutputs(outputs)
    fired = outputs != 0
    if torch.equal(outputs == 1, fired):
        return fired
    packed = PackedIntegers.of(outputs) or PackedValues.of(outputs)
    return HeldOutputs(outputs) if packed is None else PackedOutputs(packed, outputs)


def _leaf(tensor: Tensor) -> Tensor:
    leaf = tensor.detach()
    return leaf.requires_grad_() if leaf.is_floating_point() else leaf


def _gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], gradients: Gradients
) -> Gradients:
    """The gradients at the inputs of a step; None for one that the outputs do not depend on."""
    pairs = [
        (output, gradient)
        for output, gradient in zip(outputs, gradients, strict=True)
        if gradient is not None and output.requires_grad
    ]
    wanted = [each for each in inputs if each.requires_grad]
    if not pairs or not wanted:
        return (None,) * len(inputs)
    heads, at_heads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(heads, wanted, at_heads, allow_unused=True))
    return tuple(next(found) if each.requires_grad else None for each in inputs)


def _for_needed(found: Gradients, needed: Needed) -> Gradients:
    gradients = iter(found)
    return tuple(next(gradients) if wanted else None for wanted in needed)


def _give_parameters(module: nn.Module, parameters: list[Tensor]) -> None:
    """Replace the learned parameters of a copy, in their order."""
    given, seen = iter(parameters), {}
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None and parameter.requires_grad:
                if id(parameter) not in seen:
                    seen[id(parameter)] = next(given)
                each._parameters[name] = seen[id(parameter)]

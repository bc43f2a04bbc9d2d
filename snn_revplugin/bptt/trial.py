"""The trial of a module's time step, at its first call: may backward run it again?

Everything runs on copies of the module, so the module itself is not touched, and neither are the
random generators. The step is taken as the host takes it and from explicit states, and once more;
outputs and states must agree bit for bit. What it reads beside its input and its states, and what
it changes, must be known.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Container, Sequence
from typing import Protocol

import torch
import torch.nn as nn
from torch import Tensor

from ..neurons.transition import GraphNodes, States, Transition
from ..torch_internals import capture
from ..torch_internals.graph import nodes_below
from .any_neuron import AnyNeuron, HostStep, StepTraits, run_step
from .module_copy import PLAIN, Snapshot, copy_of, entries_of
from .rows import Rows, close, find_rows
from .surroundings import Places, generators_of, positions_of, set_positions

Inputs = Sequence[Tensor]
HostCall = Callable[[nn.Module, Inputs], Sequence[Tensor]]


FEW_STEPS, SAMPLES = 3, 2  # whose gradients are compared
# What a neuron's step is expected to do.
ONE_TENSOR = "a step must return one floating-point tensor of outputs, beside its states"
AS_MANY_STATES = "a step must return as many states as it takes"
TENSOR_STATES = "every state must be a floating-point tensor"
NO_WRITES = "a step must not write into its input: write x = f(x) in place of x.f_()"


class Record(Protocol):
    """Where a neuron remembers its trial and its transition."""

    trials: dict[object, Trial]
    latest_transition: Transition | None

    def remember(self, transition: Transition) -> None: ...


class Unsuitable(Exception):
    """Why a module's step cannot be run again in backward."""


class BadStep(Unsuitable):
    """Why a module's step is no time step of a neuron.

    Args:
        came: what the step did.
        expected: what a step must do.
    """

    def __init__(self, came: str, expected: str) -> None:
        super().__init__(came, expected)
        self.expected = expected

    def __str__(self) -> str:
        return str(self.args[0])


def any_neuron(
    host: HostStep,
    module: nn.Module,
    inputs: Inputs,
    states: States,
    call: HostCall,
    record: Record,
) -> AnyNeuron | Unsuitable:
    """The transition of a module's own step, or why there is none. That of the last call is used
    again as long as nothing but what a step writes has changed in the module.

    Args:
        host: runs the module's step.
        module: as it is before the call.
        inputs: of one time step, or of each of several.
        states: from which the library takes the first step.
        call: takes all steps on a copy of the module, from the states that the copy holds, as the
            host takes them, and gives the outputs of each.
        record: the neuron's own.
    """
    current = record.latest_transition
    if isinstance(current, AnyNeuron) and current.host is host and current.still_fits(module):
        return current
    trial = record.trials.get(host)
    if trial is None or not trial.holds_for(module):
        trial = record.trials[host] = Trial(module, try_steps(host, module, inputs, states, call))
    outcome = trial.outcome
    if isinstance(outcome, Unsuitable):
        return outcome
    if outcome.draws and not capture.may_synchronise(inputs[0]):
        return Unsuitable("its step draws random numbers while a CUDA graph is captured")
    transition = AnyNeuron(host, module, outcome, inputs[0])
    record.remember(transition)
    return transition


class Trial:
    """The outcome of a trial, and for how long it holds: until one of the module's attributes
    changes that is no tensor, and that no step writes. A step that cannot be run again is tried
    anew only in the other training mode."""

    __slots__ = ("_snapshot", "_training", "outcome")

    def __init__(self, module: nn.Module, outcome: StepTraits | Unsuitable) -> None:
        self.outcome, self._training, self._snapshot = outcome, module.training, None
        if isinstance(outcome, StepTraits):
            self._snapshot = Snapshot(module, outcome.written)

    def holds_for(self, module: nn.Module) -> bool:
        """Whether the module is still as it was tried."""
        if self._snapshot is None:
            return module.training is self._training
        return all(isinstance(place.get(name), Tensor) for place, name in self._snapshot.written())


def try_steps(
    host: HostStep, module: nn.Module, inputs: Inputs, states: States, call: HostCall
) -> StepTraits | Unsuitable:
    """Try a module's time steps on copies; arguments as of :func:`any_neuron`.

    Returns:
        What a step is like, or why it cannot be run again.
    """
    printed, start = io.StringIO(), _Start(host, module, inputs[0])
    outcome: StepTraits | Unsuitable
    try:
        with torch.no_grad(), contextlib.redirect_stdout(printed):
            detached = [each.detach() for each in inputs]
            outcome = _try(start, detached, tuple(s.detach() for s in states), call)
    except Unsuitable as reason:
        outcome = type(reason)(*reason.args)  # a new one: this one refers to all frames of a trial
    except Exception as error:  # of the module's code: the host's own call raises it again
        outcome = Unsuitable(f"a trial of its step raised {type(error).__name__}: {error}")
    finally:
        start.rewind()
    return Unsuitable("its step prints") if printed.getvalue() else outcome


class _Start:
    """Where each part of a trial starts: the module and the random generators as they were.

    Args:
        host: runs the module's step.
        module: as it is before the call.
        x: the input of the first step.
    """

    def __init__(self, host: HostStep, module: nn.Module, x: Tensor) -> None:
        self.host, self.module = host, module
        self.generators = generators_of(module, x)
        self.positions = positions_of(self.generators)

    def rewind(self) -> bool:
        """Set the generators back; whether any of them was used."""
        now = positions_of(self.generators)
        drew = not all(map(torch.equal, now, self.positions))
        if drew:
            set_positions(self.generators, self.positions)
        return drew

    def fresh(self) -> nn.Module:
        """A copy of the module, with the generators set back."""
        self.rewind()
        return copy_of(self.module, self.host.kind)


def _try(start: _Start, inputs: Inputs, states: States, call: HostCall) -> StepTraits:
    host = start.host
    as_host = start.fresh()
    fresh = [each.clone() for each in inputs]  # the host may write into them
    expected = *call(as_host, fresh), *host.states(as_host)
    inputs = [each.clone() for each in inputs]
    copy, count, outputs = start.fresh(), None if host.whole else len(states), []
    given = after = tuple(each.clone() for each in states)
    versions = [each._version for each in given]
    for x in inputs:
        version = x._version
        output, after = _checked(*run_step(host, copy, x, after), count)
        if x._version != version:
            raise BadStep("its step writes into its input", NO_WRITES)
        outputs.append(output)
    writes_states = [each._version for each in given] != versions
    draws = start.rewind()
    if not _equal(expected, (*outputs, *after)):
        raise Unsuitable("its steps from given states are not those that the host takes")
    snapshot, x = Snapshot(copy), inputs[0]
    outputs, after = _checked(*run_step(host, copy, x, _clones(states)), count)
    written = frozenset(name for _, name in snapshot.written())
    _check_leaves(start.module, written)
    counters = _spoil(copy, snapshot)
    start.rewind()
    if not _equal((outputs, *after), _flat(run_step(host, copy, x, _clones(states)))):
        raise Unsuitable("its step reads what an earlier step wrote, beside its states")
    if not host.whole:  # else there is nothing between two steps to compare
        _check_gradients(start, inputs, states, call)
    nodes, detached = _nodes(start, x, states)
    return StepTraits(
        nodes=nodes,
        fed_back=len(after) > 0 and outputs is after[0],
        writes_states=writes_states,
        written=written,
        counters=counters,
        draws=draws,
        detached=detached,
        rows=_rows(start, x, states) if host.whole and not draws else None,
    )


def _clones(states: States) -> States:
    return tuple(each.clone() for each in states)


def _flat(result: tuple[Tensor, States]) -> tuple[Tensor, ...]:
    return result[0], *result[1]


def _check_leaves(module: nn.Module, written: Container[str]) -> None:
    for _, name, value in entries_of(module):
        has_graph = isinstance(value, Tensor) and value.grad_fn is not None
        if has_graph and name not in written:
            raise Unsuitable(f"it holds {name!r}, a tensor with a graph of its own")


def _checked(outputs: object, states: tuple, count: int | None) -> tuple[Tensor, States]:
    """Outputs and states of a step, all of them tensors."""
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        raise BadStep(f"its step returns {_named(outputs)} as its outputs", ONE_TENSOR)
    if count is not None and len(states) != count:
        raise BadStep(f"its step turns {count} states into {len(states)}", AS_MANY_STATES)
    for number, each in enumerate(states):
        if not isinstance(each, Tensor) or not each.is_floating_point():
            raise BadStep(f"its step leaves {_named(each)} as state {number}", TENSOR_STATES)
    own = states[1:] if states and states[0] is outputs else states
    if len({id(each) for each in (outputs, *own)}) != len(own) + 1:
        raise Unsuitable("two of its outputs and states are one tensor")
    return outputs, states


def _named(value: object) -> str:
    """What came in the place of a floating-point tensor."""
    is_tensor = isinstance(value, Tensor)
    return f"a tensor of {value.dtype}" if is_tensor else f"an object of {type(value).__name__}"


def _equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(
        isinstance(a, Tensor) and a.dtype == b.dtype and a.shape == b.shape and _same_numbers(a, b)
        for a, b in zip(one, other, strict=True)
    )


def _same_numbers(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _spoil(copy: nn.Module, snapshot: Snapshot) -> Places:
    """Spoil the tensors that a step has written, to see whether the next one reads them. Counters
    become what they were: backward's steps get theirs back.

    Returns:
        Where the counters are.
    """
    holders = [(name, each.__dict__) for name, each in copy.named_modules()]
    counters = []
    for place, name, before in list(snapshot.written_since()):
        value = place.get(name)
        holder = next((each for each, attributes in holders if attributes is place), None)
        if isinstance(value, Tensor):
            # Not NaN alone: a comparison swallows it.
            place[name] = torch.full_like(value, 1e9) if value.numel() else value
        elif holder is not None and type(value) in PLAIN and type(before) in PLAIN:
            place[name] = before
            counters.append((holder, name))
        elif value is not None:
            raise Unsuitable(
                f"its step changes the attribute {name!r}, which is neither a tensor nor a number"
            )
    return tuple(counters)


def _check_gradients(start: _Start, inputs: Inputs, states: States, call: HostCall) -> None:
    """Compare the gradients of the host's steps with those of single steps one after the other, for
    a few steps of a few samples. A host that cuts the graph between its steps learns otherwise."""
    host, few = start.host, [_samples(each) for each in inputs[:FEW_STEPS]]
    gradients = []
    for as_host in (True, False):
        copy = start.fresh()
        with torch.enable_grad():
            leaves = [each.clone().requires_grad_() for each in few]
            outputs, after = [], tuple(_samples(each).clone() for each in states)
            if as_host:
                host.hold(copy, after)
                outputs = list(call(copy, leaves))
            else:
                for x in leaves:
                    output, after = run_step(host, copy, x, after)
                    outputs.append(output)
            loss = sum((i + 1) * each.sin().sum() for i, each in enumerate(outputs))
            wanted = [*leaves, *(each for each in copy.parameters() if each.requires_grad)]
            if not loss.requires_grad:
                return
            gradients.append(torch.autograd.grad(loss, wanted, allow_unused=True))
    for theirs, ours in zip(*gradients, strict=True):
        if not close(theirs, ours):
            raise Unsuitable("its steps one after the other have other gradients than the host's")


def _samples(tensor: Tensor) -> Tensor:
    return tensor[:SAMPLES] if tensor.dim() > 1 else tensor


def _rows(start: _Start, x: Tensor, states: States) -> Rows | None:
    """The rows of a call on a whole sequence."""

    def run(x: Tensor, states: States) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        copy = start.fresh()
        given = _flat(run_step(start.host, copy, x, _clones(states)))
        return given, [each for each in copy.parameters() if each.requires_grad]

    return find_rows(run, x, states)


def _nodes(start: _Start, x: Tensor, states: States) -> tuple[GraphNodes, tuple[int, ...]]:
    """Where the host's graph of a step has nodes that a gradient can be asked for at, and which of
    its outputs and states have no gradient."""
    host, copy = start.host, start.fresh()
    with torch.enable_grad():
        leaves = [each.detach().requires_grad_() for each in (x, *states)]
        given = _flat(run_step(host, copy, leaves[0], _clones(tuple(leaves[1:]))))
        _check_no_graph_left(copy, given)
        detached = tuple(i for i, each in enumerate(given) if not each.requires_grad)
        return GraphNodes.ONE if host.whole else _nodes_of(host, copy, given), detached


def _nodes_of(host: HostStep, copy: nn.Module, given: tuple[Tensor, ...]) -> GraphNodes:
    outputs, after = given[0], given[1:]
    last = after[-1]
    if last is outputs or last.grad_fn is None or last.grad_fn not in nodes_below(outputs.grad_fn):
        return GraphNodes.ONE
    if after[0] is outputs:  # fed back: the library gives both out of one node
        return GraphNodes.ONE
    fired = host.fire(copy, last.detach())
    return GraphNodes.ONE if fired is None or not torch.equal(fired, outputs) else GraphNodes.FIRE


def _check_no_graph_left(module: nn.Module, given: Sequence[Tensor]) -> None:
    """A tensor that a step leaves in the module, beside its outputs and states, would have no
    gradient in the library's graph."""
    for _, name, value in entries_of(module):
        has_graph = isinstance(value, Tensor) and value.grad_fn is not None
        if has_graph and not any(value is each for each in given):
            raise Unsuitable(f"it leaves {name!r}, which has a gradient and is no state")

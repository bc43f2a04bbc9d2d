"""How exactly a neuron's membrane potentials are reversed in time, measured: forward, backward
through time, and the largest difference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType

import torch
import torch.nn as nn
from torch import Tensor

from ..bptt.anchors import anchoring_of
from ..bptt.record import NeuronRecord
from ..bptt.step import step
from ..neurons.transition import Derivative, StepView, Transition
from ..settings import use_settings
from ..swap.module import CompiledCalls, ReversibleNeuron
from ..swap.table import reversible_class, swap_for


@dataclass(frozen=True)
class Reversibility:
    """How well a neuron's potentials were reconstructed.

    Attributes:
        error: the largest difference between a potential and its reconstruction.
        largest: the largest potential, to measure the error by.
        invertible: whether the dynamics have an inverse.
        reversed: whether it was used; otherwise potentials were rebuilt forward, exactly, from an
            earlier anchor.
        steps_between_anchors: the number of steps from one anchor to the next. Of two states
            backward rebuilds most of these, and few are stored.
        time_steps: the number of steps taken forward and backward.
    """

    error: float
    largest: float
    invertible: bool
    reversed: bool
    steps_between_anchors: int
    time_steps: int

    def __float__(self) -> float:
        return self.error

    def __str__(self) -> str:
        if self.reversed:
            how = "reversed with"
        elif self.invertible:
            how = (
                "the inverse would lose too much (a short mantissa, a decay near 0, coupling,"
                " settings): rebuilt forward from"
            )
        else:
            how = (
                "the dynamics have no inverse (a hard reset forgets the potential that fired):"
                " rebuilt forward from"
            )
        every = f"an anchor every {self.steps_between_anchors} of {self.time_steps} steps"
        return (
            f"{how} {every}; largest error {self.error:.3g} of potentials up to {self.largest:.3g}"
        )


def check_reversible(
    neuron: nn.Module,
    currents: Tensor | None = None,
    *,
    time_steps: int = 100,
    shape: tuple[int, ...] = (8, 64),
    seed: int = 0,
) -> Reversibility:
    """Run a neuron forward from a potential of zero, then backward through time as a backward pass
    would, and compare.

    The neuron itself, its state and its hooks stay as they are. Where a neuron takes a whole
    sequence in one call, a backward pass scans it forward and reverses nothing; this function takes
    single steps.

    Args:
        neuron: a reversible neuron, or a host's neuron that ``convert`` would swap.
        currents: its input currents, ``[T, ...]``, floating point; by default random ones of
            ``[time_steps, *shape]`` around the threshold.
        time_steps, shape, seed: of the random currents.

    Returns:
        The largest error, and the figures to judge it by.

    Raises:
        TypeError: the module is no neuron whose equations are known.
        ValueError: the currents are no sequence of floating-point tensors, or the neuron takes the
            host's own path; the message gives the reason.

    >>> from snn_revplugin.adapters.snntorch import RevLeaky
    >>> check_reversible(RevLeaky(beta=0.9)).error < 1e-5
    True
    """
    if currents is not None and (
        currents.dim() == 0 or len(currents) == 0 or not currents.is_floating_point()
    ):
        raise ValueError(
            f"currents must be floating point and [T, ...] with T > 0, got {currents.dtype}"
            f" {tuple(currents.shape)}"
        )
    probe = _probe(neuron)
    with torch.enable_grad():
        sample = _random(probe, (1, *shape), seed)[0] if currents is None else currents[0].detach()
        transition = _transition_of(probe, sample)
        if currents is None:
            threshold = transition.thresholds[1]
            currents = _random(probe, (time_steps, *shape), seed) * threshold + threshold / 2
        # Kernels hand a potential down without showing it; their arithmetic is that of plain code.
        with use_settings(backend="torch"):
            return _there_and_back(transition, currents.detach())


def _there_and_back(transition: Transition, currents: Tensor) -> Reversibility:
    """Take the steps, and run a backward pass over them, which reconstructs every potential."""
    errors: list[float] = []
    spy = copy.copy(transition)

    def comparing(name: str) -> Callable[..., Derivative]:
        derivative = getattr(transition, name)

        def compare(view: StepView, *gradients: object) -> Derivative:
            right = path[len(currents) - 1 - len(errors)]
            errors.append(
                max(_largest(a.double() - b) for a, b in zip(view.before, right, strict=True))
            )
            return derivative(view, *gradients)

        return compare

    for name in ("vjp", "vjp_of_charge"):
        object.__setattr__(spy, name, comparing(name))  # equations may be frozen
    record, path = NeuronRecord(), []
    states = (torch.zeros_like(currents[0]),) * (1 + transition.has_synapse)
    currents = currents.clone().requires_grad_()
    for x in currents:
        path.append(tuple(each.detach() for each in states))
        _, states = step(spy, _recomputable(x), states, record)
    torch.autograd.grad(states[-1].sum(), currents)  # and no gradient of the neuron's parameters
    largest = max(_largest(each) for states in path for each in states)
    anchoring = anchoring_of(transition, states)
    return Reversibility(
        error=max(errors),
        largest=largest,
        invertible=transition.invertible or transition.from_outputs,
        reversed=anchoring.is_reversed,
        steps_between_anchors=min(anchoring.rebuilt or anchoring.interval, len(currents)),
        time_steps=len(currents),
    )


def _largest(state: Tensor) -> float:
    return state.abs().max().item()


def _recomputable(x: Tensor) -> Tensor:
    """``x`` as the output of an operation that can be recomputed. A neuron whose input cannot be
    keeps every potential."""
    return torch.max_pool1d(x.reshape(1, -1), 1).view(x.shape)


def _probe(neuron: nn.Module) -> ReversibleNeuron:
    """A reversible neuron with the parameters of ``neuron`` and a state of its own. (A deep copy
    would refuse a state that belongs to a graph.)"""
    if not isinstance(neuron, nn.Module):
        raise TypeError(f"neuron must be a torch.nn.Module, got {type(neuron).__name__}")
    kind = type(neuron)
    if not isinstance(neuron, ReversibleNeuron):
        swap, reason = swap_for(neuron, generic=False)
        if swap is None:
            raise TypeError(f"{kind.__name__} cannot be reversible{reason and ': '}{reason}")
        kind = reversible_class(kind, swap)
    probe = copy.copy(neuron)
    probe.__class__ = kind
    private = vars(probe)
    private.pop("_record", None)
    private["_compiled_calls"] = CompiledCalls()
    for name, value in private.items():
        if isinstance(value, dict):
            private[name] = value.copy()
        elif isinstance(value, MethodType) and value.__self__ is neuron:
            private[name] = MethodType(value.__func__, probe)
    return probe


def _random(neuron: nn.Module, shape: tuple[int, ...], seed: int) -> Tensor:
    like = next(
        (each for each in (*neuron.parameters(), *neuron.buffers()) if each.is_floating_point()),
        torch.empty(0),
    )
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like.device, like.dtype)


def _transition_of(probe: ReversibleNeuron, current: Tensor) -> Transition:
    """The equations that a neuron has for such a current; one call of it finds them."""
    probe.step_from(current.clone().requires_grad_(), torch.zeros_like(current))
    statistics = probe.record.statistics
    if statistics.fallback_calls:
        raise ValueError(
            f"{type(probe).__name__} takes the host's own path here:"
            f" {', '.join(statistics.reasons)}"
        )
    return probe.record.latest_transition

"""The same equations as differentiable torch code, for autograd to keep everything of.

This code saves no memory. Adapters run the coupled node by it where the reversible path cannot be
taken, a gradient that is itself differentiated (``create_graph=True``) goes through it, and tests
compare the closed-form derivatives with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from .coupled import Coupled, add_weighted_, weighed
from .one_state import OneStateNeuron
from .surrogate import AnySurrogate
from .transition import States, Transition

Fire = Callable[[Tensor], Tensor]  # the Heaviside step, with its surrogate derivative


@singledispatch
def differentiable_step(transition: Transition, x: Tensor, states: States) -> tuple[Tensor, States]:
    """One time step: the outputs and the states after it."""
    with torch.no_grad():
        signal = transition.reset_signal_at(states[0])
    h = transition.charge(x, states[0], signal)
    fired = differentiable_fire(transition, h)
    detached = getattr(transition, "detach_reset", False)
    v = transition.reset(h, fired.detach() if detached else fired, signal)
    return transition.spikes(fired), (v,)


@differentiable_step.register
def _(transition: Coupled, x: Tensor, states: States) -> tuple[Tensor, States]:
    fire = fire_function(transition.surrogate)
    outputs, v = differentiable_coupled_step(transition, x, states[0], fire)
    return outputs, (v,)


@singledispatch
def differentiable_outputs(transition: Transition, charged: Tensor) -> Tensor:
    """The outputs from the charged potential, of a neuron whose graph has a node there."""
    return transition.spikes(differentiable_fire(transition, charged))


def differentiable_sequence(
    transition: Transition, inputs: Tensor, states: States
) -> tuple[Tensor, States, Tensor]:
    """T time steps: outputs ``[T, ...]``, the last states, the first state of all steps."""
    outputs, path = [], []
    for x in inputs:
        output, states = differentiable_step(transition, x, states)
        outputs.append(output)
        path.append(states[0])
    return torch.stack(outputs), states, torch.stack(path)


def differentiable_fire(neuron: OneStateNeuron, h: Tensor) -> Tensor:
    """Zeros and ones from the charged potential."""
    return fire_function(neuron.surrogate)(h - neuron.threshold)


def fire_function(surrogate: AnySurrogate) -> Fire:
    """The host's own function where there is one: its derivative can be differentiated again."""
    if surrogate.function is not None:
        return surrogate.function
    return lambda z: _Heaviside.apply(z, surrogate)


class _Heaviside(torch.autograd.Function):
    """The Heaviside step with a surrogate derivative in closed form."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, surrogate: AnySurrogate) -> Tensor:
        ctx.save_for_backward(z)
        ctx.surrogate = surrogate
        return surrogate.fires(z, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return ctx.surrogate.gradient(grad, z.clone()), None


def differentiable_coupled_step(
    coupled: Coupled, x: Tensor, v: Tensor, fire: Fire
) -> tuple[Tensor, Tensor]:
    """One time step of the coupled neuron: output and potential, in the same bits as
    :meth:`.coupled.Coupled.step`."""
    (x1, x2), (v1, v2) = coupled.halves(x), coupled.halves(v)
    passed = coupled.passed(x1)
    m1 = coupled.charge(v1, passed, 1 / (coupled.tau * coupled.beta))
    s1, kept1 = _fire_and_reset(coupled, m1, fire)
    x2, alpha = weighed(x2, coupled.beta)
    y1, after1 = torch.add(s1, x2, alpha=alpha), add_weighted_(kept1, v2, coupled.alpha)
    s2, kept2 = _fire_and_reset(coupled, coupled.charge(after1, y1, 1 / coupled.tau), fire)
    y2, after2 = s2 + passed, add_weighted_(kept2, v1, coupled.alpha)
    dim = coupled.split_dim
    return torch.cat([y1, y2], dim), torch.cat([after1, after2], dim)


def _fire_and_reset(coupled: Coupled, m: Tensor, fire: Fire) -> tuple[Tensor, Tensor]:
    s = fire(m - coupled.v_threshold).to(m.dtype)
    through_reset = s.detach() if coupled.detach_reset else s
    if coupled.v_reset is None:
        return s, add_weighted_(m.clone(), through_reset, -coupled.v_threshold, binary=True)
    return s, (1 - through_reset) * m + through_reset * coupled.v_reset

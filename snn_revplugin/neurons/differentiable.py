"""The plain neuron: the same equations as differentiable torch code, for autograd to keep
everything of.

Nothing here saves memory. It is what tests and benchmarks compare the closed-form backward with,
and the shortest way to read what a neuron does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .coupled import Coupled, add_weighted_, weighed
from .transition import Dynamics


def reference_step(dynamics: Dynamics, current: Tensor, potential: Tensor) -> tuple[Tensor, Tensor]:
    """One time step; arguments and results as in :func:`snn_revplugin.step.step`."""
    with torch.no_grad():
        reset_signal = dynamics.reset_signal(potential)
    h = dynamics.charge(current, potential, reset_signal)
    binary = _Fire.apply(h, _as_tensor(dynamics.threshold, h), dynamics)
    through_reset = binary.detach() if getattr(dynamics, "detach_reset", False) else binary
    spikes = binary if dynamics.graded_factor is None else binary * dynamics.factor
    return spikes, dynamics.reset(h, through_reset, reset_signal)


def reference_sequence(
    dynamics: Dynamics, currents: Tensor, potential: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """T time steps: spikes ``[T, ...]``, the last potential, all potentials ``[T, ...]``."""
    spikes, potentials = [], []
    for current in currents:
        s, potential = reference_step(dynamics, current, potential)
        spikes.append(s)
        potentials.append(potential)
    return torch.stack(spikes), potential, torch.stack(potentials)


def reference_coupled_step(
    coupled: Coupled, x: Tensor, v: Tensor, fire: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """One time step of the coupled neuron: output and potential, in the same bits as
    :meth:`.coupled.Coupled.step`.

    Args:
        fire: the Heaviside step of ``m - theta`` with its surrogate derivative.
    """
    (x1, x2), (v1, v2) = coupled.halves(x), coupled.halves(v)
    passed = coupled.passed(x1)
    s1, kept1 = _fire_and_reset(
        coupled, coupled.charge(v1, passed, 1 / (coupled.tau * coupled.beta)), fire
    )
    x2, alpha = weighed(x2, coupled.beta)
    y1, after1 = torch.add(s1, x2, alpha=alpha), add_weighted_(kept1, v2, coupled.alpha)
    s2, kept2 = _fire_and_reset(coupled, coupled.charge(after1, y1, 1 / coupled.tau), fire)
    y2, after2 = s2 + passed, add_weighted_(kept2, v1, coupled.alpha)
    dim = coupled.split_dim
    return torch.cat([y1, y2], dim), torch.cat([after1, after2], dim)


def _fire_and_reset(
    coupled: Coupled, m: Tensor, fire: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    s = fire(m - coupled.v_threshold).to(m.dtype)
    through_reset = s.detach() if coupled.detach_reset else s
    if coupled.v_reset is None:
        return s, add_weighted_(m.clone(), through_reset, -coupled.v_threshold, binary=True)
    return s, (1 - through_reset) * m + through_reset * coupled.v_reset


class _Fire(torch.autograd.Function):
    """The Heaviside step with its surrogate derivative."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, dynamics: Dynamics) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.dynamics = dynamics
        return dynamics.fires(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        h, threshold = ctx.saved_tensors
        grad_z = ctx.dynamics.surrogate.gradient(grad, h - threshold)
        return grad_z, -grad_z.sum_to_size(threshold.shape), None


def _as_tensor(threshold: Tensor | float, like: Tensor) -> Tensor:
    return (
        threshold
        if isinstance(threshold, Tensor)
        else torch.tensor(threshold, dtype=like.dtype, device=like.device)
    )

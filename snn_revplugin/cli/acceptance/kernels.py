"""Part 3a: each kernel form against the plain code, on the device; on a CPU in Triton's
interpreter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ...kernels.backend import why_not
from ...kernels.self_test import failure, packing_failure
from ...kernels.surrogate_constants import SURROGATES
from ...neurons.coupled import Coupled
from ...neurons.integrate_and_fire import (
    IntegrateAndFire,
    LeakyIntegrateAndFire,
    ParametricLeakyIntegrateAndFire,
)
from ...neurons.leaky import Leaky
from ...neurons.surrogate import Surrogate
from ...neurons.transition import Transition
from .case import ABSENT, FAILED, PASSED, Case, Cases, Findings, Sizes

ATAN = Surrogate("atan", (2.0,), keeps_dtype=False)
OF_SPIKINGJELLY = Surrogate("atan", (2.0,), strict=False)
DTYPES = torch.float32, torch.float16, torch.bfloat16
EVERY, SOME = "every form", "some forms"


def _leaky(reset: str, delayed: bool, learned: bool, surrogate: Surrogate = ATAN) -> Leaky:
    beta = torch.tensor(0.9, requires_grad=learned)
    one = torch.tensor(1.0)
    return Leaky(surrogate, beta, one.clone().requires_grad_(learned), one, reset, delayed, learned)


def _parametric(v_reset: float | None, decay_input: bool) -> ParametricLeakyIntegrateAndFire:
    w = torch.tensor(-0.4, requires_grad=True)
    return ParametricLeakyIntegrateAndFire(
        OF_SPIKINGJELLY, 1.0, v_reset, True, decay_input=decay_input, w=w
    )


def forms() -> dict[str, Callable[[], Transition]]:
    """Every form of a neuron that kernels exist for."""
    found: dict[str, Callable[[], Transition]] = {}
    for reset in ("subtract", "zero", "none"):
        for delayed in (True, False):
            for learned in (True, False):
                name = f"Leaky, {reset}{'' if delayed else ' at once'}{', learned' * learned}"
                found[name] = partial(_leaky, reset, delayed, learned)
    for v_reset in (None, 0.0, -0.25):
        for detach in (True, False):
            name = f"v_reset {v_reset}{', detached' * detach}"
            found[f"IF, {name}"] = partial(IntegrateAndFire, OF_SPIKINGJELLY, 1.0, v_reset, detach)
            for tau in (2.0, 3.0):
                for decays in (True, False):
                    found[f"LIF, tau {tau}, {name}{'' if decays else ', input not decayed'}"] = (
                        partial(
                            LeakyIntegrateAndFire,
                            OF_SPIKINGJELLY,
                            1.0,
                            v_reset,
                            detach,
                            decay_input=decays,
                            tau=tau,
                        )
                    )
        for decays in (True, False):
            found[f"PLIF, v_reset {v_reset}{'' if decays else ', input not decayed'}"] = partial(
                _parametric, v_reset, decays
            )
    found["coupled"] = lambda: Coupled(split_dim=-1, surrogate=OF_SPIKINGJELLY)
    for name, constants in SURROGATES.items():
        found[f"surrogate {name}"] = partial(_with_surrogate, name, constants.__code__.co_argcount)
    return found


def _with_surrogate(name: str, count: int) -> LeakyIntegrateAndFire:
    surrogate = Surrogate(name, (1.5, 0.5)[:count], strict=False)
    return LeakyIntegrateAndFire(surrogate, 1.0, None, True, tau=2.0)


def cases(sizes: Sizes, device: str) -> Cases:
    yield Case("kernels", EVERY if sizes.limit is None else SOME, "", device)


def examine(case: Case) -> Findings:
    device = torch.device(case.device)
    reason = why_not(torch.empty(0, device=device))
    if reason is not None:
        yield case.found(ABSENT, why=reason)
        return
    how = "compiled" if case.on_cuda else "in Triton's interpreter"
    why = packing_failure(device)
    yield case.found(FAILED if why else PASSED, "packing", why or "", ran=how)
    for name, make in forms().items() if case.subject == EVERY else list(forms().items())[::30]:
        transition = _on(device, make())
        for dtype in DTYPES if case.subject == EVERY else DTYPES[:1]:
            x = torch.zeros(4, 8, dtype=dtype, device=device)
            subject = f"{name}, {str(dtype).removeprefix('torch.')}"
            reason = transition.why_no_kernel(x, (x,))
            if reason is not None:
                yield case.found(ABSENT, subject, reason)
                continue
            why = failure(transition, x, (x,))
            yield case.found(FAILED if why else PASSED, subject, why or "", ran=how)


def _on(device: torch.device, transition: Transition) -> Transition:
    return transition.with_parameters(
        [
            each.detach().to(device).requires_grad_(each.requires_grad)
            for each in transition.parameters
        ]
    )

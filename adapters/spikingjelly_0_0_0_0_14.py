"""What SpikingJelly 0.0.0.0.14 asks of a neuron, where it differs from 2.0: transitions that read
and write the module's own state.

From 2.0 on the host's transitions are pure and its forward is built on them. Here
``single_step_forward`` and ``multi_step_forward`` are the transitions; a ``backend`` chooses
between torch and CuPy; IF and LIF neurons have a second arithmetic for ``eval()``, whose spikes
carry no gradient; and a state is taken as it is, whatever its shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from snn_revplugin.bptt.sequence import sequence
from snn_revplugin.bptt.step import step
from snn_revplugin.neurons.transition import GraphNodes
from snn_revplugin.torch_internals.uniform import note_uniform

HALVES = torch.float16, torch.bfloat16

# The arguments of the surrogates' derivatives, in their order.
SURROGATE_PARAMETERS = ("alpha", "beta", "w", "c", "n", "T_period", "leak", "k")


def parameters_of(function: Any) -> tuple:
    """A surrogate function's parameters, in the order of its derivative's arguments."""
    held = getattr(function, "__dict__", {})
    return tuple(held[name] for name in SURROGATE_PARAMETERS if name in held)


def state_for(node: Any, x: Tensor) -> Any:
    """The potential that a step on ``x`` starts from, as the host's ``v_float_to_tensor`` makes
    it."""
    return note_uniform(torch.full_like(x.data, node.v)) if isinstance(node.v, float) else node.v


class StatefulCoupled:
    """The host's forward, from the coupled node's pure transitions."""

    def single_step_forward(self, x: Tensor) -> Tensor:
        """One time step, ``[N, ...]`` to outputs ``[N, ...]``."""
        (y,), (self.v,) = self.single_step_functional_forward((x,), (state_for(self, x),))
        return y

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """T time steps, ``[T, N, ...]`` to outputs ``[T, N, ...]``."""
        if self.store_v_seq:
            return super().multi_step_forward(x_seq)
        (y_seq,), (self.v,) = self.multi_step_functional_forward(
            (x_seq,), (state_for(self, x_seq[0]),)
        )
        return y_seq


class StatefulTransitions:
    """One time step and T, taken reversibly where that can be done."""

    Coupled = StatefulCoupled
    dynamics_methods = (
        "neuronal_charge",
        "neuronal_fire",
        "neuronal_reset",
        "v_float_to_tensor",
    )
    # Surrogates whose derivative differs from 2.0's, or is rounded in another way.
    other_surrogates = ("PiecewiseLeakyReLU", "LogTailedReLU")
    has_operators = False
    parameters_of = staticmethod(parameters_of)
    scripted_in_eval = True  # whether the host takes another arithmetic in eval()
    scripted_charge = True  # whether TorchScript runs its charge, as it runs every reset

    def single_step_forward(self, x: Tensor) -> Tensor:
        """One time step, ``[N, ...]`` to spikes ``[N, ...]``."""
        current, v = self._as_scripted(x, state_for(self, x))
        transition = self._transition_for(current, v)
        if transition is None or not self._fits(v, x.shape):
            return super().single_step_forward(x)
        spikes, (self.v,) = step(transition, current, (v,), self.record)
        return spikes

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """T time steps, ``[T, N, ...]`` to spikes ``[T, N, ...]``; with ``store_v_seq`` the
        potentials are kept too."""
        try:
            currents, v = self._as_scripted(x_seq, state_for(self, x_seq[0]))
        except IndexError:  # no time step
            return super().multi_step_forward(x_seq)
        transition = self._transition_for(currents, v)
        if transition is not None and self.backend != "torch":
            self.note_fallback(
                f"backend={self.backend!r} has kernels of its own, with their own rounding; take"
                " backend='torch'"
            )
            transition = None
        if transition is None or not self._fits(v, x_seq.shape[1:]):
            return super().multi_step_forward(x_seq)
        spikes, (self.v,), path = sequence(
            transition, currents, (v,), self.record, with_path=self.store_v_seq
        )
        if self.store_v_seq:
            self.v_seq = path
        return spikes

    def _reset_arithmetic(self) -> dict[str, GraphNodes]:
        # In step mode 's' the potential is reset by the spikes that the host gives out, with their
        # gradient.
        resets = not self.detach_reset and self.step_mode == "s"
        return {"nodes": GraphNodes.RESET if resets else GraphNodes.ONE}

    def _charge_arithmetic(self) -> dict[str, bool]:
        return {"by_factor": True, "fused": False}

    def _is_fused(self) -> bool:
        return False

    def _why_host(self, x: Tensor, v: Tensor) -> str | None:
        if self.scripted_in_eval and not self.training:
            return "in eval() this release of SpikingJelly gives spikes without a gradient"
        if _autocast(x) and not x.dtype == v.dtype == torch.float32:
            return (
                "under autocast, a step of this release of SpikingJelly goes from one dtype to"
                " another"
            )
        return None

    def _as_scripted(self, x: Tensor, v: Any) -> tuple[Tensor, Any]:
        """Current and potential as the host computes with them: under autocast TorchScript casts
        both to float32."""
        if not (
            isinstance(x, Tensor) and isinstance(v, Tensor) and x.dtype in HALVES and _autocast(x)
        ):
            return x, v
        taken = v.dtype is torch.float32 or (self.scripted_charge and v.dtype in HALVES)
        return (x.float(), v.float()) if taken else (x, v)

    def _fits(self, v: Tensor, shape: torch.Size) -> bool:
        if v.shape != shape:
            self.note_fallback("the state has another shape than the input")
        return v.shape == shape


def _autocast(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)

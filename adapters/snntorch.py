"""snnTorch's neuron, reversible: ``RevLeaky`` for ``snntorch.Leaky``.

from snn_revplugin.adapters.snntorch import RevLeaky as Leaky
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from snn_revplugin.dynamics import Dynamics
from snn_revplugin.dynamics import Leaky as LeakyDynamics
from snn_revplugin.neuron import ReversibleNeuron, version_key
from snn_revplugin.spikes import PackedSpikes
from snn_revplugin.step import state_of, step
from snn_revplugin.surrogate import AnySurrogate, Surrogate, surrogate_of
from snn_revplugin.swap import Swap, register_swap

try:
    import snntorch
except ImportError as error:
    raise ImportError("snn_revplugin.adapters.snntorch needs snnTorch: pip install 'snn-revplugin[snntorch]'") from error

# The functions of snntorch.surrogate are closures; these are the ones whose derivative has a closed form, by name, with the
# order in which our derivative takes what they close over.
SURROGATES: dict[str, tuple[str, tuple[str, ...]]] = {
    "straight_through_estimator": ("straight_through", ()),
    "triangular": ("triangular", ("threshold",)),
    "fast_sigmoid": ("fast_sigmoid", ("slope",)),
    "atan": ("atan", ("alpha",)),
    "heaviside": ("heaviside", ()),
    "sigmoid": ("sigmoid_of_exp", ("slope",)),
    "spike_rate_escape": ("spike_rate_escape", ("beta", "slope")),
    "SFS": ("sparse_fast_sigmoid", ("slope", "B")),
}


def surrogate_from(spike_grad: Any) -> AnySurrogate | None:
    """A ``spike_grad`` of snnTorch's or of the user's as a surrogate; None if it is not a plain step forward."""
    code = getattr(spike_grad, "__code__", None)
    if code is not None and spike_grad.__module__ == "snntorch.surrogate":
        maker = spike_grad.__qualname__.split(".")[0]
        closed_over = dict(zip(code.co_freevars, (c.cell_contents for c in spike_grad.__closure__ or ()), strict=True))
        if maker in SURROGATES:
            name, names = SURROGATES[maker]
            parameters = tuple(closed_over.get(each) for each in names)
            if all(isinstance(each, int | float) for each in parameters):
                return Surrogate(name, parameters, strict=True, keeps_dtype=False)
    return surrogate_of(spike_grad)


class RevLeaky(ReversibleNeuron, snntorch.Leaky):
    """``snntorch.Leaky`` with the same spikes, membranes and gradients, and a fraction of the memory.

    Args:
        *args, **kwargs: those of ``snntorch.Leaky``, all 14 of them.
        reversible: False for the host's own path, for comparison.

    ``inhibition`` and ``state_quant`` decide by more than the neuron's own potential, or leave no potential to reverse; with
    them the neuron takes the host's own path, and :func:`snn_revplugin.explain` says so.

    >>> import torch
    >>> leaky = RevLeaky(beta=0.9)
    >>> spikes, mem = leaky(torch.ones(2, 3), leaky.reset_mem())
    >>> mem
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """

    def __init__(self, *args: Any, reversible: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reversible = reversible

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """One time step; arguments and results as in ``snntorch.Leaky.forward``."""
        held = self.mem if mem is None else mem
        parameters = self.beta, self.threshold, self.graded_spikes_factor
        reason = self.why_plain(input_, held, *parameters) or self._why_host(input_, mem, parameters)
        dynamics = None if reason else self._dynamics(parameters)
        if dynamics is None:
            self.note_plain(reason or "the surrogate is no Heaviside step, or the reset is none of the host's")
            return super().forward(input_, mem)

        if held.shape != input_.shape:
            held = torch.zeros_like(input_, device=held.device)
        spk, potential = step(dynamics, input_, held, self.reversal)
        self.mem = potential
        before = state_of(potential).before
        known = before.fired if dynamics.delayed else None  # a delayed reset is what the step before fired
        self.__dict__["_reset"] = known or _packed_resets(dynamics, held)
        if self.init_hidden and not self.output:
            return spk
        return spk, potential

    @property
    def reset(self) -> Tensor:
        """The reset signal of the last step, detached, as the host leaves it; kept as bits until it is asked for."""
        signal = self.__dict__.get("_reset", self.__dict__.get("reset"))  # the latter from before a conversion
        if signal is None:
            raise AttributeError(f"{type(self).__name__} has no reset signal before its first step")
        return signal.binary() if isinstance(signal, PackedSpikes) else signal

    @reset.setter
    def reset(self, signal: Tensor) -> None:
        self._reset = signal

    def _why_host(self, input_: Tensor, mem: Tensor | None, parameters: tuple[Tensor, ...]) -> str | None:
        if self.inhibition:
            return "inhibition lets one neuron of a layer silence the others"
        if self.state_quant:
            return "state_quant rounds the potential, which cannot be undone"
        if self.init_hidden and mem is not None:
            return "mem was passed with init_hidden=True"  # the host's error says it best
        for each in parameters:
            if each.dim() and not _broadcasts_to(each.shape, input_.shape):
                return "beta, threshold or graded_spikes_factor does not fit the shape of the input"
        return None

    def _dynamics(self, parameters: tuple[Tensor, ...]) -> Dynamics | None:
        factor = parameters[2]
        # Asking a CUDA tensor for its value would stall the time loop.
        graded = factor.requires_grad or factor.device.type != "cpu" or factor.dim() > 0 or factor.item() != 1.0
        # The host decides by this bound method; its ``reset_mechanism`` may be set to something else later on.
        charge = getattr(self.state_function, "__func__", None)
        at_once = None if self.reset_delay else int(self.reset_mechanism_val)
        key = *version_key(*parameters), self.spike_grad, charge, at_once, graded
        return self.reversal.dynamics(key, lambda: self._build(parameters, charge, at_once, graded))

    def _build(self, parameters: tuple[Tensor, ...], charge: Any, at_once: int | None, graded: bool) -> Dynamics | None:
        kinds = {
            snntorch.Leaky._base_sub: "subtract",
            snntorch.Leaky._base_zero: "zero",
            snntorch.Leaky._base_int: "none",
        }
        kind, surrogate = kinds.get(charge), surrogate_from(self.spike_grad)
        if surrogate is None or kind is None:
            return None
        if at_once is not None and snntorch.Leaky.reset_dict[kind] != at_once:
            return None  # one reset in the charge and another after the spike
        return LeakyDynamics(surrogate, *parameters, kind, delayed=at_once is None, graded=graded)


@torch.no_grad()
def _packed_resets(dynamics: Dynamics, held: Tensor) -> PackedSpikes:
    resets = dynamics.fires(held)
    return PackedSpikes(resets.bool(), resets.dtype)


def _broadcasts_to(shape: torch.Size, target: torch.Size) -> bool:
    return len(shape) <= len(target) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(target), strict=False))


register_swap(
    Swap(
        host=snntorch.Leaky,
        reversible=RevLeaky,
        dynamics=(
            "forward",
            "fire",
            "fire_inhibition",
            "mem_reset",
            "_base_state_function",
            "_base_sub",
            "_base_zero",
            "_base_int",
        ),
    )
)

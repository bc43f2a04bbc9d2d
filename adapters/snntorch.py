"""snnTorch's neurons, reversible: ``RevLeaky``, ``RevSynaptic`` and ``RevLapicque``; and
``CoupledLeaky``, the coupled node behind the API of ``snntorch.Leaky``.

::

    from snn_revplugin.adapters.snntorch import RevLeaky as Leaky
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from snn_revplugin.bptt.chain import link_behind
from snn_revplugin.bptt.step import step
from snn_revplugin.compile.equations import Equations, equations_id
from snn_revplugin.compile.operators import OUTPUTS_KEEP, STEP_KEEPS
from snn_revplugin.neurons.coupled import Coupled
from snn_revplugin.neurons.differentiable import differentiable_coupled_step
from snn_revplugin.neurons.lapicque import Lapicque as LapicqueEquations
from snn_revplugin.neurons.leaky import Leaky as LeakyEquations
from snn_revplugin.neurons.surrogate import AnySurrogate, Surrogate, surrogate_of
from snn_revplugin.neurons.synaptic import Synaptic as SynapticEquations
from snn_revplugin.neurons.transition import States, Transition, snapshot
from snn_revplugin.packed.spikes import PackedSpikes
from snn_revplugin.swap.hosts import Host, register_host
from snn_revplugin.swap.module import ReversibleNeuron
from snn_revplugin.swap.table import Swap, register_swap
from snn_revplugin.torch_internals import capture
from snn_revplugin.torch_internals.distributed import is_overwritten_by_ddp
from snn_revplugin.torch_internals.uniform import note_uniform

from .snntorch_tools import NIR_REFUSAL

try:
    import snntorch
except ImportError as error:
    raise ImportError(
        "snn_revplugin.adapters.snntorch needs snnTorch: pip install 'snn-revplugin[snntorch]'"
    ) from error

from .snntorch_any import AnyOfSnntorch  # whose module registers every other neuron

# The functions of snntorch.surrogate are closures; these are the ones whose derivative has a closed
# form, by name, with the order in which our derivative takes what they close over.
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


PARAMETERS = ("beta", "threshold", "graded_spikes_factor")
Given = Tensor | None  # a state that the caller may pass


def surrogate_from(spike_grad: Any) -> AnySurrogate | None:
    """A ``spike_grad`` of snnTorch's or of the user's as a surrogate; None if it is not a plain
    step forward."""
    known = _known_surrogate(spike_grad)
    if known is None:
        return surrogate_of(spike_grad)
    return Surrogate(*known, strict=True, keeps_dtype=False, function=spike_grad)


def _known_surrogate(spike_grad: Any) -> tuple[str, tuple[float, ...]] | None:
    """Name and parameters of a ``spike_grad`` of snnTorch's that we have in closed form."""
    code = getattr(spike_grad, "__code__", None)
    if code is not None and spike_grad.__module__ == "snntorch.surrogate":
        maker = code.co_qualname.split(".")[0]
        if maker in SURROGATES:
            closed_over = dict(
                zip(
                    code.co_freevars,
                    (c.cell_contents for c in spike_grad.__closure__ or ()),
                    strict=True,
                )
            )
            name, names = SURROGATES[maker]
            parameters = tuple(closed_over.get(each) for each in names)
            if all(isinstance(each, int | float) for each in parameters):
                return name, parameters
    return None


class _HoldsMem(ReversibleNeuron):
    """A neuron whose membrane potential is ``mem``."""

    tool_patches = NIR_REFUSAL

    def step_from(self, current: Tensor, potential: Tensor) -> None:
        self.mem = potential
        self.forward(current)

    def reset_mem(self) -> Tensor | States:
        """Zeros in the place of the states, as the host's."""
        states = super().reset_mem()
        if not torch.compiler.is_compiling():
            for each in states if isinstance(states, tuple) else (states,):
                note_uniform(each)
        return states


def _resets(kind: type[nn.Module], zero: str) -> dict[Callable, str]:
    """The reset by the method that a class of the host binds for it.

    Args:
        zero: the name in the equations of what the class does for ``reset_mechanism="zero"``.
    """
    return {kind._base_sub: "subtract", kind._base_zero: zero, kind._base_int: "none"}


# The host's numbers for them (``reset_mechanism_val``).
RESET_NUMBERS = {"subtract": 0, "zero": 1, "clear": 1, "none": 2}


class _KnownNeuron(_HoldsMem, AnyOfSnntorch):
    """What the neurons share whose equations are known. With an option that these do not have
    (``inhibition``, ``state_quant``) a neuron runs by its own step.

    Attributes:
        _state_names: of the states, the membrane potential last.
        _parameter_names: of all tensors that the equations are made of.
        _reset_kinds: see :func:`_resets`.
        _always_delayed: whether the class has no ``reset_delay``.
    """

    _state_names: ClassVar[tuple[str, ...]] = ("mem",)
    _parameter_names: ClassVar[tuple[str, ...]] = PARAMETERS
    _reset_kinds: ClassVar[dict[Callable, str]]
    _always_delayed: ClassVar[bool] = False

    def forward(self, input_: Tensor, mem: Given = None) -> Tensor | tuple[Tensor, ...]:
        """One time step; arguments and results as in the host's ``forward``."""
        return self._take_step(input_, mem)

    def _take_step(self, input_: Tensor, *given: Given) -> Tensor | tuple[Tensor, ...]:
        """One time step from the states that were given, or those that the neuron holds."""
        if torch.compiler.is_compiling():
            return self._compiled(input_, given)
        _give_up_what_ddp_overwrote(self)
        if self._runs_by_own_step():
            return AnyOfSnntorch.forward(self, input_, *given)
        # Not asked of the module one by one: in a time loop of small layers that takes time.
        buffers = self._buffers
        states = tuple(
            (buffers[name] if name in buffers else getattr(self, name)) if each is None else each
            for name, each in zip(self._state_names, given, strict=True)
        )
        parameters = tuple(
            buffers[name] if name in buffers else getattr(self, name)
            for name in self._parameter_names
        )
        reason = self._why_host(input_, given, states, parameters)
        transition = None if reason else self._transition(parameters, states)
        if transition is None:
            self.note_fallback(
                reason or "the surrogate is no Heaviside step, or the reset is none of the host's"
            )
            return self.host_kind.forward(self, input_, *given)

        shape = input_.shape
        states = tuple(
            v if v.shape == shape else note_uniform(torch.zeros_like(input_, device=v.device))
            for v in states
        )
        spk, after = step(transition, input_, states, self.record)
        for name, each in zip(self._state_names, after, strict=True):
            if name in buffers:
                buffers[name] = each
            else:
                setattr(self, name, each)
        signal = link_behind(after[-1]).reset_signal
        self.reset = signal or _packed_reset_signal(transition, states[-1])
        return self._returned(spk, after)

    def _runs_by_own_step(self) -> bool:
        # A class that someone derives from ours may have another step than the host's.
        return bool(self.inhibition or self.state_quant) and "host_kind" in vars(type(self))

    def step_from(self, current: Tensor, potential: Tensor) -> None:
        if self._runs_by_own_step():
            AnyOfSnntorch.step_from(self, current, potential)  # it says that this cannot be
        super().step_from(current, potential)

    def _returned(self, spk: Tensor, states: States) -> Tensor | tuple[Tensor, ...]:
        return spk if self.init_hidden and not self.output else (spk, *states)

    def _compiled(self, input_: Tensor, given: tuple[Given, ...]) -> Tensor | tuple[Tensor, ...]:
        """The time step by an operator, or on the host's own path where there is none for it."""
        states = [
            getattr(self, name) if each is None else each
            for name, each in zip(self._state_names, given, strict=True)
        ]
        states = [v if v.shape == input_.shape else torch.zeros_like(input_) for v in states]
        floats = [
            each
            for each in (getattr(self, name) for name in self._parameter_names)
            if each.is_floating_point()
        ]
        kind = self._reset_kinds.get(getattr(self.state_function, "__func__", None))
        delayed = self._always_delayed or self.reset_delay
        if (
            kind is None
            or (not delayed and RESET_NUMBERS[kind] != int(self.reset_mechanism_val))
            or self._why_not_equations(input_, given, states, floats) is not None
            or not self.takes_operators(input_, states[-1], *states[:-1], *floats)
            or input_.dtype not in (torch.float32, torch.float64)
            # Last: the compiler cannot trace a function any more whose closure it has seen read.
            or (surrogate := _known_surrogate(self.spike_grad)) is None
        ):
            self.note_compiled_fallback()
            return self.host_kind.forward(self, input_, *given)
        self.note_operators(STEP_KEEPS)
        name, slopes = surrogate
        option = "immediate" if not delayed and kind != "none" else ""
        numbers = [float(each) for each in slopes]

        def equations(neuron: str, reset: str = kind, option: str = option) -> Equations:
            return Equations([equations_id(neuron, reset, option), name], numbers)

        self.reset = (states[-1] > self.threshold).float().detach()
        spk, after = self._operators(input_, states, equations)
        for name, each in zip(self._state_names, after, strict=True):
            setattr(self, name, each)
        return self._returned(spk, after)

    def _operators(
        self, input_: Tensor, states: list[Tensor], equations: Callable[..., Equations]
    ) -> tuple[Tensor, States]:
        """A time step by operators: spikes and states.

        Args:
            equations: takes the name of a neuron, and another reset than this one's.
        """
        parameters = [self.beta.clamp(0, 1), self.threshold, self.graded_spikes_factor]
        spk, mem = torch.ops.snn_revplugin.step(input_, states[-1], parameters, *equations("leaky"))
        return spk, (mem,)

    @property
    def reset(self) -> Tensor:
        """The reset signal of the last step, detached, as the host leaves it; kept as bits until it
        is asked for."""
        signal = self.__dict__.get("reset")
        if signal is None:
            raise AttributeError(f"{type(self).__name__} has no reset signal before its first step")
        return signal.binary() if isinstance(signal, PackedSpikes) else signal

    @reset.setter
    def reset(self, signal: Tensor | PackedSpikes) -> None:
        self.__dict__["reset"] = signal  # where the host's class has it

    def end(self) -> None:
        if "reset" in self.__dict__:
            self.reset = self.reset  # no bits
        super().end()

    def _why_host(
        self,
        input_: Tensor,
        given: tuple[Given, ...],
        states: States,
        parameters: tuple[Tensor, ...],
    ) -> str | None:
        return self.why_fallback(input_, states[-1], *parameters) or self._why_not_equations(
            input_, given, states, parameters
        )

    def _why_not_equations(
        self,
        input_: Tensor,
        given: tuple[Given, ...],
        states: States,
        parameters: tuple[Tensor, ...],
    ) -> str | None:
        """Why the equations do not express a call, or None."""
        if self.inhibition or self.state_quant:
            return "inhibition or state_quant, and a class derived from a reversible one"
        if self.init_hidden and any(each is not None for each in given):
            # The host's error says it best.
            return f"{' or '.join(self._state_names)} was passed with init_hidden=True"
        for each in parameters:
            if each.dim() and not _broadcasts_to(each.shape, input_.shape):
                names = ", ".join(self._parameter_names[:-1])
                return f"{names} or {self._parameter_names[-1]} does not fit the shape of the input"
        return None

    def _transition(self, parameters: tuple[Tensor, ...], states: States) -> Transition | None:
        # The host decides by this bound method; its ``reset_mechanism`` may be set later on.
        charge = getattr(self.state_function, "__func__", None)
        delayed = self._always_delayed or self.reset_delay
        immediate = None if delayed else int(self.reset_mechanism_val)
        return self.record.transition(
            parameters,
            (self.spike_grad, charge, immediate),
            lambda: self._build(parameters, charge, immediate),
            starts=states[-1].grad_fn is None,
        )

    def _build(
        self, parameters: tuple[Tensor, ...], charge: Any, immediate_reset: int | None
    ) -> Transition | None:
        kind, surrogate = self._reset_kinds.get(charge), surrogate_from(self.spike_grad)
        if surrogate is None or kind is None:
            return None
        if immediate_reset is not None and RESET_NUMBERS[kind] != immediate_reset:
            return None  # one reset in the charge and another after the spike
        held = dict(zip(self._parameter_names, map(snapshot, parameters), strict=True))
        options = {
            "reset_kind": kind,
            "delayed": immediate_reset is None,
            "graded": not _is_known_one(self.graded_spikes_factor),
            "threshold": held.pop("threshold"),
            "factor": held.pop("graded_spikes_factor"),
        }
        return self._equations(surrogate, options, **held)

    def _equations(
        self, surrogate: AnySurrogate, options: dict[str, Any], **held: Tensor
    ) -> Transition:
        """The equations.

        Args:
            options: what all of them have.
            held: the other tensors by the names of the host's.
        """
        raise NotImplementedError


class RevLeaky(_KnownNeuron, snntorch.Leaky):
    """``snntorch.Leaky`` with the same spikes, membranes and gradients, and a fraction of the
    memory. Takes the host's arguments, all 14 of them, and ``reversible=False`` for the host's own
    path.

    ``inhibition`` and ``state_quant`` decide by more than the neuron's own potential, or leave no
    potential to reverse; with them the neuron runs by its own step, which backward runs again.

    >>> import torch
    >>> leaky = RevLeaky(beta=0.9)
    >>> spikes, mem = leaky(torch.ones(2, 3), leaky.reset_mem())
    >>> mem
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """

    host_kind = snntorch.Leaky
    _reset_kinds = _resets(snntorch.Leaky, zero="zero")

    def _equations(
        self, surrogate: AnySurrogate, options: dict[str, Any], beta: Tensor
    ) -> Transition:
        return LeakyEquations(surrogate, beta, **options)


class RevSynaptic(_KnownNeuron, snntorch.Synaptic):
    """``snntorch.Synaptic`` with the same spikes, states and gradients, and a fraction of the
    memory. Takes the host's arguments, and ``reversible=False`` for the host's own path.

    With ``inhibition`` and ``state_quant`` the neuron runs by its own step, as :class:`RevLeaky`
    does.

    >>> import torch
    >>> synaptic = RevSynaptic(alpha=0.5, beta=0.9)
    >>> spikes, syn, mem = synaptic(torch.ones(2, 3), *synaptic.reset_mem())
    >>> mem
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """

    host_kind = snntorch.Synaptic
    _state_names = ("syn", "mem")
    _parameter_names = (*PARAMETERS, "alpha")
    _reset_kinds = _resets(snntorch.Synaptic, zero="clear")

    def forward(
        self, input_: Tensor, syn: Given = None, mem: Given = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """One time step; arguments and results as in ``snntorch.Synaptic.forward``."""
        return self._take_step(input_, syn, mem)

    def step_from(self, current: Tensor, potential: Tensor) -> None:
        self.syn = torch.zeros_like(potential)
        super().step_from(current, potential)

    def _why_host(
        self,
        input_: Tensor,
        given: tuple[Given, ...],
        states: States,
        parameters: tuple[Tensor, ...],
    ) -> str | None:
        if not all(isinstance(each, Tensor) for each in states):
            return "a state is not a tensor"
        reason = super()._why_host(input_, given, states, parameters)
        if reason is None and not any(
            each.requires_grad for each in (input_, states[0], self.alpha)
        ):
            return "the synaptic current has no gradient: neither the input nor alpha has one"
        return reason

    def _equations(
        self, surrogate: AnySurrogate, options: dict[str, Any], beta: Tensor, alpha: Tensor
    ) -> Transition:
        return SynapticEquations(surrogate, beta, alpha=alpha, **options)

    def _operators(
        self, input_: Tensor, states: list[Tensor], equations: Callable[..., Equations]
    ) -> tuple[Tensor, States]:
        # The synaptic current is the potential of a leaky neuron that nothing resets.
        parameters = [self.alpha.clamp(0, 1), self.threshold, self.graded_spikes_factor]
        integrator = equations("leaky", "none", "")
        _, syn = torch.ops.snn_revplugin.step(input_, states[0], parameters, *integrator)
        spk, after = super()._operators(syn, states[1:], equations)
        return spk, (syn, *after)


class RevLapicque(_KnownNeuron, snntorch.Lapicque):
    """``snntorch.Lapicque`` with the same spikes, membranes and gradients, and a fraction of the
    memory. Takes the host's arguments, and ``reversible=False`` for the host's own path.

    With ``inhibition`` and ``state_quant`` the neuron runs by its own step, as :class:`RevLeaky`
    does. With a learned ``beta``, from which the host computes ``C`` once, it takes the host's own
    path.

    >>> import torch
    >>> lapicque = RevLapicque(R=1.0, C=2.0)
    >>> spikes, mem = lapicque(torch.ones(2, 3), lapicque.reset_mem())
    >>> mem
    tensor([[0.5000, 0.5000, 0.5000],
            [0.5000, 0.5000, 0.5000]])
    """

    host_kind = snntorch.Lapicque
    _parameter_names = ("threshold", "graded_spikes_factor", "R", "C", "time_step")
    _reset_kinds = _resets(snntorch.Lapicque, zero="clear")
    _always_delayed = True

    def _why_not_equations(
        self,
        input_: Tensor,
        given: tuple[Given, ...],
        states: States,
        parameters: tuple[Tensor, ...],
    ) -> str | None:
        if any(each.requires_grad for each in self._circuit()):
            return "R, C or time_step has a gradient (beta is learned)"
        return super()._why_not_equations(input_, given, states, parameters)

    def _circuit(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.R, self.C, self.time_step

    def _equations(
        self,
        surrogate: AnySurrogate,
        options: dict[str, Any],
        R: Tensor,
        C: Tensor,
        time_step: Tensor,
    ) -> Transition:
        gains = R, 1 / (R * C), time_step
        # A product with one changes nothing.
        gains = tuple(each for each in gains if not _is_known_one(each))
        beta = 1 - (time_step / (R * C))
        return LapicqueEquations(surrogate, beta, gains=gains, **options)

    def _operators(
        self, input_: Tensor, states: list[Tensor], equations: Callable[..., Equations]
    ) -> tuple[Tensor, States]:
        R, C, time_step = self._circuit()
        beta = 1 - (time_step / (R * C))
        parameters = [beta, self.threshold, self.graded_spikes_factor]
        driving = input_ * R * (1 / (R * C)) * time_step
        spk, mem = torch.ops.snn_revplugin.step(
            driving, states[-1], parameters, *equations("lapicque")
        )
        return spk, (mem,)


class CoupledLeaky(_HoldsMem, snntorch.Leaky):
    """The split-coupled reversible node of :mod:`snn_revplugin.coupled` behind the API of
    ``snntorch.Leaky``.

    Its outputs are real-valued: spikes, plus ``beta`` times what came in on the other half of the
    channels. ``mem`` has the shape of the input. What the host makes of ``mem``, ``init_hidden``,
    ``output``, ``reset_mem``, ``utils.reset``, ``detach_hidden`` and ``reset_hidden`` holds here
    too. ``tau``, ``alpha``, ``beta`` and ``threshold`` are buffers, fixed in training and part of
    the state_dict.

    Args:
        tau: the membrane's time constant in time steps, at least 1.
        alpha: how much of each half's potential the other half's goes on with, at most 1; up to ``1
            / tau`` potentials of neurons that do not fire stay bounded.
        beta: how much of each half's input passes on into the other half's output.
        threshold: of the potential, to fire.
        spike_grad: a function of ``snntorch.surrogate`` or of yours; None for ``atan``.
        init_hidden, output: as in the host.
        reset_mechanism: ``"subtract"`` or ``"zero"``.
        detach_reset: whether the reset keeps the gradient from flowing through its spike, as the
            host's does.
        split_dim: the dimension that is split; channels by default, -1 for the last.
        reversible: False for plain autograd, for comparison.

    Raises:
        ValueError: a number out of the range in which input and state can be rebuilt, or an unknown
        reset.

    >>> import torch
    >>> leaky = CoupledLeaky(beta=0.5)
    >>> out, mem = leaky(torch.tensor([[4.0, 1.0]]))
    >>> out
    tensor([[1.5000, 3.0000]])
    """

    has_no_nir_node = True

    def __init__(
        self,
        tau: float = 2.0,
        alpha: float = 0.25,
        beta: float = 1.0,
        threshold: float = 1.0,
        spike_grad: Any = None,
        init_hidden: bool = False,
        reset_mechanism: str = "subtract",
        output: bool = False,
        detach_reset: bool = True,
        split_dim: int = 1,
        reversible: bool = True,
    ) -> None:
        # The host remembers every neuron whose constructor it has entered: whatever is refused is
        # refused before.
        Coupled(tau, alpha, beta, threshold, _v_reset(reset_mechanism))
        super().__init__(
            beta,
            threshold,
            spike_grad,
            init_hidden=init_hidden,
            reset_mechanism=reset_mechanism,
            output=output,
        )
        self.register_buffer("tau", torch.as_tensor(tau))
        self.register_buffer("alpha", torch.as_tensor(alpha))
        self.detach_reset, self.split_dim, self.reversible = detach_reset, split_dim, reversible

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """One time step.

        Args:
            input_: floating point, of even size in ``split_dim``.
            mem: the potential of the last step; by default the one that the neuron holds. Of
                another shape than the input, it is taken for zero, as by the host.

        Returns:
            The output and the potential, both of the input's shape; with ``init_hidden`` and
            without ``output``, the output.
        """
        if self.init_hidden and mem is not None:
            raise TypeError("`mem` should not be passed as an argument while `init_hidden=True`")
        if not torch.compiler.is_compiling():
            _give_up_what_ddp_overwrote(self)
        held = self.mem if mem is None else mem
        held = held.to(input_) if held.shape == input_.shape else torch.zeros_like(input_)
        if torch.compiler.is_compiling():
            equations = self._equations_to_compile(input_, held)
            if equations is not None:
                self.note_operators(OUTPUTS_KEEP)
                numbers = [self.tau, self.alpha, self.beta, self.threshold]
                out, self.mem = torch.ops.snn_revplugin.step(input_, held, numbers, *equations)
                return out if self.init_hidden and not self.output else (out, self.mem)
            self.note_compiled_fallback()
        coupled, reason = self._coupled(), self.why_fallback(input_, held)
        if reason is None and coupled.surrogate is None:
            reason = "the surrogate is no Heaviside step"
        if reason is None:
            out, (self.mem,) = step(coupled, input_, (held,), self.record)
        else:
            self.note_fallback(reason)
            out, self.mem = differentiable_coupled_step(coupled, input_, held, self.spike_grad)
        return out if self.init_hidden and not self.output else (out, self.mem)

    def _equations_to_compile(self, input_: Tensor, held: Tensor) -> Equations | None:
        """The equations as an operator takes them, or None where there is none for the call."""
        surrogate = _known_surrogate(self.spike_grad)
        if surrogate is None or not self.takes_operators(input_, held):
            return None
        reset = "soft" if _v_reset(self.reset_mechanism) is None else "hard"
        option = "detached" if self.detach_reset else ""
        id, (name, slopes) = equations_id("coupled", reset, option, "strict"), surrogate
        # The operator reads tau, alpha, beta and the threshold from the buffers.
        numbers = 0.0, 0.0, 0.0, 0.0, 0.0, self.split_dim, *slopes
        return Equations([id, name], [float(each) for each in numbers])

    def _coupled(self) -> Coupled:
        """The equations, by the numbers that the buffers hold now."""
        numbers = self.tau, self.alpha, self.beta, self.threshold
        others = self.reset_mechanism, self.detach_reset, self.split_dim
        return self.record.transition(
            numbers,
            (self.spike_grad, *others),
            lambda: Coupled(
                *(each.item() for each in numbers),
                v_reset=_v_reset(self.reset_mechanism),
                detach_reset=self.detach_reset,
                surrogate=surrogate_from(self.spike_grad),
                split_dim=self.split_dim,
            ),
            starts=True,
        )


def _give_up_what_ddp_overwrote(neuron: snntorch.SpikingNeuron) -> None:
    """Start a new chain of time steps where DistributedDataParallel has given this process the
    first one's membrane."""
    stored = neuron._buffers.get("mem")
    if is_overwritten_by_ddp(stored):
        link = link_behind(stored)
        if link is not None:
            link.mark_overwritten()


def _v_reset(reset_mechanism: str) -> float | None:
    reset_signal = {"subtract": None, "zero": 0.0}
    if reset_mechanism not in reset_signal:
        raise ValueError(f"reset_mechanism must be 'subtract' or 'zero', got {reset_mechanism!r}")
    return reset_signal[reset_mechanism]


@torch.no_grad()
def _packed_reset_signal(neuron: LeakyEquations, held: Tensor) -> PackedSpikes:
    signal = neuron.fires(held)
    return PackedSpikes(signal, signal.dtype)


def _is_known_one(number: Tensor) -> bool:
    """Whether a tensor is known to be the constant one. Asking a CUDA tensor for its value would
    stall the time loop."""
    known = number.dim() == 0 and capture.may_compare(number)
    return known and not number.requires_grad and number.item() == 1


def _broadcasts_to(shape: torch.Size, target: torch.Size) -> bool:
    return len(shape) <= len(target) and all(
        n in (1, m) for n, m in zip(reversed(shape), reversed(target), strict=False)
    )


def _is_neuron(module: nn.Module) -> bool:
    # LeakyParallel, and its like of one release each, are no SpikingNeuron.
    return isinstance(module, snntorch.SpikingNeuron) or any(
        kind.__module__.startswith("snntorch._neurons.leaky") for kind in type(module).__mro__
    )


register_host(Host("snntorch", _is_neuron, surrogates=tuple(SURROGATES)))
_DYNAMICS = (
    "forward",
    "fire",
    "fire_inhibition",
    "mem_reset",
    "_base_state_function",
    "_base_sub",
    "_base_zero",
    "_base_int",
)
for _host, _reversible, _more in (
    (snntorch.Leaky, RevLeaky, ()),
    (snntorch.Synaptic, RevSynaptic, ("_base_state_reset_zero",)),
    (snntorch.Lapicque, RevLapicque, ()),
):
    register_swap(Swap(_host, _reversible, (*_DYNAMICS, *_more)))

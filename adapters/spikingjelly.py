"""SpikingJelly's neurons, reversible: ``RevIFNode``, ``RevLIFNode``, ``RevParametricLIFNode``, and
in 2.0 ``RevSimpleIFNode`` and ``RevSimpleLIFNode``; and ``CoupledLIFNode``, the coupled node behind
their API.

After this module is imported they are found in ``spikingjelly.activation_based.neuron`` too, so
that code which names a neuron by a string, or takes it from there for a model builder, finds them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from snn_revplugin.bptt.sequence import sequence
from snn_revplugin.bptt.step import step
from snn_revplugin.compile.equations import Equations, equations_id
from snn_revplugin.compile.operators import OUTPUTS_KEEP, SEQUENCE_KEEPS, STEP_KEEPS
from snn_revplugin.neurons.coupled import Coupled
from snn_revplugin.neurons.differentiable import differentiable_coupled_step
from snn_revplugin.neurons.integrate_and_fire import (
    IntegrateAndFire,
    LeakyIntegrateAndFire,
    ParametricLeakyIntegrateAndFire,
)
from snn_revplugin.neurons.surrogate import AnySurrogate, Surrogate, surrogate_of
from snn_revplugin.neurons.transition import GraphNodes, Transition
from snn_revplugin.swap.hosts import Host, register_host
from snn_revplugin.swap.module import ReversibleNeuron
from snn_revplugin.swap.table import Swap, register_swap
from snn_revplugin.torch_internals.saved_tensors import saved_tensor_hooks_active
from snn_revplugin.torch_internals.uniform import note_uniform

from .spikingjelly_0_0_0_0_14 import StatefulTransitions
from .spikingjelly_tools import patches_for, register_in_vision, why_counted

try:
    from spikingjelly.activation_based import base, functional, layer, neuron
    from spikingjelly.activation_based import surrogate as host_surrogate
except ImportError as error:
    raise ImportError(
        "snn_revplugin.adapters.spikingjelly needs SpikingJelly: pip install"
        " 'snn-revplugin[spikingjelly]'"
    ) from error

try:
    from spikingjelly._ops.surrogate import _surrogate_spec
except ImportError:  # 0.0.0.0.14 has no such kernels

    def _surrogate_spec(function: Any) -> None:
        return None


from . import spikingjelly_any  # noqa: F401  (registers every other neuron)

NO_STEP = "the surrogate is not a Heaviside step forward, or learns parameters of its own"

# The surrogates of SpikingJelly whose derivative has a closed form: our name for it; the parameters
# go by their own names.
_SURROGATES = {
    "PiecewiseQuadratic": "piecewise_quadratic",
    "PiecewiseExp": "piecewise_exp",
    "Sigmoid": "sigmoid",
    "SoftSign": "soft_sign",
    "SuperSpike": "super_spike",
    "ATan": "atan",
    "NonzeroSignLogAbs": "nonzero_sign_log_abs",
    "Erf": "erf",
    "PiecewiseLeakyReLU": "piecewise_leaky_relu",
    "SquarewaveFourierSeries": "squarewave_fourier_series",
    "S2NN": "s2nn",
    "QPseudoSpike": "q_pseudo_spike",
    "LeakyKReLU": "leaky_k_relu",
    "FakeNumericalGradient": "fake_numerical_gradient",
    "LogTailedReLU": "log_tailed_relu",
    "DeterministicPass": "straight_through",
    "Rect": "rect",
}


def surrogate_from(function: Any) -> AnySurrogate | None:
    """A surrogate function of SpikingJelly's or of the user's; None if it is not a plain step
    forward."""
    name = SURROGATES.get(type(function))
    if name is not None and function.spiking:
        parameters = _Transitions.parameters_of(function)
        if all(isinstance(each, int | float) for each in parameters):
            return Surrogate(name, parameters, strict=False, function=function)
    if isinstance(function, nn.Module) and any(
        each.requires_grad for each in function.parameters()
    ):
        return None
    return surrogate_of(function)


def _to_compile(function: Any) -> tuple[str, list[float]] | None:
    """A surrogate function of SpikingJelly's as an operator takes it, by name and parameters."""
    name, slopes = SURROGATES.get(type(function)), _Transitions.parameters_of(function)
    if (
        not _Transitions.has_operators
        or name is None
        or not function.spiking
        or not all(isinstance(each, int | float) for each in slopes)
    ):
        return None
    return name, [float(each) for each in slopes]


def _surrogate_key(function: Any) -> tuple:
    return function, getattr(function, "spiking", None), *_Transitions.parameters_of(function)


def _is_widened(parameter: Tensor, x: Tensor) -> bool:
    """Whether the host computes with a parameter in another dtype than its own: the kernels for
    float32 do."""
    return x.dtype is torch.float32 and parameter.dtype in (torch.float16, torch.bfloat16)


class _NotesOperators(ReversibleNeuron):
    """Says of a compiled call what its operator keeps: not in the pure transitions, which a
    checkpoint may run."""

    keeps_of_step, keeps_of_sequence = STEP_KEEPS, SEQUENCE_KEEPS

    def single_step_forward(self, x: Tensor, *args: Tensor, **kwargs: object) -> Tensor:
        """One time step from the neuron's own state."""
        spikes = super().single_step_forward(x, *args, **kwargs)
        if torch.compiler.is_compiling():
            self._note_compiled(x, self.keeps_of_step)
        return spikes

    def multi_step_forward(self, x_seq: Tensor, *args: Tensor, **kwargs: object) -> Tensor:
        """T time steps from the neuron's own state."""
        spikes = super().multi_step_forward(x_seq, *args, **kwargs)
        if torch.compiler.is_compiling():
            keeps = self.keeps_of_step if self.store_v_seq else self.keeps_of_sequence
            self._note_compiled(x_seq, keeps)
        return spikes

    def step_from(self, current: Tensor, potential: Tensor) -> None:
        self.step_mode, self.v = "s", potential
        self.forward(current)

    def _note_compiled(self, x: Tensor, keeps: str) -> None:
        if self._equations_to_compile(x, self.v) is None:
            self.note_compiled_fallback()
        else:
            self.note_operators(keeps)


class _NothingToAdd:
    """SpikingJelly 2 builds a neuron's forward on its pure transitions itself."""


class _PureTransitions:
    """SpikingJelly 2's two pure transitions, taken reversibly where that can be done."""

    Coupled = _NothingToAdd
    dynamics_methods = (
        "single_step_functional_forward",
        "multi_step_functional_forward",
        "materialize_states",
    )
    other_surrogates = ()
    has_operators = True
    saves_through_hooks = True

    def materialize_states(
        self, inputs: tuple[Tensor, ...], states: tuple[object, ...], step_mode: str
    ) -> tuple[object, ...]:
        """The host's; it makes a tensor of equal elements of a potential that is a number."""
        made = super().materialize_states(inputs, states, step_mode)
        if isinstance(states[0], float) and not torch.compiler.is_compiling():
            note_uniform(made[0])
        return made

    @staticmethod
    def parameters_of(function: Any) -> tuple:
        """A surrogate function's parameters, in the order of its derivative's arguments."""
        return tuple(getattr(function, "_sg_params", {}).values())

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[object, ...], **kwargs: object
    ) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
        """One time step, ``(x,), (v,)`` to ``(spikes,), (v,)``; pure, as the host's."""
        if torch.compiler.is_compiling():
            equations = self._equations_to_compile(inputs[0], states[0])
            if equations is None:
                return super().single_step_functional_forward(inputs, states, **kwargs)
            spikes, v = torch.ops.snn_revplugin.step(
                inputs[0], states[0], list(self._learned()), *equations
            )
            return (spikes.contiguous(),), (v, *states[1:])
        transition = self._transition_for(inputs[0], states[0])
        if transition is None:
            return super().single_step_functional_forward(inputs, states, **kwargs)
        if saved_tensor_hooks_active():
            spikes, (v,), _ = sequence(transition, inputs[0].unsqueeze(0), states[:1], self.record)
            return (spikes[0],), (v, *states[1:])
        spikes, (v,) = step(transition, inputs[0], states[:1], self.record)
        if not spikes.is_contiguous() and not transition.plain.runs_fused(inputs[0]):
            spikes = torch.stack([spikes])[0]  # the host takes a sequence of one step: its strides
        return (spikes,), (v, *states[1:])

    def multi_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[object, ...], **kwargs: object
    ) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
        """T time steps, ``(x_seq,), (v,)`` to ``(spike_seq,), (v,)``; pure, as the host's."""
        if torch.compiler.is_compiling():
            compiled = self._compiled_sequence(inputs[0], states[0], with_path=False)
            if compiled is None:
                return super().multi_step_functional_forward(inputs, states, **kwargs)
            return (compiled[0],), (compiled[1],)
        transition = self._transition_for(inputs[0], states[0])
        if transition is None:
            return super().multi_step_functional_forward(inputs, states, **kwargs)
        spikes, (v,), _ = sequence(transition, inputs[0], states[:1], self.record)
        return (spikes,), (v,)

    def multi_step_forward(self, x_seq: Tensor, *args: Tensor, **kwargs: object) -> Tensor:
        """T time steps from the neuron's own state; with ``store_v_seq`` the potentials too."""
        if not self.store_v_seq:
            return super().multi_step_forward(x_seq, *args, **kwargs)
        v = self.materialize_states((x_seq, *args), tuple(self._memories.values()), "m")[0]
        if torch.compiler.is_compiling():
            compiled = self._compiled_sequence(x_seq, v, with_path=True)
            if compiled is None:
                return super().multi_step_forward(x_seq, *args, **kwargs)
            spikes, self.v, self.v_seq = compiled
            self.note_operators(self.keeps_of_sequence)
            return spikes
        transition = self._transition_for(x_seq, v)
        if transition is None:
            return super().multi_step_forward(x_seq, *args, **kwargs)
        spikes, (self.v,), self.v_seq = sequence(
            transition, x_seq, (v,), self.record, with_path=True
        )
        return spikes

    def _reset_arithmetic(self) -> dict[str, GraphNodes]:
        """Arguments of the equations for a release that resets in another way."""
        return {}

    def _charge_arithmetic(self) -> dict[str, bool]:
        """Arguments of the equations for a release that rounds the charge in another way."""
        return {"fused": self._is_fused()}

    def _is_fused(self) -> bool:
        """Whether the host has kernels for the surrogate."""
        return _surrogate_spec(self.surrogate_function) is not None

    def _why_host(self, x: Tensor, v: Tensor) -> str | None:
        return (
            None
            if self._neuron_precision is None
            else "SpikingJelly's mixed neuron precision needs its own kernels"
        )


# The one choice between releases: since 2.0 a neuron's transitions are pure functions; in
# 0.0.0.0.14 they read and write its state.
_Transitions = (
    _PureTransitions
    if hasattr(neuron.BaseNode, "single_step_functional_forward")
    else StatefulTransitions
)
SURROGATES: dict[type, str] = {
    getattr(host_surrogate, name): ours
    for name, ours in _SURROGATES.items()
    if hasattr(host_surrogate, name) and name not in _Transitions.other_surrogates
}


class _KnownNeuron(ReversibleNeuron):
    """What the neurons share whose equations are known."""

    def _transition_for(self, x: Tensor, v: Tensor) -> Transition | None:
        reason = self.why_fallback(x, v, *self._learned()) or self._why_host(x, v) or why_counted()
        transition = None
        if reason is None and v.dtype != x.dtype:
            reason = "the state has another dtype than the input"
        if reason is None and any(isinstance(each, Tensor) for each in self._constants()):
            reason = "a threshold, reset or time constant is a tensor"
        if reason is None and any(_is_widened(each, x) for each in self._learned()):
            reason = "the learned time constant has a shorter dtype than its float32 input"
        if reason is None:
            surrogate = _surrogate_key(self.surrogate_function)
            arithmetic = tuple(self._reset_arithmetic().values())
            others = surrogate, self._constants(), arithmetic
            transition = self.record.transition(
                self._learned(), others, self._build, starts=v.grad_fn is None
            )
            if transition is None:
                reason = NO_STEP
        if reason is not None:
            self.note_fallback(reason)
        return transition

    def _build(self) -> Transition | None:
        surrogate = surrogate_from(self.surrogate_function)
        return None if surrogate is None else self._equations(surrogate)

    def _constants(self) -> tuple:
        return self.v_threshold, self.v_reset, self.detach_reset

    def _learned(self) -> tuple[Tensor, ...]:
        return ()


class _ReversibleNode(_Transitions, _KnownNeuron, _NotesOperators):
    """What ``IFNode`` and its kin share, besides the transitions of the host that is installed."""

    def _compiled_sequence(
        self, x_seq: Tensor, v: Tensor, with_path: bool
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Spikes, last potential and path from an operator, or None where there is none for the
        call."""
        equations = self._equations_to_compile(x_seq, v)
        if equations is None or len(x_seq) == 0:
            return None
        return torch.ops.snn_revplugin.sequence(
            x_seq, v, list(self._learned()), *equations, with_path
        )

    def _equations_to_compile(self, x: Tensor, v: Tensor) -> Equations | None:
        """The equations as an operator takes them, or None where the host's own path is to be
        compiled."""
        surrogate, constants = _to_compile(self.surrogate_function), self._constants()
        if surrogate is None or not all(
            each is None or isinstance(each, int | float) for each in constants
        ):
            return None
        if self._neuron_precision is not None or not self.takes_operators(x, v, *self._learned()):
            return None
        if x.is_cuda and not self._is_fused():
            return None  # the operators' kernels divide by tau, the host's torch code does not
        kind, tau, variant = self._kind()
        reset = "soft" if self.v_reset is None else "hard"
        id = equations_id(kind, reset, "detached" if self.detach_reset else "", variant)
        name, slopes = surrogate
        numbers = self.v_threshold, self.v_reset or 0.0, tau, *slopes
        return Equations([id, name], [float(each) for each in numbers])


class RevIFNode(_ReversibleNode, neuron.IFNode):
    """``spikingjelly.activation_based.neuron.IFNode`` with the same spikes, potentials and
    gradients, and a fraction of the memory. Takes the host's arguments, and ``reversible=False``
    for the host's own path.
    """

    scripted_charge = False

    def _equations(self, surrogate: AnySurrogate) -> Transition:
        return IntegrateAndFire(
            surrogate, *self._constants(), fused=self._is_fused(), **self._reset_arithmetic()
        )

    def _kind(self) -> tuple[str, float, str]:
        return "if", 1.0, ""


class RevLIFNode(_ReversibleNode, neuron.LIFNode):
    """``spikingjelly.activation_based.neuron.LIFNode`` with the same spikes, potentials and
    gradients, and a fraction of the memory. Takes the host's arguments, and ``reversible=False``
    for the host's own path.

    >>> import torch
    >>> lif = RevLIFNode(tau=2.0, step_mode="m")
    >>> lif(torch.full((3, 1), 1.5))
    tensor([[0.],
            [1.],
            [0.]])
    """

    def _constants(self) -> tuple:
        return *super()._constants(), self.tau, self.decay_input

    def _equations(self, surrogate: AnySurrogate) -> Transition:
        return LeakyIntegrateAndFire(
            surrogate, *self._constants(), **self._reset_arithmetic(), **self._charge_arithmetic()
        )

    def _kind(self) -> tuple[str, float, str]:
        return "lif", self.tau, "decay_input" if self.decay_input else ""


class RevParametricLIFNode(_ReversibleNode, neuron.ParametricLIFNode):
    """``spikingjelly.activation_based.neuron.ParametricLIFNode`` with the same spikes, potentials
    and gradients, and a fraction of the memory. Takes the host's arguments, and
    ``reversible=False`` for the host's own path.
    """

    scripted_in_eval = scripted_charge = False

    def _constants(self) -> tuple:
        return *super()._constants(), self.decay_input

    def _learned(self) -> tuple[Tensor, ...]:
        return (self.w,)

    def _equations(self, surrogate: AnySurrogate) -> Transition:
        *constants, decay_input = self._constants()
        return ParametricLeakyIntegrateAndFire(
            surrogate,
            *constants,
            decay_input=decay_input,
            w=self.w,
            **self._reset_arithmetic(),
            **self._charge_arithmetic(),
        )

    def _kind(self) -> tuple[str, float, str]:
        return "plif", 0.0, "decay_input" if self.decay_input else ""


if hasattr(neuron, "SimpleBaseNode"):

    class _SimpleNode(_KnownNeuron):
        """What the neurons on ``SimpleBaseNode`` share, whose steps write the neuron's state."""

        def single_step_forward(self, x: Tensor) -> Tensor:
            """One time step, ``[N, ...]`` to spikes ``[N, ...]``."""
            transition, v = self._prepared(x, x)
            if transition is None:
                return super().single_step_forward(x)
            spikes, (self.v,) = step(transition, x, (v,), self.record)
            return spikes

        def multi_step_forward(self, x_seq: Tensor) -> Tensor:
            """T time steps, ``[T, N, ...]`` to spikes ``[T, N, ...]``."""
            transition = None
            if isinstance(x_seq, Tensor) and x_seq.dim() and len(x_seq):
                transition, v = self._prepared(x_seq, x_seq[0])
            if transition is None:
                return super().multi_step_forward(x_seq)
            spikes, (self.v,), _ = sequence(transition, x_seq, (v,), self.record)
            return spikes

        def step_from(self, current: Tensor, potential: Tensor) -> None:
            self.step_mode, self.v = "s", potential
            self.forward(current)

        def _prepared(self, inputs: Tensor, x: Tensor) -> tuple[Transition | None, Tensor]:
            """The equations of a call, and the potential that it starts from; None for the host's
            own path."""
            if torch.compiler.is_compiling():
                self.note_compiled_fallback()
                return None, x
            v = torch.full_like(x, self.v) if isinstance(self.v, float) else self.v
            transition = self._transition_for(inputs, v)
            if transition is not None and v.shape != x.shape:
                self.note_fallback("the state has another shape than the input")
                return None, v
            return transition, v

        def _why_host(self, x: Tensor, v: Tensor) -> str | None:
            if isinstance(self.v, float) and self.v:  # the host computes with the Python number
                return "the state is a number other than zero"
            return None

        def _reset_arithmetic(self) -> dict[str, GraphNodes]:
            # In step mode 's' the potential is reset by the spikes that the host gives out, with
            # their gradient.
            resets = not self.detach_reset and self.step_mode == "s"
            return {"nodes": GraphNodes.RESET if resets else GraphNodes.ONE}

    class RevSimpleIFNode(_SimpleNode, neuron.SimpleIFNode):
        """``spikingjelly.activation_based.neuron.SimpleIFNode`` with the same spikes, potentials
        and gradients, and a fraction of the memory. Takes the host's arguments, and
        ``reversible=False`` for the host's own path.
        """

        def _equations(self, surrogate: AnySurrogate) -> Transition:
            return IntegrateAndFire(surrogate, *self._constants(), **self._reset_arithmetic())

    class RevSimpleLIFNode(_SimpleNode, neuron.SimpleLIFNode):
        """``spikingjelly.activation_based.neuron.SimpleLIFNode`` with the same spikes, potentials
        and gradients, and a fraction of the memory. Takes the host's arguments, and
        ``reversible=False`` for the host's own path.
        """

        def _constants(self) -> tuple:
            return *super()._constants(), self.tau, self.decay_input

        def _equations(self, surrogate: AnySurrogate) -> Transition:
            return LeakyIntegrateAndFire(
                surrogate,
                *self._constants(),
                **self._reset_arithmetic(),
                fused=False,
            )

        def _why_host(self, x: Tensor, v: Tensor) -> str | None:
            if self.v_reset is None:
                return "v_reset=None has no charge"  # the host's error says it best
            return super()._why_host(x, v)


class CoupledLIFNode(_Transitions.Coupled, _NotesOperators, neuron.BaseNode):
    """The split-coupled reversible node of :mod:`snn_revplugin.coupled` behind the API of
    SpikingJelly's neurons.

    Its outputs are real-valued: spikes, plus ``beta`` times what came in on the other half of the
    channels. The memory ``v`` has the shape of the input of one time step.

    Args:
        tau: the membrane's time constant in time steps, at least 1.
        alpha: how much of each half's potential the other half's goes on with, at most 1; up to ``1
            / tau`` potentials of neurons that do not fire stay bounded.
        beta: how much of each half's input passes on into the other half's output.
        v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq: as in the
            host.
        split_dim: the dimension of one time step's tensor that is split; channels by default, -1
            for the last.
        reversible: False for plain autograd, for comparison.

    Raises:
        ValueError: a number out of the range in which input and state can be rebuilt.

    >>> import torch
    >>> node = CoupledLIFNode(beta=0.5, step_mode="m")
    >>> node(torch.tensor([[[4.0, 1.0]], [[0.0, 0.0]]]))
    tensor([[[1.5000, 2.0000]],
    <BLANKLINE>
            [[0.0000, 0.0000]]])
    """

    keeps_of_step = keeps_of_sequence = OUTPUTS_KEEP

    def __init__(
        self,
        tau: float = 2.0,
        alpha: float = 0.25,
        beta: float = 1.0,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: host_surrogate.SurrogateFunctionBase | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool = False,
        split_dim: int = 1,
        reversible: bool = True,
    ) -> None:
        surrogate_function = (
            host_surrogate.Sigmoid() if surrogate_function is None else surrogate_function
        )
        super().__init__(
            v_threshold,
            v_reset,
            surrogate_function,
            detach_reset,
            step_mode,
            store_v_seq=store_v_seq,
        )
        self.tau, self.alpha, self.beta, self.split_dim, self.reversible = (
            tau,
            alpha,
            beta,
            split_dim,
            reversible,
        )
        self._coupled()  # refuses what cannot be

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[object, ...], **kwargs: object
    ) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
        """One time step, ``(x,), (v,)`` to ``(y,), (v,)``; pure."""
        if torch.compiler.is_compiling():
            equations = self._equations_to_compile(inputs[0], states[0])
            if equations is None:
                y, v = differentiable_coupled_step(
                    self._equations(None), inputs[0], states[0], self.surrogate_function
                )
            else:
                y, v = torch.ops.snn_revplugin.step(inputs[0], states[0], [], *equations)
            return (y,), (v,)
        coupled = self._coupled()
        if self._goes_plain(coupled, inputs[0], states[0]):
            y, v = differentiable_coupled_step(
                coupled, inputs[0], states[0], self.surrogate_function
            )
        else:
            y, (v,) = step(coupled, inputs[0], states[:1], self.record)
        return (y,), (v,)

    def multi_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[object, ...], **kwargs: object
    ) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
        """T time steps, ``(x_seq,), (v,)`` to ``(y_seq,), (v,)``; pure."""
        (v,), outputs, compiling = states, [], torch.compiler.is_compiling()
        equations = self._equations_to_compile(inputs[0], v) if compiling else None
        if equations is not None:
            y_seq, v, _ = torch.ops.snn_revplugin.sequence(inputs[0], v, [], *equations, False)
            return (y_seq,), (v,)
        coupled = self._equations(None) if compiling else self._coupled()
        if not compiling and not self._goes_plain(coupled, inputs[0], v):
            y_seq, (v,), _ = sequence(coupled, inputs[0], (v,), self.record)
            return (y_seq,), (v,)
        for x in inputs[0]:
            y, v = differentiable_coupled_step(coupled, x, v, self.surrogate_function)
            outputs.append(y)
        return (torch.stack(outputs),), (v,)

    def _equations_to_compile(self, x: Tensor, v: Tensor) -> Equations | None:
        """The equations as operators take them, or None where plain code is to be compiled."""
        surrogate = _to_compile(self.surrogate_function)
        if surrogate is None or not self.takes_operators(x, v):
            return None
        reset = "soft" if self.v_reset is None else "hard"
        id = equations_id("coupled", reset, "detached" if self.detach_reset else "")
        name, slopes = surrogate
        numbers = self.tau, self.alpha, self.beta, self.v_threshold
        numbers = *numbers, self.v_reset or 0.0, self.split_dim, *slopes
        return Equations([id, name], [float(each) for each in numbers])

    def _goes_plain(self, coupled: Coupled, x: Tensor, v: Tensor) -> bool:
        reason = self.why_fallback(x, v) or why_counted()
        if reason is None and coupled.surrogate is None:
            reason = NO_STEP
        if reason is not None:
            self.note_fallback(reason)
        return reason is not None

    def _coupled(self) -> Coupled:
        surrogate = _surrogate_key(self.surrogate_function)
        return self.record.transition(
            (),
            (surrogate, self._numbers(), self.split_dim),
            lambda: self._equations(surrogate_from(self.surrogate_function)),
        )

    def _equations(self, surrogate: AnySurrogate | None) -> Coupled:
        return Coupled(*self._numbers(), surrogate, self.split_dim)

    def _numbers(self) -> tuple:
        return self.tau, self.alpha, self.beta, self.v_threshold, self.v_reset, self.detach_reset

    def extra_repr(self) -> str:
        return (
            f"tau={self.tau}, alpha={self.alpha}, beta={self.beta}, {super().extra_repr()},"
            f" split_dim={self.split_dim}"
        )


_PAIRS = {
    neuron.IFNode: RevIFNode,
    neuron.LIFNode: RevLIFNode,
    neuron.ParametricLIFNode: RevParametricLIFNode,
}
_SIMPLE = (
    {
        neuron.SimpleIFNode: RevSimpleIFNode,
        neuron.SimpleLIFNode: RevSimpleLIFNode,
    }
    if hasattr(neuron, "SimpleBaseNode")
    else {}
)
_DYNAMICS = (
    "forward",
    "single_step_forward",
    "multi_step_forward",
    *_Transitions.dynamics_methods,
)

_SIMPLE_DYNAMICS = "neuronal_charge", "neuronal_fire", "neuronal_reset"


# Neurons whose outputs come back to them.
_CONTAINERS = layer.LinearRecurrentContainer, layer.ElementWiseRecurrentContainer


def _is_neuron(module: nn.Module) -> bool:
    """Whether a module is a neuron of SpikingJelly's, or the user's own ``MemoryModule`` with a
    state."""
    if isinstance(module, (neuron.BaseNode, *_CONTAINERS)):
        return True
    hosts = (kind for kind in type(module).__mro__ if kind.__module__.startswith("spikingjelly."))
    first = next(hosts, None)
    if first is base.MemoryModule:
        return type(module) is not first and bool(module._memories)
    return first is not None and f"{first.__module__}.".startswith(f"{neuron.__name__}.")


register_host(
    Host(
        "spikingjelly",
        _is_neuron,
        surrogates=tuple(each.__name__ for each in SURROGATES),
        swapped=getattr(functional, "invalidate_reset_cache", None),
    )
)
for _host, _reversible in _PAIRS.items():
    register_swap(Swap(_host, _reversible, _DYNAMICS))
for _host, _reversible in _SIMPLE.items():
    register_swap(Swap(_host, _reversible, (*_DYNAMICS, *_SIMPLE_DYNAMICS)))
_OURS = (*_PAIRS.values(), CoupledLIFNode)
_NotesOperators.tool_patches = patches_for(_PAIRS, alone=(CoupledLIFNode,))
register_in_vision(_OURS)
for _reversible in (*_OURS, *_SIMPLE.values()):
    setattr(neuron, _reversible.__name__, _reversible)

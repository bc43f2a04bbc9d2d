"""What every neuron is to the rest of the library: a transition, in plain torch code.

One time step takes an input ``x`` and the states before it to outputs and the states after it:

    step        outputs, states = step(x, states)
    again       the same states once more, in backward, from what is kept of the step
    invert      the states before, from the states after; where that is possible
    vjp         the gradients at x, states and parameters, from those at outputs and states

:class:`Transition` is this interface. The neurons below it are pure mathematics: no autograd
graph, no module, no host. ``bptt`` runs transitions as autograd Functions and decides what is kept;
``kernels`` holds fused kernels behind the same interface.

==============================  =============================================================
neurons/one_state_equations.py  charge, fire, reset, and their inverse
neurons/one_state.py            a transition made of them
neurons/leaky.py                snnTorch's ``Leaky``
neurons/lapicque.py             snnTorch's ``Lapicque``
neurons/synaptic.py             snnTorch's ``Synaptic``, which has two states
neurons/integrate_and_fire.py   SpikingJelly's ``IFNode``, ``LIFNode``, ``ParametricLIFNode``
neurons/coupled.py              the split-coupled node of the seed paper
==============================  =============================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from ..torch_internals import capture
from ..torch_internals.distributed import is_freed
from ..torch_internals.late import Largest
from ..torch_internals.versioned import Versioned

if TYPE_CHECKING:
    from ..packed.spikes import PackedSpikes
    from .kernel_spec import KernelSpec

WRITTEN = (
    "a learned parameter of a reversible neuron, of shape {shape}, was written through .data"
    " between a time step and its backward. Call backward before you change it."
)
States = tuple[Tensor, ...]
Needed = Sequence[bool]  # which of a neuron's parameters need their gradients
Gradients = tuple[Tensor | None, ...]  # at the parameters
# The gradients at the input, at the states before, at the parameters.
Derivative = tuple[Tensor, Gradients, Gradients]


class GraphNodes(Enum):
    """The graph nodes of one time step in the host, where gradients can be taken or hooked.

    ``ONE``: outputs and states leave one node (SpikingJelly 2). ``FIRE``: the spikes are computed
    from a state that is given out (snnTorch). ``RESET``: the potential that is given out is in turn
    computed from the spikes (snnTorch's immediate reset, SpikingJelly 0.0.0.0.14).
    """

    ONE = "one node"
    FIRE = "a node charges, a node fires"
    RESET = "a node charges, a node fires, a node resets"


class StepParts(Protocol):
    """One time step under way: a graph node takes each part as its turn comes.

    Attributes:
        charged: the charged potential, or None where no such part exists.
        reset_signal: what a delayed reset acts on, as zeros and ones; None where there is none.
        synapse: the synaptic current after the step, of a neuron that has one.
    """

    charged: Tensor | None
    reset_signal: Tensor | None
    synapse: Tensor

    def fire(self) -> tuple[Tensor | PackedSpikes, Tensor]:
        """The spikes as zeros and ones (or packed), and the outputs as the host gives them out."""

    def states(self) -> States:
        """The states after the step. For ``GraphNodes.FIRE`` this comes before :meth:`fire`."""


class StepView(Protocol):
    """One time step as backward sees it. Each part is computed when it is first read."""

    @property
    def charged(self) -> Tensor: ...  # after charge and before reset
    @property
    def before(self) -> States: ...  # the states that the step started from
    @property
    def after(self) -> States: ...  # the states that it led to
    @property
    def packed(self) -> PackedSpikes: ...  # the spikes as bits
    @property
    def fired(self) -> Tensor: ...  # the spikes as zeros and ones
    @property
    def silent(self) -> Tensor: ...  # one minus the spikes
    @property
    def reset_signal(self) -> Tensor | None: ...  # what a delayed reset acts on
    @property
    def packed_signal(self) -> PackedSpikes | None: ...  # the reset signal as bits
    @property
    def has_charged(self) -> bool: ...  # whether the charged potential needs no computing
    @property
    def invertible(self) -> bool: ...  # whether the step can be reversed
    @property
    def reverses(self) -> bool: ...  # whether the states before follow from :meth:`invert` alone
    @property
    def current(self) -> Tensor | None: ...  # x, or None where it is not recomputed
    @property
    def outputs(self) -> Tensor: ...  # of a neuron that is recomputed from its outputs

    def hand_down(self) -> None:
        """Reverse the step and leave the states for the step before, where that is possible."""

    def leave_before(self, states: States) -> None:
        """Leave the states before, which the derivative has reversed itself where the view
        ``reverses``."""


class Scan(NamedTuple):
    """T time steps forward.

    Attributes:
        fired: the spikes, packed.
        outputs: ``[T, ...]``.
        states: after the last step.
        charged: the charged potentials ``[T, ...]``, if they were asked for.
        path: the first state after every step, ``[T, ...]``, likewise.
    """

    fired: PackedSpikes
    outputs: Tensor
    states: States
    charged: Tensor | None = None
    path: Tensor | None = None


class Inputs(Protocol):
    """The inputs ``[T, ...]`` of a sequence as backward recomputes them."""

    exact: bool  # whether they are recomputed bit for bit

    def value(self) -> Tensor:
        """The inputs."""

    def consume(self) -> tuple[Tensor, bool]:
        """The inputs, and whether the reader may overwrite them."""


@dataclass
class KeptSequence:
    """What backward has of T time steps.

    Attributes:
        inputs: of the neurons that are recomputed from their inputs; None if ``charged`` is kept.
        charged: the charged potentials ``[T, ...]``, kept in the place of the inputs.
        start: the states before the first step.
        packed: the spikes, or None inside saved-tensor hooks of another tool, where the charged
            potentials are bit for bit those of forward and decide.
        outputs: of the neurons that are recomputed from their outputs.
        dtype: of the inputs and of the gradient at them.
    """

    start: States
    dtype: torch.dtype
    inputs: Inputs | None = None
    charged: Tensor | None = None
    packed: PackedSpikes | None = None
    outputs: Tensor | None = None


class SequenceGradients(NamedTuple):
    """The gradients at what T time steps gave; None for those that are zero."""

    outputs: Tensor | None
    states: Gradients
    path: Tensor | None = None


class Transition:
    """A neuron's equations. Instances are compared by identity: a chain of time steps continues as
    long as its neuron passes the same instance, so a changed parameter calls for a new one.

    Attributes:
        nodes: the graph nodes of a time step.
        from_outputs: whether the step is recomputed from its outputs rather than from its input.
        has_reset_signal: whether a delayed reset acts in the charge.
        reset_follows_spikes: whether the reset signal of a step is what the step before fired.
        states_follow_charged: whether :meth:`states_of` exists.
        reads_input: whether :meth:`vjp` reads the input.
        reads_before: whether it reads the states before the step.
        invertible: whether :meth:`invert` exists.
        single_steps_only: whether there is no :meth:`scan`.
        has_synapse: whether the input charges the first state alone (a synaptic current), by a
            graph node of its own, and that one the potential, the last state. Not with a ``ONE``
            node.
        synapse_read_within: whether the potential is charged by the synaptic current before the
            host gives that out, so that a gradient at it does not contain the potential's.
        fed_back: whether the outputs are the first of the states (a recurrent neuron); ``ONE`` node
            only. The node then gives them out once.
        fires_with_charge: whether backward differentiates fire and charge together, by :meth:`vjp`,
            if no code can read the gradient between them; with ``FIRE`` nodes.
        own_code: whether the step is a module's own code, which no kernel can stand for.
        parameter_names: the attributes that hold :attr:`parameters`.
        graded_factor: what multiplies the spikes, or None.
    """

    nodes = GraphNodes.ONE
    from_outputs = False
    has_reset_signal = False
    reset_follows_spikes = False
    states_follow_charged = False
    reads_input = False
    reads_before = False
    invertible = False
    single_steps_only = False
    has_synapse = False
    synapse_read_within = False
    fed_back = False
    fires_with_charge = False
    own_code = False
    parameter_names: tuple[str, ...] = ()
    graded_factor: Tensor | None = None

    _versions: Sequence[Versioned]
    _values: Sequence[tuple[Tensor, Tensor]]

    @cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors, learned or not, that :meth:`vjp` gives gradients for."""
        return tuple(getattr(self, name) for name in self.parameter_names)

    @cached_property
    def largest(self) -> Largest:
        """The largest potentials that backward has met, on a device that is not to be waited
        for."""
        return Largest()

    def follow(self, earlier: Transition | None) -> None:
        """Go on with what is known of the same neuron under earlier equations."""
        if earlier is not None:
            vars(self)["largest"] = earlier.plain.largest

    def with_parameters(self, parameters: Sequence[Tensor]) -> Transition:
        """The same neuron with other tensors for its parameters."""
        return replace(self, **dict(zip(self.parameter_names, parameters, strict=True)))

    def at(self, link: object) -> Transition:
        """The same neuron as it takes one time step of a chain: a module's own code may read more
        than an input and states."""
        return self

    @property
    def cascade(self) -> tuple[float, ...]:
        """The smallest decay of each state, in the order in which one charges the next: decides the
        distance between two anchors."""
        return (self.decay,)

    @property
    def spikes_carry_gradient(self) -> bool:
        return True

    @property
    def plain(self) -> Transition:
        """The same neuron in plain torch code."""
        return self

    def note_versions(self) -> None:
        """Note the versions and values of the learned parameters, for :meth:`check_unchanged` and
        :meth:`check_values`. The others are snapshots, see :func:`snapshot`."""
        learned = [each.detach() for each in self.parameters if each.requires_grad]
        self._versions = [Versioned(each) for each in learned]
        self._values = [(each, each.clone()) for each in learned if capture.may_compare(each)]

    def check_unchanged(self) -> None:
        """Check that no learned parameter was written into since :meth:`note_versions`.

        Raises:
            RuntimeError: one was, between a forward and its backward.
        """
        for each in self._versions:
            each.get("a reversible neuron's gradient (its decay, threshold or factor)")

    def check_values(self) -> None:
        """:meth:`check_unchanged` by value, which also tells of a write through ``.data``.

        Raises:
            RuntimeError: a learned parameter was written into.
        """
        for tensor, value in self._values:
            readable = capture.may_compare(tensor) and not is_freed(tensor)
            if readable and not torch.equal(tensor, value):
                raise RuntimeError(WRITTEN.format(shape=tuple(tensor.shape)))

    # ------------------------------------------------------------------------------ one time step

    def begin(self, x: Tensor, states: States) -> StepParts:
        """One time step, part by part."""
        raise NotImplementedError

    def again(self, view: StepView, states: States) -> tuple[Tensor | None, States]:
        """The step once more, from ``states`` before it and what is kept; no spike is decided.

        Returns:
            The charged potential, or None where it is not needed, and the states after the step.
        """
        raise NotImplementedError

    def states_of(self, charged: Tensor, view: StepView) -> States:
        """The states after the step from its charged potential."""
        raise NotImplementedError

    def charged_of(self, view: StepView) -> Tensor:
        """The charged potential from what else the view has."""
        raise NotImplementedError

    def invert(self, view: StepView) -> States:
        """The states before a step from its charged potential and its input, to rounding."""
        raise NotImplementedError

    def vjp(
        self, view: StepView, grad_outputs: Tensor | None, grad_states: Gradients, needed: Needed
    ) -> Derivative:
        """The derivative of a whole step, in closed form.

        Args:
            view: the step.
            grad_outputs, grad_states: the gradients at what it gave; at least one is not None.
            needed: which of the parameters need theirs.

        Returns:
            The gradients at the input, at the states before and at the parameters.
        """
        raise NotImplementedError

    def vjp_of_charge(self, view: StepView, grad_charged: Gradients, needed: Needed) -> Derivative:
        """:meth:`vjp` of the node that charges, from the gradients at what it gives: the states
        after the step, or the charged potential alone where a node of its own resets."""
        raise NotImplementedError

    def vjp_of_synapse(self, view: StepView, grad_synapse: Tensor, needed: Needed) -> Derivative:
        """:meth:`vjp` of the node that charges the synaptic current, from the gradient at it.
        :meth:`vjp_of_charge` is then that of the node which charges the potential by it."""
        raise NotImplementedError

    def integrate(self, x: Tensor, synapse: Tensor) -> Tensor:
        """The synaptic current after a step, from its input and the one before."""
        raise NotImplementedError

    def charge_again(self, x: Tensor, states: States) -> States:
        """What the node that charges gives, as differentiable code: for gradients that are
        differentiated again."""
        raise NotImplementedError

    def vjp_of_fire(
        self, view: StepView, grad_outputs: Tensor, needed: Needed
    ) -> tuple[Tensor, Gradients]:
        """The gradients at the charged potential and the parameters, of the node that fires."""
        raise NotImplementedError

    def vjp_of_reset(
        self, view: StepView, grad_states: Gradients, needed: Needed
    ) -> tuple[Tensor, Tensor | None, Gradients]:
        """The gradients at the charged potential, at the outputs and at the parameters, of the node
        that resets."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------- T time steps

    def scan(
        self, inputs: Tensor, states: States, keep_charged: bool = False, with_path: bool = False
    ) -> Scan:
        """T time steps from inputs ``[T, ...]``."""
        raise NotImplementedError

    def laid_out(self, outputs: Tensor, inputs: Tensor) -> Tensor:
        """The outputs of :meth:`scan` in the memory format that the host gives out for the inputs
        ``[T, ...]``."""
        return outputs

    def vjp_of_scan(
        self, kept: KeptSequence, gradients: SequenceGradients, needed: Needed
    ) -> Derivative:
        """The derivative of T time steps, in closed form."""
        raise NotImplementedError

    def inputs_for_scan(
        self, inputs: Inputs | None, currents: Tensor, states: States
    ) -> Inputs | None:
        """How :meth:`vjp_of_scan` had better have its inputs, given how they are recomputed."""
        return inputs

    def recover_inputs(self, packed: PackedSpikes, time: bool, outputs: Tensor) -> Tensor:
        """The inputs of a step, or with ``time`` of T steps, of a neuron that is recomputed from
        its outputs; to rounding."""
        raise NotImplementedError

    # ---------------------------------------------------------------------------------- kernels

    def why_no_kernel(self, x: Tensor, states: States) -> str | None:
        """Why no fused kernel can take these equations, or None if one can."""
        return f"there is no kernel for {type(self).__name__}"

    def kernel_spec(self, x: torch.dtype, state: torch.dtype, on_cuda: bool) -> KernelSpec:
        """What a kernel is compiled for."""
        raise NotImplementedError

    def kernel_numbers(self, spec: KernelSpec) -> tuple[Tensor | float, ...]:
        """The numbers that a kernel compiled for ``spec`` takes, in its order; of a neuron with one
        state a :class:`.kernel_spec.KernelNumbers`."""
        raise NotImplementedError

    def gradients_from_kernel(self, sums: Sequence[Tensor | None]) -> Gradients:
        """The gradients at the parameters.

        Args:
            sums: of the derivatives by the kernel's decay, threshold and factor, each of that
                number's shape; None for those that are not needed.
        """
        return ()

    def sample_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """A shape of one step's input for a test of the kernels: ``rows`` by ``columns``, or by the
        dimensions of the parameters."""
        own = torch.broadcast_shapes((1,), *(each.shape for each in self.parameters))
        return rows, *(columns if size == 1 else size for size in own)


def snapshot(parameter: Tensor) -> Tensor:
    """A parameter as a transition holds it: itself if it is learned, else a copy. The host reads a
    parameter that is not learned at each time step, and lets it change between two of them."""
    return parameter if parameter.requires_grad else parameter.detach().clone()


def add(a: Tensor, b: Tensor) -> Tensor:
    """``a + b``, in place of ``a`` where that has the sum's shape and dtype."""
    return a.add_(b) if a.dtype == b.dtype and a.shape == b.shape else a + b


def sum_to(grad: Tensor, parameter: Tensor) -> Tensor:
    """A gradient summed over the dimensions that its parameter was broadcast along."""
    return grad.sum_to_size(parameter.shape).to(parameter.dtype)


def add_gradients(totals: Gradients, grads: Gradients) -> Gradients:
    """Two sets of parameters' gradients, added."""
    return tuple(
        b if a is None else a if b is None else a + b for a, b in zip(totals, grads, strict=True)
    )

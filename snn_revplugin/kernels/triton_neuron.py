"""A neuron with one state in fused kernels, behind the interface of a plain neuron.

:class:`TritonNeuron` computes with the same bits forward as the plain neuron, and the same
gradients to rounding. What the kernels cannot take (tensors that broadcast or have no elements)
and what they do not compute (a stretch of potentials rebuilt, a residue that corrects a reversed
potential) goes to the plain neuron.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..neurons.kernel_spec import KernelNumbers, KernelSpec
from ..neurons.one_state import OneStateNeuron
from ..neurons.transition import (
    Derivative,
    Gradients,
    GraphNodes,
    Inputs,
    KeptSequence,
    Needed,
    Scan,
    SequenceGradients,
    States,
    StepParts,
    StepView,
)
from ..packed.spikes import PackedSpikes, contiguous
from ..replay import Normed, normed
from .launch import (
    AT_ONCE,
    BITS,
    FEW_STEPS,
    HALF,
    QUARTER,
    STRETCH,
    Layout,
    Parameters,
    Totals,
    arranged,
    empty,
    launch,
    parameters_in,
    unpack,
)
from .triton_transition import TritonTransition

Wanted = tuple[bool, bool, bool]  # which gradients are needed, of decay, threshold and factor


class KernelParts:
    """A time step that a kernel has computed, see :class:`..neurons.transition.StepParts`."""

    __slots__ = ("_after", "_charged", "_fired", "_neuron", "_spikes", "_x_and_v")

    def __init__(self, neuron: TritonNeuron, x: Tensor, v: Tensor, layout: Layout) -> None:
        self._neuron, self._x_and_v = neuron, (arranged(x, layout), v)
        spec, count = neuron.spec(x.dtype, v.dtype, x.is_cuda), x.numel()
        keeps_charged = neuron.plain.reset_keeps_charged
        writes_charged = neuron.nodes is not GraphNodes.ONE and not keeps_charged
        self._spikes, self._after = (
            empty(x.shape, layout, dtype, x) for dtype in (spec.spikes, spec.after)
        )
        charged = empty(x.shape, layout, spec.charged, x) if writes_charged else None
        bits = empty((-(-count // BITS),), (1,), torch.uint8, x)
        self._launch(layout, self._spikes, bits, charged, self._after)
        self._charged = self._after if keeps_charged else charged
        dtype = neuron.surrogate.dtype_of_spikes(self._after)
        self._fired = PackedSpikes.of_bits(bits, x.shape, layout, dtype, neuron.graded_factor)

    def _launch(self, layout: Layout, *outputs: Tensor | None) -> None:
        neuron, (x, v) = self._neuron, self._x_and_v
        spec, count = neuron.spec(x.dtype, v.dtype, x.is_cuda), x.numel()
        launch(
            neuron.code.forward_kernel, count, x, arranged(v, layout),
            *neuron.arguments(spec, x.shape, layout), *outputs, None, 1, count, like=x, spec=spec,
        )  # fmt: skip

    @property
    def charged(self) -> Tensor:
        """The charged potential; of a step that is one graph node computed only if it is read."""
        if self._charged is None:
            (x, v), layout = self._x_and_v, self._fired.layout
            spec = self._neuron.spec(x.dtype, v.dtype, x.is_cuda)
            self._charged = empty(x.shape, layout, spec.charged, x)
            self._launch(layout, None, None, self._charged, None)
        return self._charged

    @property
    def reset_signal(self) -> Tensor | None:
        return self._neuron.plain.reset_signal_at(self._x_and_v[1])

    def fire(self) -> tuple[PackedSpikes, Tensor]:
        return self._fired, self._spikes

    def states(self) -> States:
        return (self._after,)


@dataclass
class BackwardTensors:
    """What the kernel for a step backward reads and writes, see :mod:`.neuron`; None for the rest.

    ``h`` is the potential after the step where ``from_after``, else the charged one.
    """

    grad_spikes: Tensor | None = None
    grad: Tensor | None = None
    h: Tensor | None = None
    before: Tensor | None = None
    x: Tensor | None = None
    bits: Tensor | None = None
    signal: Tensor | None = None
    grad_x: Tensor | None = None
    grad_before: Tensor | None = None
    before_out: Tensor | None = None
    from_after: bool = False

    @property
    def like(self) -> Tensor:
        """A tensor of the step's shape and device."""
        return self.grad_spikes if self.grad is None else self.grad

    def arguments(self, layout: Layout) -> tuple[Tensor | None, ...]:
        """What is read, in the kernel's order."""
        read = self.grad_spikes, self.grad, self.h, self.before, self.x
        return *(_arranged(each, layout) for each in read), self.bits, self.signal

    @property
    def outputs(self) -> tuple[Tensor | None, ...]:
        """What is written, in the kernel's order."""
        return self.grad_x, self.grad_before, self.before_out


class TritonNeuron(TritonTransition):
    """The kernels for one neuron with one state."""

    module = "neuron"

    def __init__(self, plain: OneStateNeuron, interpreted: bool) -> None:
        super().__init__(plain, interpreted)
        self.fires_with_charge = plain.nodes is GraphNodes.FIRE
        self._reset = plain.kernel_spec(torch.float32, torch.float32, False).reset
        self._numbers_of: dict[bool, KernelNumbers] = {}
        self._parameters: dict[tuple, Parameters] = {}
        self._layouts: dict[tuple, Layout] = {}

    # ------------------------------------------------------------------------- one step forward

    def begin(self, x: Tensor, states: States) -> StepParts:
        (v,) = states
        layout = self._layout(x, v)
        if layout is None:
            return self.plain.begin(x, states)
        return KernelParts(self, x, v, layout)

    def _layout(self, x: Tensor, v: Tensor) -> Layout | None:
        """The strides that torch would give the charged potential; None where no kernel can take
        the step."""
        if x.shape != v.shape or x.dim() == 0 or 0 in x.shape:
            return None
        strides = x.stride()
        same = strides == v.stride() and x.is_contiguous()
        if same and all(each.is_contiguous() for each in self.parameters):
            return strides
        key = x.shape, strides, v.stride(), x.dtype, v.dtype
        if key not in self._layouts:
            meta = self.plain.on_meta()
            x, v = (
                torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="meta")
                for each in (x, v)
            )
            with torch.no_grad():
                self._layouts[key] = meta.charge(x, v, meta.reset_signal_at(v)).stride()
        return self._layouts[key]

    # ------------------------------------------------------------------------ one step backward

    def vjp(
        self, view: StepView, grad_outputs: Tensor | None, grad_states: Gradients, needed: Needed
    ) -> Derivative:
        if _layout_of(view.packed) is None:
            return self.plain.vjp(view, grad_outputs, grad_states, needed)
        given = BackwardTensors(grad_spikes=grad_outputs, grad=grad_states[0])
        return self._through_charge("step", given, view, _wanted(needed))

    def vjp_of_charge(self, view: StepView, grad_charged: Gradients, needed: Needed) -> Derivative:
        if _layout_of(view.packed) is None:
            return self.plain.vjp_of_charge(view, grad_charged, needed)
        of_decay, of_threshold, _ = _wanted(needed)
        wanted = of_decay, of_threshold and self._reset == "subtract", False
        return self._through_charge("charge", BackwardTensors(grad=grad_charged[0]), view, wanted)

    def vjp_of_fire(
        self, view: StepView, grad_outputs: Tensor, needed: Needed
    ) -> tuple[Tensor, Gradients]:
        layout, (_, *wanted) = _layout_of(view.packed), _wanted(needed)
        if layout is None:
            return self.plain.vjp_of_fire(view, grad_outputs, needed)
        h = view.charged
        given = BackwardTensors(grad_spikes=grad_outputs, h=h, bits=view.packed.bits)
        given.grad_x = empty(h.shape, layout, h.dtype, h)
        grads = self._launch_backward("fire", layout, self._spec_like(h), given, (False, *wanted))
        return given.grad_x, grads

    def vjp_of_reset(
        self, view: StepView, grad_states: Gradients, needed: Needed
    ) -> tuple[Tensor, Tensor | None, Gradients]:
        layout, (_, *wanted) = _layout_of(view.packed), _wanted(needed)
        if layout is None:
            return self.plain.vjp_of_reset(view, grad_states, needed)
        h, (grad,) = view.charged, grad_states
        spec = self._spec_like(h)
        given = BackwardTensors(grad=grad, h=h, bits=view.packed.bits)
        self._add_signal(given, view, layout)
        given.grad_x = empty(h.shape, layout, grad.dtype, h)
        given.grad_before = empty(h.shape, layout, spec.spikes, h)
        wanted = False, wanted[0] and self._reset == "subtract", wanted[1]
        grads = self._launch_backward("reset", layout, spec, given, wanted)
        return given.grad_x, given.grad_before, grads

    def _through_charge(
        self, part: str, given: BackwardTensors, view: StepView, wanted: Wanted
    ) -> Derivative:
        """The derivative of a whole step or of its charge, which also reverses the step where the
        states before it follow from that."""
        layout, reverses, like = view.packed.layout, view.reverses, given.like
        if not reverses:
            view.hand_down()  # where a residue corrects what is reversed
        if part == "step" or reverses:
            self._add_charged(given, view)
        if part == "step" and (self._reset == "hard" or wanted[2]):
            given.bits = view.packed.bits
        self._add_signal(given, view, layout)
        if reverses or (self.reads_input and wanted[0]):
            given.x = view.current
        if wanted[0] and not reverses:
            (given.before,) = view.before
        charged = given.grad if part == "charge" else given.h
        spec = self._spec_like(charged, given.before)
        passes_on = part == "charge" and spec.charge == "leaky"  # the charge adds x as it is
        given.grad_before, given.grad_x, given.before_out = (
            empty(like.shape, layout, charged.dtype, like) if written else None
            for written in (True, not passes_on, reverses)
        )
        grads = self._launch_backward(part, layout, spec, given, wanted)
        if reverses:
            view.leave_before((given.before_out,))
        return given.grad if passes_on else given.grad_x, (given.grad_before,), grads

    def _add_charged(self, given: BackwardTensors, view: StepView) -> None:
        """The charged potential, or that after a soft reset, which the kernel inverts."""
        if view.has_charged or self._reset != "soft" or not view.invertible:
            given.h = view.charged
        else:
            (given.h,), given.bits, given.from_after = view.after, view.packed.bits, True

    def _add_signal(self, given: BackwardTensors, view: StepView, layout: Layout) -> None:
        if self.has_reset_signal:
            given.signal = _bits_in(view.packed_signal, layout)

    def _spec_like(self, h: Tensor, before: Tensor | None = None) -> KernelSpec:
        """What a kernel backward is compiled for, from the charged potential and the state before,
        if that is read."""
        return self.spec(h.dtype, h.dtype if before is None else before.dtype, h.is_cuda)

    def _launch_backward(
        self, part: str, layout: Layout, spec: KernelSpec, given: BackwardTensors, wanted: Wanted
    ) -> Gradients:
        """Launch the kernel for a step backward; the gradients at the parameters."""
        like = given.like
        totals = Totals(spec, wanted, like.shape, layout, like)
        launch(
            self.code.step_backward_kernel, like.numel(), *given.arguments(layout),
            *self.arguments(spec, like.shape, layout), *self._constants, *given.outputs,
            *totals.memory, like.numel(), like=like, spec=spec, per_thread=HALF, PART=part,
            FROM_AFTER=given.from_after,
        )  # fmt: skip
        return self.plain.gradients_from_kernel(totals.sums(self._numbers(spec)))

    # ------------------------------------------------------------------------------- sequences

    def scan(
        self, inputs: Tensor, states: States, keep_charged: bool = False, with_path: bool = False
    ) -> Scan:
        (v,) = states
        if not self._takes_scan(inputs.shape, inputs.dtype, v):
            return self.plain.scan(inputs, states, keep_charged, with_path)
        layout, spec = self._layout(inputs[0], v), self.spec(inputs.dtype, v.dtype, v.is_cuda)
        shape, flat, all_flat = v.shape, contiguous(v.shape), contiguous(inputs.shape)
        steps, count = len(inputs), v.numel()
        spikes, charged, path = (
            empty(inputs.shape, all_flat, dtype, v) if written else None
            for dtype, written in (
                (spec.spikes, True), (spec.charged, keep_charged), (spec.after, with_path)
            )
        )  # fmt: skip
        last = empty(shape, flat, spec.after, v)
        bits = empty((steps * -(-count // BITS),), (1,), torch.uint8, v)
        launch(
            self.code.forward_kernel, count, arranged(inputs, all_flat), arranged(v, flat),
            *self.arguments(spec, shape, flat), spikes, bits, charged, last, path, steps, count,
            like=v, spec=spec,
        )  # fmt: skip
        packed = self._packed_scan(bits, inputs.shape, self.surrogate.dtype_of_spikes(last))
        return Scan(packed, spikes, (arranged(last, layout),), charged, path)

    def _packed_scan(self, bits: Tensor, shape: torch.Size, dtype: torch.dtype) -> PackedSpikes:
        """The spikes of T steps from bits that start at a whole byte in each step."""
        steps, count = shape[0], shape[1:].numel()
        if steps == 1 or count % BITS == 0:
            return PackedSpikes.of_bits(bits, shape, contiguous(shape), dtype, self.graded_factor)
        fired = unpack(self.code, bits, bits.numel() * BITS, torch.bool)
        fired = fired.view(steps, -1)[:, :count].reshape(shape)
        return PackedSpikes(fired, dtype, self.graded_factor)

    def _takes_scan(self, shape: torch.Size, dtype: torch.dtype, v: Tensor) -> bool:
        """Whether a kernel can take T steps from inputs of this shape and dtype: the potential
        keeps its own."""
        if shape[1:] != v.shape or 0 in shape or v.dim() == 0:
            return False
        spec = self.spec(dtype, v.dtype, v.is_cuda)
        return spec.after == spec.charged == v.dtype

    def inputs_for_scan(
        self, inputs: Inputs | None, currents: Tensor, states: States
    ) -> Inputs | None:
        """A batch norm's input in the place of its output: the kernel normalises, and the output
        is not recomputed. The currents then differ in their last bits. That changes gradients by a
        rounding: spikes are kept as bits, an error in the potentials does not grow (no decay is
        above one), and the surrogate's derivative must be continuous."""
        (v,) = states
        if currents.dtype is not torch.float32 or self.surrogate.jumps:
            return inputs
        if not self._takes_scan(currents.shape, currents.dtype, v):
            return inputs
        by_input = normed(inputs, currents)
        return inputs if by_input is None or v.numel() % by_input.period else by_input

    def vjp_of_scan(
        self, kept: KeptSequence, gradients: SequenceGradients, needed: Needed
    ) -> Derivative:
        (start,), packed = kept.start, kept.packed
        if packed is None or not self._takes_scan(packed.shape, kept.dtype, start):
            return self.plain.vjp_of_scan(kept, gradients, needed)
        spec = self.spec(kept.dtype, start.dtype, start.is_cuda)
        shape, flat, all_flat = start.shape, contiguous(start.shape), contiguous(packed.shape)
        steps, count = packed.shape[0], start.numel()
        wanted = _wanted(needed)
        if gradients.outputs is None:  # nothing comes through the spikes: no gradient, not zero
            wanted = wanted[0], wanted[1] and self._reset == "subtract", False
        x, h, channels, owned = self._potentials(kept, all_flat)
        # What a gradient reads a second time must not be overwritten.
        overwrites = owned and not (wanted[0] and spec.charge == "decay_input")
        grad_x = x if overwrites else empty(packed.shape, all_flat, kept.dtype, start)
        grad_start, (grad_last,) = empty(shape, flat, spec.after, start), gradients.states
        stretch = steps if steps <= AT_ONCE else STRETCH
        between, states = (steps - 1) // stretch, None
        if between and x is not None:
            states = empty((between, count), (count, 1), spec.after, start)
        columns = HALF if stretch <= FEW_STEPS else QUARTER
        totals = Totals(spec, wanted, shape, flat, start, columns)
        launch(
            self.code.sequence_backward_kernel, count, x, *channels, _bits_in(packed, all_flat), h,
            states, arranged(start, flat), _arranged(gradients.outputs, all_flat),
            _arranged(grad_last, flat), _arranged(gradients.path, all_flat),
            *self.arguments(spec, shape, flat), *self._constants, grad_x, grad_start,
            *totals.memory, steps, count, count, like=start, spec=spec, per_thread=columns,
            STRETCH=stretch, SEVERAL=between > 0, OVERWRITES=overwrites, COLUMNS=columns,
            ROWWISE=channels[-2] % columns == 0, WHOLE=steps == 1 or count % BITS == 0,
        )  # fmt: skip
        grads = self.plain.gradients_from_kernel(totals.sums(self._numbers(spec)))
        return grad_x, (grad_start,), grads

    def _potentials(
        self, kept: KeptSequence, layout: Layout
    ) -> tuple[Tensor | None, Tensor | None, tuple, bool]:
        """The inputs, or None and the charged potentials, where these are kept; the mean, scale and
        bias of a batch norm that gives out the inputs, with their geometry; and whether the inputs
        may be overwritten with their gradient."""
        shape, no_norm = kept.packed.shape, (None, None, None, 1, 1)
        if kept.inputs is None:
            return None, arranged(kept.charged, layout), no_norm, False
        if isinstance(kept.inputs, Normed):
            channels = (each.contiguous() for each in kept.inputs.channels())
            channels = (*channels, *kept.inputs.geometry)
            given, owned = kept.inputs.input.value().reshape(shape), False
        else:
            channels, (given, owned) = no_norm, kept.inputs.consume()
        x = arranged(given, layout)
        owned = owned or x.data_ptr() != given.data_ptr()
        return x, None, channels, owned and x.dtype == kept.dtype

    # --------------------------------------------------------------------------------- details

    def arguments(self, spec: KernelSpec, shape: Sequence[int], layout: Layout) -> tuple:
        """Decay, threshold, factor, how they lie in memory, v_reset and rest."""
        key, numbers = (shape, layout, spec.divides), self._numbers(spec)
        known = self._parameters.get(key)
        if known is None:
            known = self._parameters[key] = parameters_in(numbers, shape, layout)
        return *known, numbers.v_reset, numbers.rest

    def _numbers(self, spec: KernelSpec) -> KernelNumbers:
        numbers = self._numbers_of.get(spec.divides)
        if numbers is None:
            numbers = self._numbers_of[spec.divides] = self.plain.kernel_numbers(spec)
        return numbers


def _wanted(needed: Needed) -> Wanted:
    """Which of the gradients by decay, threshold and factor are needed."""
    return (*needed, *(False,) * (3 - len(needed)))


def _layout_of(packed: PackedSpikes) -> Layout | None:
    """The layout in which a step's spikes were packed; None where no kernel can take the step."""
    return None if 0 in packed.shape or len(packed.shape) == 0 else packed.layout


def _bits_in(packed: PackedSpikes, layout: Layout) -> Tensor:
    """The bits of spikes in a layout."""
    if packed.layout == layout:
        return packed.bits
    return PackedSpikes(arranged(packed.fired(), layout)).bits


def _arranged(tensor: Tensor | None, layout: Layout) -> Tensor | None:
    return None if tensor is None else arranged(tensor, layout)

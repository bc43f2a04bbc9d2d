"""The coupled neuron in fused kernels, behind the interface of a plain neuron.

Tensors without elements, of several dtypes or that broadcast go to the plain code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..neurons.coupled import Coupled, CoupledParts
from ..neurons.transition import (
    Derivative,
    Gradients,
    KeptSequence,
    Needed,
    Scan,
    SequenceGradients,
    States,
    StepView,
)
from ..packed.spikes import PackedSpikes, contiguous
from .launch import BITS, MANY, Layout, arranged, empty, launch
from .triton_transition import TritonTransition


class Frames(NamedTuple):
    """How the time steps of a tensor lie in memory: one after the other, each densely."""

    layout: Layout  # of the whole tensor
    frame: Layout  # of one step
    steps: int
    count: int  # neurons
    half: int  # how many of the first half lie in a row, before as many of the second
    has_bits: bool  # whether these fill whole bytes of spikes


class TritonCoupled(TritonTransition):
    """The kernels for one coupled neuron."""

    module = "coupled"

    def __init__(self, plain: Coupled, interpreted: bool) -> None:
        super().__init__(plain, interpreted)
        self._numbers = plain.kernel_numbers(self.spec(torch.float32, torch.float32, False))

    # --------------------------------------------------------------------------------- single steps

    def begin(self, x: Tensor, states: States) -> CoupledParts:
        (v,) = states
        if not self._takes(x, v):
            return self.plain.begin(x, states)
        y, fired, after = self._forward(x, v, self._frames(x.shape, _dense(x), time=False))
        return CoupledParts((y, after, fired))

    def again(self, view: StepView, states: States) -> tuple[None, States]:
        (v,), y = states, view.outputs
        if not self._takes(y, v):
            return self.plain.again(view, states)
        frames = self._frames(y.shape, view.packed.layout, time=False)
        after = empty(y.shape, frames.layout, y.dtype, y)
        self._launch(
            self.code.forward_kernel, frames, y, arranged(y, frames.layout),
            arranged(v, frames.layout), *self._numbers, None, self._read(view.packed, frames),
            after, AGAIN=True,
        )  # fmt: skip
        return None, (after,)

    def vjp(
        self, view: StepView, grad_outputs: Tensor | None, grad_states: Gradients, needed: Needed
    ) -> Derivative:
        y, packed, (before,) = view.outputs, view.packed, view.before
        if not self._takes(y, before):
            return self.plain.vjp(view, grad_outputs, grad_states, needed)
        frames = self._frames(y.shape, packed.layout, time=False)
        kept = KeptSequence((before,), y.dtype, packed=packed, outputs=y)
        return self._backward(kept, frames, grad_outputs, grad_states[0])

    def inverse(self, y: Tensor, v_after: Tensor, fired: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`..neurons.coupled.Coupled.inverse`."""
        if not self._takes(y, v_after):
            return self.plain.inverse(y, v_after, fired)
        packed = PackedSpikes(fired)
        frames = self._frames(y.shape, packed.layout, time=False)
        v = empty(y.shape, frames.layout, y.dtype, y)
        return self._inverse(y, packed, frames, arranged(v_after, frames.layout), v), v

    # ------------------------------------------------------------------------------------ sequences

    def scan(
        self, inputs: Tensor, states: States, keep_charged: bool = False, with_path: bool = False
    ) -> Scan:
        (v,) = states
        if not self._takes(inputs, v):
            return self.plain.scan(inputs, states, keep_charged, with_path)
        strides = _dense(inputs)
        y, fired, last = self._forward(inputs, v, self._frames(inputs.shape, strides, time=True))
        on_meta = torch.empty_strided(v.shape, v.stride(), device="meta")
        halves = [each * 1 for each in self.plain.halves(on_meta)]
        last_strides = torch.cat(halves, self.plain.split_dim).stride()
        return Scan(fired, arranged(y, strides), (arranged(last, last_strides),))

    def vjp_of_scan(
        self, kept: KeptSequence, gradients: SequenceGradients, needed: Needed
    ) -> Derivative:
        if not self._takes(kept.outputs, kept.start[0]):
            return self.plain.vjp_of_scan(kept, gradients, needed)
        frames = self._frames(kept.outputs.shape, kept.packed.layout, time=True)
        return self._backward(kept, frames, gradients.outputs, gradients.states[0])

    def recover_inputs(self, packed: PackedSpikes, time: bool, outputs: Tensor) -> Tensor:
        if outputs.numel() == 0:
            return self.plain.recover_inputs(packed, time, outputs)
        frames = self._frames(outputs.shape, packed.layout, time)
        return self._inverse(outputs, packed, frames, None, None)

    # -------------------------------------------------------------------------------------- details

    def _takes(self, x: Tensor, v: Tensor) -> bool:
        """Whether a kernel can take a step with this input and potential, or steps with these
        inputs.

        Raises:
            ValueError: see :meth:`..neurons.coupled.Coupled.halves`.
        """
        self.plain.halves(v)
        return x.shape[x.dim() - v.dim() :] == v.shape and x.dtype == v.dtype and x.numel() > 0

    def _frames(self, shape: torch.Size, strides: Layout, time: bool) -> Frames:
        steps, frame_shape, frame = (
            (shape[0], shape[1:], strides[1:]) if time else (1, shape, strides)
        )
        count = frame_shape.numel()
        if steps > 1 and strides[0] != count:  # time is not the outermost dimension in memory
            frame = contiguous(frame_shape)
        half = frame[self.plain.split_dim] * (frame_shape[self.plain.split_dim] // 2)
        return Frames(
            (count, *frame) if time else frame, frame, steps, count, half, half % BITS == 0
        )

    def _forward(self, x: Tensor, v: Tensor, frames: Frames) -> tuple[Tensor, PackedSpikes, Tensor]:
        """Output, spikes and last potential."""
        y = empty(x.shape, frames.layout, x.dtype, x)
        after = empty(v.shape, frames.frame, v.dtype, v)
        if frames.has_bits:
            fired = empty((x.numel() // BITS,), (1,), torch.uint8, x)
        else:
            fired = empty(x.shape, frames.layout, torch.uint8, x)
        self._launch(
            self.code.forward_kernel, frames, x, arranged(x, frames.layout),
            arranged(v, frames.frame), *self._numbers, y, fired, after, AGAIN=False,
        )  # fmt: skip
        if frames.has_bits:
            return y, PackedSpikes.of_bits(fired, x.shape, frames.layout, x.dtype), after
        return y, PackedSpikes(fired.view(torch.bool), x.dtype), after

    def _backward(
        self, kept: KeptSequence, frames: Frames, grad_y: Tensor | None, grad_last: Tensor | None
    ) -> Derivative:
        y, (start,) = kept.outputs, kept.start
        grad_x = empty(y.shape, frames.layout, y.dtype, y)
        grad_start = empty(start.shape, frames.frame, y.dtype, y)
        self._launch(
            self.code.backward_kernel, frames, y, arranged(y, frames.layout),
            self._read(kept.packed, frames), arranged(start, frames.frame),
            grad_y if grad_y is None else arranged(grad_y, frames.layout),
            grad_last if grad_last is None else arranged(grad_last, frames.frame),
            *self._numbers, *self._constants, grad_x, grad_start,
        )  # fmt: skip
        return grad_x, (grad_start,), ()

    def _inverse(
        self, y: Tensor, fired: PackedSpikes, frames: Frames, after: Tensor | None, v: Tensor | None
    ) -> Tensor:
        x = empty(y.shape, frames.layout, y.dtype, y)
        self._launch(
            self.code.inverse_kernel, frames, y, arranged(y, frames.layout),
            self._read(fired, frames), after, *self._numbers, x, v,
        )  # fmt: skip
        return x

    def _read(self, fired: PackedSpikes, frames: Frames) -> Tensor:
        """Spikes as a kernel reads them."""
        if frames.layout != fired.layout:
            fired = PackedSpikes(arranged(fired.fired(), frames.layout), fired.dtype)
        return fired.bits if frames.has_bits else fired.binary(torch.uint8)

    def _launch(
        self, kernel: Any, frames: Frames, like: Tensor, *arguments: Any, **constants: Any
    ) -> None:
        spec = self.spec(like.dtype, like.dtype, like.is_cuda)
        launch(
            kernel, frames.count // 2, *arguments, frames.steps, frames.count, frames.half,
            like=like, spec=spec, BITS=frames.has_bits,
            WIDE=frames.count + 2 * BITS * MANY >= 2**31, **constants,
        )  # fmt: skip


def _dense(tensor: Tensor) -> Layout:
    """The strides of ``torch.empty_like``."""
    if tensor.is_contiguous():
        return contiguous(tensor.shape)
    return torch.empty_like(tensor, device="meta").stride()

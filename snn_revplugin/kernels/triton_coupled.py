"""The coupled neuron's time steps in fused kernels, behind the interface of
:mod:`snn_revplugin.coupled`.

:class:`FusedCoupled` stands where a :class:`~snn_revplugin.coupled.Coupled` stood, in
:mod:`snn_revplugin.coupled_step` and :mod:`snn_revplugin.coupled_sequence`. It hands potentials on
whole, not in halves. Tensors without elements go to the plain code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..neurons.coupled import Coupled
from ..packed.spikes import PackedSpikes, contiguous
from .kernel_spec import SURROGATES, KernelSpec, spec_of
from .launch import BITS, ROWS, Layout, arranged, empty, kernels, launch


class Frames(NamedTuple):
    """How the time steps of a tensor lie in memory: one after the other, each densely."""

    layout: Layout  # of the whole tensor
    frame: Layout  # of one step
    steps: int
    count: int  # neurons
    half: int  # how many of the first half lie in a row, before as many of the second
    has_bits: bool  # whether these fill whole bytes of spikes


class TritonCoupled:
    """The kernels for one neuron.

    Args:
        plain: its equations, of a kind that :func:`.form.why_none` has nothing against.
        interpreted: whether Triton's interpreter runs the kernels.
    """

    fused = True

    def __init__(self, plain: Coupled, interpreted: bool) -> None:
        self.plain, self.interpreted, self.code = (
            plain,
            interpreted,
            kernels(interpreted, "coupled"),
        )
        self._specs: dict[tuple, KernelSpec] = {}
        constants = SURROGATES[plain.surrogate.name](*plain.surrogate.parameters)
        self._constants = (*map(float, constants), *(0.0,) * (3 - len(constants)))
        weights = plain.leak, 1 / (plain.tau * plain.beta), 1 / plain.tau
        others = plain.alpha, plain.beta, plain.v_threshold, plain.v_reset or 0.0
        self._numbers = (*map(float, weights), *map(float, others))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    # --------------------------------------------------------------------------------- single steps

    def step(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | PackedSpikes]:
        """As :meth:`Coupled.step`, with the spikes packed already."""
        if not self.takes(x, v):
            return self.plain.step(x, v)
        frames = self._frames(x.shape, _dense(x), time=False)
        y, fired, after = self._forward(x, v, frames)
        return y, after, fired

    def opened(self, potential: Tensor) -> Tensor:
        """A potential as :meth:`taken_again` and :meth:`gradient_of_step` take it."""
        return potential

    def taken_again(self, y: Tensor, fired: PackedSpikes, v: Tensor) -> Tensor:
        """As :meth:`Coupled.taken_again`."""
        if not self.takes(y, v):
            return torch.cat(
                self.plain.taken_again(y, fired, self.plain.halves(v)), self.plain.split_dim
            )
        frames = self._frames(y.shape, fired.layout, time=False)
        after = empty(y.shape, frames.layout, y.dtype, y)
        self._launch(
            self.code.forward_kernel,
            frames,
            y,
            arranged(y, frames.layout),
            arranged(v, frames.layout),
            *self._numbers,
            None,
            self._read(fired, frames),
            after,
            AGAIN=True,
        )
        return after

    def gradient_of_step(
        self,
        y: Tensor,
        fired: PackedSpikes,
        before: Tensor,
        after: None,
        grad_y: Tensor | None,
        grad_v: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`Coupled.gradient_of_step`; the potential after the step is not asked for."""
        if not self.takes(y, before):
            before = self.plain.halves(before)
            after = self.plain.taken_again(y, fired, before)
            return self.plain.gradient_of_step(y, fired, before, after, grad_y, grad_v)
        return self._backward(
            y, fired, before, grad_y, grad_v, self._frames(y.shape, fired.layout, time=False)
        )

    def inverse(self, y: Tensor, v_after: Tensor, fired: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`Coupled.inverse`."""
        if not self.takes(y, v_after):
            return self.plain.inverse(y, v_after, fired)
        packed = PackedSpikes(fired)
        frames = self._frames(y.shape, packed.layout, time=False)
        v = empty(y.shape, frames.layout, y.dtype, y)
        return self._inverse(y, packed, frames, arranged(v_after, frames.layout), v), v

    # ------------------------------------------------------------------------------------ sequences

    def sequence(self, currents: Tensor, v: Tensor) -> tuple[Tensor, PackedSpikes, Tensor]:
        """T time steps in one launch: the outputs ``[T, ...]``, the spikes and the last potential;
        see :meth:`takes`."""
        strides = _dense(currents)
        y, fired, last = self._forward(
            currents, v, self._frames(currents.shape, strides, time=True)
        )
        on_meta = torch.empty_strided(v.shape, v.stride(), device="meta")
        last_strides = torch.cat(
            [each * 1 for each in self.plain.halves(on_meta)], self.plain.split_dim
        ).stride()
        return arranged(y, strides), fired, arranged(last, last_strides)

    def gradient_of_sequence(
        self,
        outputs: Tensor,
        fired: PackedSpikes,
        start: Tensor,
        grad_outputs: Tensor | None,
        grad_last: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The gradients at the inputs of T steps and at the first potential, in one launch; see
        :meth:`takes`."""
        frames = self._frames(outputs.shape, fired.layout, time=True)
        return self._backward(outputs, fired, start, grad_outputs, grad_last, frames)

    def inputs_from(self, fired: PackedSpikes, time: bool, y: Tensor) -> Tensor:
        """As :meth:`Coupled.inputs_from`."""
        if y.numel() == 0:
            return self.plain.inputs_from(fired, time, y)
        return self._inverse(y, fired, self._frames(y.shape, fired.layout, time), None, None)

    # -------------------------------------------------------------------------------------- details

    def takes(self, x: Tensor, v: Tensor) -> bool:
        """Whether a kernel can take a step with this input and potential, or steps with these
        inputs."""
        self.plain.halves(v)  # or it raises
        return x.shape[x.dim() - v.dim() :] == v.shape and x.dtype == v.dtype and x.numel() > 0

    def _frames(self, shape: torch.Size, strides: Layout, time: bool) -> Frames:
        steps, frame_shape, frame = (
            (shape[0], shape[1:], strides[1:]) if time else (1, shape, strides)
        )
        count = frame_shape.numel()
        if steps > 1 and strides[0] != count:  # time does not come first
            frame = contiguous(frame_shape)
        half = frame[self.plain.split_dim] * (frame_shape[self.plain.split_dim] // 2)
        return Frames(
            (count, *frame) if time else frame, frame, steps, count, half, half % BITS == 0
        )

    def _forward(self, x: Tensor, v: Tensor, frames: Frames) -> tuple[Tensor, PackedSpikes, Tensor]:
        """Output, spikes and last potential."""
        y, after = (
            empty(x.shape, frames.layout, x.dtype, x),
            empty(v.shape, frames.frame, v.dtype, v),
        )
        if frames.has_bits:
            fired = empty((x.numel() // BITS,), (1,), torch.uint8, x)
        else:
            fired = empty(x.shape, frames.layout, torch.uint8, x)
        self._launch(
            self.code.forward_kernel,
            frames,
            x,
            arranged(x, frames.layout),
            arranged(v, frames.frame),
            *self._numbers,
            y,
            fired,
            after,
            AGAIN=False,
        )
        if frames.has_bits:
            return y, PackedSpikes.of_bits(fired, x.shape, frames.layout, x.dtype), after
        return y, PackedSpikes(fired.view(torch.bool), x.dtype), after

    def _backward(
        self,
        y: Tensor,
        fired: PackedSpikes,
        start: Tensor,
        grad_y: Tensor | None,
        grad_last: Tensor | None,
        frames: Frames,
    ) -> tuple[Tensor, Tensor]:
        grad_x, grad_start = (
            empty(y.shape, frames.layout, y.dtype, y),
            empty(start.shape, frames.frame, y.dtype, y),
        )
        self._launch(
            self.code.backward_kernel,
            frames,
            y,
            arranged(y, frames.layout),
            self._read(fired, frames),
            arranged(start, frames.frame),
            grad_y if grad_y is None else arranged(grad_y, frames.layout),
            grad_last if grad_last is None else arranged(grad_last, frames.frame),
            *self._numbers,
            *self._constants,
            grad_x,
            grad_start,
        )
        return grad_x, grad_start

    def _inverse(
        self, y: Tensor, fired: PackedSpikes, frames: Frames, after: Tensor | None, v: Tensor | None
    ) -> Tensor:  # fmt: skip
        x = empty(y.shape, frames.layout, y.dtype, y)
        self._launch(
            self.code.inverse_kernel,
            frames,
            y,
            arranged(y, frames.layout),
            self._read(fired, frames),
            after,
            *self._numbers,
            x,
            v,
        )
        return x

    def _read(self, fired: PackedSpikes, frames: Frames) -> Tensor:
        """Spikes as a kernel reads them."""
        if frames.layout != fired.layout:
            fired = PackedSpikes(arranged(fired.fired(), frames.layout), fired.dtype)
        return fired.bits if frames.has_bits else fired.binary(torch.uint8)

    def _launch(
        self, kernel: Any, frames: Frames, like: Tensor, *arguments: Any, **constants: Any
    ) -> None:
        launch(
            kernel,
            frames.count // 2,
            *arguments,
            frames.steps,
            frames.count,
            frames.half,
            like=like,
            spec=self._spec(like),
            BITS=frames.has_bits,
            WIDE=frames.count + 2 * BITS * ROWS >= 2**31,
            **constants,
        )

    def _spec(self, like: Tensor) -> KernelSpec:
        key = like.dtype, like.is_cuda
        if key not in self._specs:
            self._specs[key] = spec_of(self.plain, like.dtype, *key)
        return self._specs[key]


def _dense(tensor: Tensor) -> Layout:
    """The strides of ``torch.empty_like``."""
    if tensor.is_contiguous():
        return contiguous(tensor.shape)
    return torch.empty_like(tensor, device="meta").stride()

"""A neuron's time steps in fused kernels, behind the interface of :mod:`snn_revplugin.dynamics`.

:class:`Fused` stands where a :class:`~snn_revplugin.dynamics.Dynamics` stood, in
:mod:`snn_revplugin.step` and :mod:`snn_revplugin.sequence`. What it does not compute in a kernel
(rebuilding a stretch of potentials, a call whose tensors no kernel can take) the dynamics compute
as ever, with the same bits.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..neurons.integrate_and_fire import LeakyIntegrateAndFire, ParametricLeakyIntegrateAndFire
from ..neurons.leaky import Leaky
from ..neurons.transition import Dynamics
from ..packed.spikes import PackedSpikes, contiguous
from ..replay import Normed, Recomputable, normed
from .kernel_spec import JUMPING, SURROGATES, KernelSpec, spec_of
from .launch import Layout, Parameters, Total, arranged, empty, kernels, launch, parameters_in

Gradients = tuple[Tensor | None, ...]


class TritonNeuron:
    """The kernels for one neuron.

    Args:
        plain: its dynamics, of a kind that :func:`.form.why_none` has nothing against.
        interpreted: whether Triton's interpreter runs the kernels.
    """

    fused = True

    def __init__(self, plain: Dynamics, interpreted: bool) -> None:
        self.plain, self.interpreted, self.code = plain, interpreted, kernels(interpreted)
        self._specs: dict[tuple, KernelSpec] = {}
        self._parameters: dict[tuple, Parameters] = {}
        self._layouts: dict[tuple, Layout] = {}
        constants = SURROGATES[plain.surrogate.name](*plain.surrogate.parameters)
        self._constants = (*map(float, constants), *(0.0,) * (3 - len(constants)))
        self._resting = (
            float(getattr(plain, "v_reset", None) or 0.0),
            float(getattr(plain, "rest", 0.0)),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    # -------------------------------------------------------------------------------------- forward

    def take(
        self, link: Any, x: Tensor, v: Tensor
    ) -> tuple[Tensor | PackedSpikes, Tensor, Tensor, Tensor]:
        return self.step(x, v, with_charged=link.current is None)

    def step(
        self, x: Tensor, v: Tensor, with_charged: bool = True
    ) -> tuple[Tensor | PackedSpikes, Tensor, Tensor, Tensor]:
        """As :meth:`Dynamics.step`, with the zeros and ones packed already.

        Without ``with_charged`` the charged potential is not written, and the one after the reset
        stands in its place.
        """
        layout = self._layout(x, v)
        if layout is None:
            return self.plain.step(x, v)
        spec, count = self._spec(x.dtype, v.dtype, x), x.numel()
        arguments = self._arguments(spec, x.shape, layout, x)

        def output(dtype: torch.dtype) -> Tensor:
            return empty(x.shape, layout, dtype, x)

        spikes, after = output(spec.spikes), output(spec.after)
        bits = empty((-(-count // 8),), (1,), torch.uint8, x)
        charged = output(spec.charged) if with_charged and not self.plain.charged_is_kept else None
        launch(
            self.code.forward_kernel, count, arranged(x, layout), arranged(v, layout), *arguments,
            spikes, bits, charged, after, None, 1, count, like=x, spec=spec,
        )  # fmt: skip
        charged = after if charged is None else charged
        fired = self.plain.surrogate.dtype_of_spikes(charged)
        return self._packed(bits, x.shape, layout, fired), spikes, charged, after

    def begin(self, link: Any, x: Tensor, v: Tensor) -> Tensor:
        """The charge of a step in parts: all is computed, and what the parts still to come give out
        waits in the state."""
        *link.ahead, charged, after = self.step(x, v)
        link.ahead.append(after)
        return charged

    def fire(self, link: Any) -> tuple[Tensor | PackedSpikes, Tensor]:
        """The zeros and ones and the spikes."""
        fired, spikes, link.ahead = link.ahead
        if not self.plain.reset_needs_signal:
            link.ahead = None
        return fired, spikes

    def finish(self, link: Any) -> Tensor:
        """The potential after the reset."""
        after, link.ahead = link.ahead, None
        return after

    def takes_sequence(self, v: Tensor, dtype: torch.dtype) -> bool:
        """Whether a kernel can take a sequence that starts from ``v``, with currents of that
        dtype."""
        spec = self._spec(
            dtype, v.dtype, v
        )  # one whose steps change the dtype of the potential cannot be looped over
        return v.numel() > 0 and v.dim() > 0 and spec.after == spec.charged == v.dtype

    def had_again(
        self, value: Recomputable | None, currents: Tensor, v: Tensor
    ) -> Recomputable | None:
        """The way in which a sequence's backward has its currents: by a batch norm's input, if they
        are what a norm gives out, and nothing depends on their last bit. Spikes are kept as bits,
        an error in the potentials does not grow (no decay is above one), and the surrogate's
        derivative is continuous; so the gradients are those of the currents, to rounding.

        Args:
            value: the currents ``[T, ...]``, as they can be had.
            v: the potential before the first step.
        """
        count = v.numel()
        if currents.dtype is not torch.float32 or self.plain.surrogate.name in JUMPING or count % 8:
            return value
        if not self.takes_sequence(v, currents.dtype):
            return value
        by_input = normed(value, currents)
        return value if by_input is None or count % by_input.period else by_input

    def takes_inexact(self, currents: Recomputable) -> bool:
        """Whether a kernel takes currents that come back up to rounding: those that it has by a
        norm's input."""
        return isinstance(currents, Normed)

    def sequence(
        self, currents: Tensor, v: Tensor, keeps_charged: bool, with_path: bool
    ) -> tuple[PackedSpikes, Tensor, Tensor, Tensor | None, Tensor | None]:
        """T time steps in one launch; see :meth:`takes_sequence`.

        Returns:
            The packed spikes, the spikes ``[T, ...]``, the last potential, and if they are wanted
            the charged potentials and those after every step.
        """
        layout, spec = self._layout(currents[0], v), self._spec(currents.dtype, v.dtype, v)
        shape, flat, all_flat = v.shape, contiguous(v.shape), contiguous(currents.shape)
        count = v.numel()

        def outputs(dtype: torch.dtype) -> Tensor:
            return empty(currents.shape, all_flat, dtype, v)

        spikes, last = outputs(spec.spikes), empty(shape, flat, spec.after, v)
        charged = outputs(spec.charged) if keeps_charged else None
        path = outputs(spec.after) if with_path else None
        whole = count % 8 == 0 or len(currents) == 1
        bits = empty((-(-currents.numel() // 8),), (1,), torch.uint8, v) if whole else None
        launch(
            self.code.forward_kernel, count, arranged(currents, all_flat), arranged(v, flat),
            *self._arguments(spec, shape, flat, v), spikes, bits, charged, last, path,
            len(currents), count, like=v, spec=spec,
        )  # fmt: skip
        if whole:
            packed = self._packed(
                bits, currents.shape, all_flat, self.plain.surrogate.dtype_of_spikes(last)
            )
        else:  # a step's last byte is the next one's first
            dtype = self.plain.surrogate.dtype_of_spikes(last)
            packed = PackedSpikes(spikes != 0, dtype, self.plain.graded_factor)
        return packed, spikes, arranged(last, layout), charged, path

    # ------------------------------------------------------------------------------------- backward

    def gradient(
        self,
        grad_spikes: Tensor | None,
        grad_v: Tensor | None,
        view: Any,
        learned: tuple[bool, ...],
    ) -> Any:
        """As :meth:`Dynamics.gradient`, of a neuron whose step is one node; and the potential
        before is handed down."""
        return self._through_charge("step", grad_spikes, grad_v, view, learned)

    def gradient_of_charge(self, grad_h: Tensor, view: Any, learned: tuple[bool, ...]) -> Any:
        """As :meth:`Dynamics.gradient_of_charge`; and the potential before is handed down."""
        return self._through_charge("charge", None, grad_h, view, learned)

    def gradient_of_fire(self, grad_spikes: Tensor, view: Any, learned: tuple[bool, ...]) -> Any:
        layout = _layout_of(view.link.fired)
        if layout is None:
            return self.plain.gradient_of_fire(grad_spikes, view, learned)
        h, bits = view.charged, view.link.fired.bits
        grad_h = empty(h.shape, layout, h.dtype, h)
        totals = self._launch_backward(
            "fire",
            layout,
            h,
            (False, learned[1], learned[2]),
            grad_spikes=grad_spikes,
            h=h,
            bits=bits,
            grad_x=grad_h,
        )
        return grad_h, totals

    def gradient_of_reset(self, grad_v: Tensor, view: Any, learned: tuple[bool, ...]) -> Any:
        layout = _layout_of(view.link.fired)
        if layout is None:
            return self.plain.gradient_of_reset(grad_v, view, learned)
        h, before, bits = view.charged, view.before, view.link.fired.bits
        spec = self._spec(h.dtype, before.dtype, h)
        grad_h, grad_spikes = (
            empty(h.shape, layout, grad_v.dtype, h),
            empty(h.shape, layout, spec.spikes, h),
        )
        wanted = False, learned[1] and spec.reset == "subtract", learned[2]
        totals = self._launch_backward(
            "reset", layout, h, wanted,
            grad=grad_v, h=h, before=before, bits=bits, grad_x=grad_h, grad_before=grad_spikes,
        )  # fmt: skip
        return grad_h, grad_spikes, totals

    def _through_charge(
        self,
        part: str,
        grad_spikes: Tensor | None,
        grad: Tensor | None,
        view: Any,
        learned: tuple[bool, ...],
    ) -> Any:
        plain, link, layout = self.plain, view.link, _layout_of(view.link.fired)
        below, leaky = link.before, isinstance(plain, Leaky)
        reverses = view.invertible and not view.anchored and "before" not in view.__dict__
        if reverses and (
            below.residue is not None or layout is None or not _lies_in(layout, below.fired)
        ):
            view.hand_down()
            reverses = False
        if layout is None:
            if part == "step":
                return plain.gradient(grad_spikes, grad, view, learned)
            return plain.gradient_of_charge(grad, view, learned)

        needs_resets = leaky and plain.has_reset_signal
        resets_from_bits = needs_resets and plain.delayed and _lies_in(layout, below.fired)
        given: dict[str, Tensor | None] = {"grad": grad, "grad_spikes": grad_spikes}
        if part == "step" or reverses:
            given["h"] = view.charged
        if part == "step" and plain.v_reset is not None:
            given["bits"] = link.fired.bits
        if resets_from_bits or (reverses and _lies_in(layout, below.fired)):
            given["bits_before"] = below.fired.bits
        reads_current = not leaky and any(learned) and plain.decay_input
        if reverses or reads_current:
            given["x"] = view.current
            if given["x"] is None:
                given["h"] = view.charged
        if not reverses and (any(learned) or (needs_resets and not resets_from_bits)):
            given["before"] = view.before

        like = grad_spikes if grad is None else grad
        h_dtype = grad.dtype if part == "charge" else view.charged.dtype
        outputs = {"grad_before": empty(like.shape, layout, h_dtype, like)}
        if not leaky:
            outputs["grad_x"] = empty(like.shape, layout, h_dtype, like)
        if reverses:
            outputs["charged_before"] = empty(like.shape, layout, h_dtype, like)
        wanted = learned if leaky else (*learned, *(False,) * (3 - len(learned)))
        if leaky:
            wanted = learned[0], learned[1] and plain.reset_kind == "subtract", False
        totals = self._launch_backward(
            part, layout, like, wanted, dtype=h_dtype, **given, **outputs
        )
        if reverses:
            below.charged = outputs["charged_before"]
        if not leaky:
            totals = self._of_rate(totals[0], given.get("x") is not None, learned)
        return outputs.get("grad_x", grad), outputs["grad_before"], totals

    def _launch_backward(
        self,
        part: str,
        layout: Layout,
        like: Tensor,
        wanted: tuple[bool, ...],
        dtype: torch.dtype | None = None,
        **tensors: Tensor | None,
    ) -> Gradients:
        """Launch a step backward over named tensors; the gradients of decay, threshold and factor
        come back."""
        before, bits = tensors.get("before"), ("bits", "bits_before")
        dtype = dtype or like.dtype
        spec = self._spec(dtype, dtype if before is None else before.dtype, like)
        totals = self._totals(spec, wanted, like.shape, layout, like)

        def flat(*names: str) -> list[Tensor | None]:
            found = ((name, tensors.get(name)) for name in names)
            return [
                each if each is None or name in bits else arranged(each, layout)
                for name, each in found
            ]

        launch(
            self.code.step_backward_kernel,
            like.numel(),
            *flat("grad_spikes", "grad", "h", "before", "x", "bits", "bits_before"),
            *self._arguments(spec, like.shape, layout, like),
            *self._constants,
            *(tensors.get(name) for name in ("grad_x", "grad_before", "charged_before")),
            *(each.room for each in totals),
            like.numel(),
            like=like,
            spec=spec,
            PART=part,
        )
        return self._summed(totals)

    def gradient_of_sequence(
        self,
        currents: Any,
        charged: Tensor | None,
        start: Tensor,
        dtype: torch.dtype,
        grad_spikes: Tensor | None,
        grad_last: Tensor | None,
        grad_path: Tensor | None,
        learned: tuple[bool, ...],
        fired: PackedSpikes,
    ) -> tuple[Tensor, Tensor, Gradients]:
        """T time steps backward in one launch; see :meth:`takes_sequence`.

        Args:
            currents: the :class:`~snn_revplugin.replay.Value` of the currents ``[T, ...]``, or None
                where ``charged`` is kept.
            start: the potential before the first step.
            dtype: of the currents and of the gradient at them.
            fired: the spikes.

        Returns:
            The gradients at the currents, at the potential before and at the parameters.
        """
        by_norm = isinstance(currents, Normed)
        if by_norm:
            given, owned = currents.input.value().reshape(currents.shape), False
        else:
            given, owned = (charged, False) if currents is None else currents.take()
        spec = self._spec(dtype, start.dtype, start)
        shape, flat, all_flat = start.shape, contiguous(start.shape), contiguous(given.shape)

        def flatly(tensor: Tensor | None, layout: Layout = all_flat) -> Tensor | None:
            return None if tensor is None else arranged(tensor, layout)

        x, h = (None, flatly(given)) if currents is None else (flatly(given), None)
        channels = (None, None, None, 1, 1, None)
        if by_norm:
            channels = (
                *(each.contiguous() for each in currents.channels()),
                *currents.geometry,
                fired.bits,
            )
        if h is None:
            writable = owned or x.data_ptr() != given.data_ptr()
            h = (
                x
                if writable and x.dtype == spec.charged
                else empty(given.shape, all_flat, spec.charged, start)
            )
        grad_currents = (
            h if x is not None and h.dtype == dtype else empty(given.shape, all_flat, dtype, start)
        )
        grad_start = empty(shape, flat, spec.after, start)
        wanted = (*learned, *(False,) * (3 - len(learned)))
        if grad_spikes is None and isinstance(self.plain, Leaky):  # no gradient, not one of zero
            wanted = learned[0], learned[1] and spec.reset == "subtract", False
        totals = self._totals(spec, wanted, shape, flat, start)
        launch(
            self.code.sequence_backward_kernel,
            start.numel(),
            x,
            *channels,
            h,
            flatly(start, flat),
            flatly(grad_spikes),
            flatly(grad_last, flat),
            flatly(grad_path),
            *self._arguments(spec, shape, flat, start),
            *self._constants,
            grad_currents,
            grad_start,
            *(each.room for each in totals),
            len(given),
            start.numel(),
            like=start,
            spec=spec,
        )
        sums = self._summed(totals)
        if not isinstance(self.plain, Leaky):
            sums = self._of_rate(sums[0], False, learned)
        return grad_currents, grad_start, sums

    # -------------------------------------------------------------------------------------- details

    def _spec(self, current: torch.dtype, potential: torch.dtype, like: Tensor) -> KernelSpec:
        key = current, potential, like.is_cuda
        spec = self._specs.get(key)
        if spec is None:
            spec = self._specs[key] = spec_of(self.plain, *key)
        return spec

    def _layout(self, x: Tensor, v: Tensor) -> Layout | None:
        """The strides that torch would give the charged potential; None where no kernel can take
        the step."""
        if x.shape != v.shape or x.dim() == 0 or 0 in x.shape:
            return None
        strides = x.stride()
        if (
            strides == v.stride()
            and x.is_contiguous()
            and all(each.is_contiguous() for each in self.plain.parameters)
        ):
            return strides
        key = x.shape, strides, v.stride(), x.dtype, v.dtype
        if key not in self._layouts:
            tensors = {each.name: getattr(self.plain, each.name) for each in fields(self.plain)}
            tensors = {
                name: each.detach().to("meta")
                for name, each in tensors.items()
                if isinstance(each, Tensor)
            }
            meta = replace(self.plain, **tensors)
            if isinstance(
                self.plain, Leaky
            ):  # beta or a copy of it, as its values have it, and those meta has not
                meta.__dict__["clamped_beta"] = self.plain.clamped_beta.to("meta")
            on_meta = [
                torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="meta")
                for each in (x, v)
            ]
            h = meta.charge(*on_meta, meta.reset_signal(on_meta[1]))
            self._layouts[key] = h.stride()
        return self._layouts[key]

    def _arguments(
        self, spec: KernelSpec, shape: torch.Size, layout: Layout, like: Tensor
    ) -> tuple:
        """Decay, threshold, factor, how they lie, v_reset and rest."""
        key = shape, layout, spec.divides
        known = self._parameters.get(key)
        if known is None:
            known = self._parameters[key] = parameters_in(self._given(spec), shape, layout)
        return (*known, *self._resting)

    def _given(self, spec: KernelSpec) -> tuple[Tensor | float, ...]:
        plain = self.plain
        if isinstance(plain, Leaky):
            return (
                plain.beta.detach(),
                plain.threshold.detach(),
                plain.factor.detach() if plain.graded else 1.0,
            )
        decay = 0.0
        if isinstance(plain, ParametricLeakyIntegrateAndFire):
            decay = plain.rate.detach()
        elif isinstance(plain, LeakyIntegrateAndFire):
            decay = (
                float(plain.tau) if spec.divides else float(np.float32(1) / np.float32(plain.tau))
            )
        return decay, float(plain.threshold), 1.0

    def _packed(
        self, bits: Tensor, shape: torch.Size, layout: Layout, dtype: torch.dtype
    ) -> PackedSpikes:
        return PackedSpikes.of_bits(bits, shape, layout, dtype, self.plain.graded_factor)

    def _totals(
        self,
        spec: KernelSpec,
        wanted: tuple[bool, ...],
        shape: torch.Size,
        layout: Layout,
        like: Tensor,
    ) -> tuple[Total, Total, Total]:
        held = spec.decay_held, spec.threshold_held, spec.factor_held
        return tuple(
            Total(needed, how, shape, layout, like)
            for needed, how in zip(wanted, held, strict=True)
        )

    def _summed(self, totals: tuple[Total, ...]) -> Gradients:
        """snnTorch's parameters' gradients, or in the first place the sum that the gradient of a
        learned rate is made of."""
        if not isinstance(self.plain, Leaky):
            return None if totals[0].room is None else totals[0].room.sum(), None, None
        parameters = self.plain.parameters
        sums = [total.sum(parameter) for total, parameter in zip(totals, parameters, strict=True)]
        if sums[0] is not None:
            sums[0] = sums[0] * self.plain.slope_of_clamp
        return tuple(
            each if each is None else each.to(parameter.dtype)
            for each, parameter in zip(sums, parameters, strict=True)
        )

    def _of_rate(
        self, total: Tensor | None, from_current: bool, learned: tuple[bool, ...]
    ) -> Gradients:
        """The gradient at ``w``, whose sigmoid is the rate of decay, from the sum that the kernel
        made."""
        if total is None:
            return (None,) * len(learned)
        rate = self.plain.rate.detach()
        if self.plain.decay_input and not from_current:
            total = total / rate
        return ((total * rate * (1 - rate)).to(self.plain.w.dtype),)


def _layout_of(fired: PackedSpikes) -> Layout | None:
    """The layout in which a step's spikes were packed; None where no kernel can take the step."""
    return None if 0 in fired.shape or len(fired.shape) == 0 else fired.layout


def _lies_in(layout: Layout, fired: PackedSpikes | None) -> bool:
    return fired is not None and fired.layout == layout

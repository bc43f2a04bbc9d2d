"""Normalisations. What they compute from the batch (mean, deviation) is small and stays saved;
their input is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...torch_internals import capture
from ...torch_internals.graph import (
    Node,
    attribute_of,
    is_leaf_edge,
    name_of,
    shape_of_output,
    type_of_output,
)
from ...torch_internals.saved_tensors import saved_by
from ...torch_internals.versioned import Versioned
from ..recipe import Recipe, Recomputable
from .operation import Operation, Replay, register

if TYPE_CHECKING:
    from ..cache import RecipeCache


def _batch_norm(node: Node) -> Replay:
    training, eps = attribute_of(node, "training"), attribute_of(node, "eps")
    if not training:
        return partial(
            _normalise_batch, torch.native_batch_norm, *_running_statistics(node), training, eps
        )
    return _from_batch_statistics(node, torch.native_batch_norm, eps)


def _from_batch_statistics(node: Node, function: Callable[..., tuple], eps: float) -> Replay:
    mean, deviation = (saved_by(node, name) for name in ("result1", "result2"))
    if mean is None or deviation is None:
        return partial(_normalise_batch, function, None, None, True, eps)
    return _FromBatchStatistics(mean.detach(), deviation.detach(), eps, function)


def _without_bias(replay: Callable[[Node], Replay]) -> Callable[[Node, Tensor], Replay | None]:
    """A batch norm whose bias has no gradient: there is none, as in batch norm through time (BNTT),
    or it is frozen.

    The node does not tell which; its input and its output do.
    """

    def without(node: Node, output: Tensor) -> Replay | None:
        x, weight, function = saved_by(node, "input"), saved_by(node, "weight"), replay(node)
        if x is None:
            return None
        with torch.no_grad():
            return function if torch.equal(function(x, weight, None), output) else None

    return without


class _FromBatchStatistics:
    """Batch norm in training. On a CPU from the statistics that its node keeps: one pass over the
    input instead of three.

    The kernel there multiplies with ``weight / deviation`` and adds ``bias - mean weight /
    deviation``, in training as in evaluation; so evaluation with that product for a weight, at a
    deviation of one, rounds alike. (Half precision does not: there the product is rounded; nor does
    a view with gaps in memory, for which there is another kernel.)
    """

    __slots__ = ("deviation", "eps", "function", "mean")

    def __init__(
        self, mean: Tensor, deviation: Tensor, eps: float, function: Callable[..., tuple]
    ) -> None:
        self.mean, self.deviation, self.eps, self.function = (
            mean,
            deviation,
            eps,
            function,
        )  # the deviation's reciprocal

    @property
    def identity(self) -> tuple:
        return type(self), self.function, self.eps  # the same input has the same statistics

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if (
            self.mean.device.type != "cpu"
            or self.mean.dtype not in (torch.float32, torch.float64)
            or not _is_packed(x)
        ):
            return self.function(x, weight, bias, None, None, True, 0.0, self.eps)[0]
        scale = self.deviation if weight is None else weight * self.deviation
        return torch.native_batch_norm(
            x, scale, bias, self.mean, torch.ones_like(self.mean), False, 0.0, 0.0
        )[0]


def _is_packed(x: Tensor) -> bool:
    """Whether the kernel for a tensor without gaps takes it: contiguous in one of the formats that
    it knows."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.is_contiguous() or (
        x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])
    )


class Normed(Recomputable):
    """What a batch norm made of its input, for a reader that takes the input itself and the map of
    each channel, ``(input - mean) scale + bias``, so that the norm's output is not computed again.

    It gives the output back to rounding only: the order of torch's operations differs between
    devices and its kernels.

    Attributes:
        input: the norm's input, its channels in dimension 1.
        shape: of the output as the reader has it; the elements in their order.
        geometry: how many elements of a channel lie in a row of a contiguous input, and how many
            channels there are.
    """

    __slots__ = ("_bias", "_norm", "_weight", "geometry", "input", "shape")
    derived = True
    exact = False

    def __init__(self, norm: Recipe, shape: torch.Size, shape_of_norm: Sequence[int]) -> None:
        self.input, self._weight, self._bias = norm.inputs
        self._norm, self.shape, self.geometry = (
            norm.function,
            shape,
            (math.prod(shape_of_norm[2:]), shape_of_norm[1]),
        )

    @property
    def period(self) -> int:
        """The elements after which the channels begin again."""
        return self.geometry[0] * self.geometry[1]

    @property
    def depth(self) -> int:
        return self.input.depth + 1

    def add_reader(self) -> None:
        self.input.add_reader()

    def drop_reader(self) -> None:
        self.input.drop_reader()

    def channels(self) -> tuple[Tensor, Tensor, Tensor]:
        """``mean``, ``scale`` and ``bias`` of each channel."""
        mean, scale = _mean_and_scale(self._norm)
        if self._weight is not None:
            scale = scale * self._weight.value()
        return mean, scale, torch.zeros_like(mean) if self._bias is None else self._bias.value()

    def value(self) -> Tensor:
        given = self.input.value()
        mean, scale, bias = (each.view(-1, *(1,) * (given.dim() - 2)) for each in self.channels())
        return torch.addcmul(bias, given - mean, scale).reshape(self.shape)


def _mean_and_scale(norm: Replay) -> tuple[Tensor, Tensor]:
    """Of each channel, by the batch or by what has been learned of all batches: the mean and the
    deviation's reciprocal."""
    if isinstance(norm, _FromBatchStatistics):
        return norm.mean, norm.deviation
    mean, var = (each.get("a batch norm") for each in norm.args[1:3])
    return mean, (var + norm.args[-1]).rsqrt()


def normed(value: Recomputable | None, current: Tensor) -> Normed | None:
    """The output of a batch norm, seen as another shape perhaps, by way of the norm's input; None
    for any other value, and where statistics are not float32.

    Args:
        value: the current, as it can be had.
    """
    node = current.grad_fn
    while isinstance(value, Recipe) and getattr(value.function, "func", None) is Tensor.reshape:
        value, node = value.inputs[0], node.next_functions[0][0]
    norm = getattr(value, "function", None)
    of_batch = isinstance(norm, _FromBatchStatistics)
    learned = getattr(norm, "func", None) is _normalise_batch and norm.args[1] is not None
    if not (of_batch or learned) or _mean_and_scale(norm)[0].dtype is not torch.float32:
        return None
    return Normed(value, current.shape, shape_of_output(node))


LARGEST_SHIFT = (
    4.0  # |bias / weight| up to which a batch norm is inverted: rounding grows by so much
)


def inverse_batch_norm(node: Node, known: RecipeCache, output: Recomputable) -> Recipe | None:
    """The input of a batch norm from its output, ``(y - bias) / weight * deviation + mean``: for a
    neuron that gives its own input back, so that no weight layer is computed again for the norm's
    sake.

    Args:
        output: the norm's output, of any shape that has its elements in order.

    Returns:
        None for any other node, and where rounding would grow: in half precision, or where a weight
        is small next to its bias.
    """
    if name_of(node) != "NativeBatchNormBackward0" or not attribute_of(node, "training"):
        return None
    mean, deviation, weight = (saved_by(node, name) for name in ("result1", "result2", "weight"))
    bias_node = node.next_functions[2][0] if len(node.next_functions) > 2 else None
    if mean is None or deviation is None or mean.device.type != "cpu":
        return None
    if (
        type_of_output(node)[0] not in (torch.float32, torch.float64)
        or mean.dtype != type_of_output(node)[0]
    ):
        return None
    affine: tuple[Recomputable | None, Recomputable | None] = (None, None)
    if weight is not None:
        if bias_node is None or not is_leaf_edge(bias_node):
            return None
        bias = bias_node.variable
        if (
            not (bias.detach().abs() <= LARGEST_SHIFT * weight.detach().abs()).all()
            or not weight.all()
        ):
            return None
        affine = known.kept(weight), known.kept(bias)
    shape = tuple(shape_of_output(node))
    return Recipe(
        partial(_unnormalise, mean.detach(), deviation.detach(), shape), (output, *affine)
    )


def _unnormalise(
    mean: Tensor,
    deviation: Tensor,
    shape: tuple[int, ...],
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    scale = (
        deviation if weight is None else weight * deviation
    )  # deviation is the reciprocal of what it is called
    channels = (-1, *(1,) * (len(shape) - 2))
    shift = mean if bias is None else mean - bias / scale
    return torch.addcmul(shift.view(channels), y.reshape(shape), (1 / scale).view(channels))


def _cudnn_batch_norm(node: Node) -> Replay:
    """In training, from the batch again: the statistics come out the same, and no running one is
    touched."""
    training, eps = attribute_of(node, "training"), attribute_of(node, "epsilon")
    if training:
        return _from_batch_statistics(node, torch.cudnn_batch_norm, eps)
    return partial(
        _normalise_batch, torch.cudnn_batch_norm, *_running_statistics(node), training, eps
    )


def _running_statistics(node: Node) -> tuple[Versioned, Versioned]:
    mean, var = (Versioned(saved_by(node, "running_" + name)) for name in ("mean", "var"))
    return mean, var


def _normalise_batch(
    function,
    mean: Versioned | None,
    var: Versioned | None,
    training: bool,
    eps: float,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    statistics = (each and each.get("a batch norm") for each in (mean, var))
    return function(x, weight, bias, *statistics, training, 0.0, eps)[0]


def _layer_norm(node: Node) -> Replay | None:
    shape = attribute_of(node, "normalized_shape")
    x, deviation = saved_by(node, "input"), saved_by(node, "result2")
    if x is None or deviation is None:
        return None
    rows, deviations = x.reshape(-1, *shape), deviation.reshape(-1)
    sample = deviations.argmax() if deviations.numel() else None
    eps = _eps_of(
        sample,
        deviations,
        lambda i, eps: torch.native_layer_norm(rows[i : i + 1], shape, None, None, eps)[2],
    )
    return eps and partial(_normalise_layer, shape, eps)


def _normalise_layer(
    shape: tuple[int, ...], eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    return torch.native_layer_norm(x, shape, weight, bias, eps)[0]


def _group_norm(node: Node) -> Replay | None:
    n, c, hxw, groups = (attribute_of(node, name) for name in ("N", "C", "HxW", "group"))
    x, deviation = saved_by(node, "input"), saved_by(node, "result2")
    if x is None or deviation is None:
        return None
    rows, deviations = x.reshape(n * groups, 1, -1), deviation.reshape(-1)
    sample = deviations.argmax() if deviations.numel() else None
    size = rows.shape[-1]
    eps = _eps_of(
        sample,
        deviations,
        lambda i, eps: torch.native_group_norm(rows[i : i + 1], None, None, 1, 1, size, 1, eps)[2],
    )
    return eps and partial(_normalise_groups, (n, c, hxw, groups, eps))


def _normalise_groups(
    arguments: tuple, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    return torch.native_group_norm(x, weight, bias, *arguments)[0]


USUAL_EPS = (1e-5, 1e-6, 1e-3, 1e-4, 1e-8, 1e-12, 1e-2, 1e-7)


def _eps_of(sample: Tensor | None, deviations: Tensor, deviation_of) -> float | None:
    """The eps that the norm was called with, which its node does not save.

    It is the one that gives the saved deviation again, bit for bit, in the row where eps weighs
    most. None, and so a boundary, if none of the usual ones does.
    """
    if sample is None:
        return USUAL_EPS[0]
    if not capture.may_synchronise(sample):
        return None
    row = int(sample)
    with torch.no_grad():
        for eps in USUAL_EPS:
            if torch.equal(deviation_of(row, eps).reshape(-1), deviations[row : row + 1]):
                return eps
    return None


def _without_affine(node: Node) -> tuple[int, ...]:
    return (1, 2) if attribute_of(node, "weight") is None else ()


def _layer_norm_absent(node: Node) -> tuple[int, ...]:
    return tuple(i for i, name in ((1, "weight"), (2, "bias")) if attribute_of(node, name) is None)


register(
    *(
        Operation(
            node,
            ("input", "weight", None),
            replay,
            absent=_without_affine,
            recompute_on_data=True,
            of_output=_without_bias(replay),
        )
        for node, replay in (
            ("NativeBatchNormBackward0", _batch_norm),
            ("CudnnBatchNormBackward0", _cudnn_batch_norm),
        )
    ),
    Operation(
        "NativeLayerNormBackward0",
        ("input", "weight", "bias"),
        _layer_norm,
        absent=_layer_norm_absent,
        recompute_on_data=True,
    ),
    Operation(
        "NativeGroupNormBackward0",
        ("input", "weight", None),
        _group_norm,
        absent=_without_affine,
        recompute_on_data=True,
    ),
)

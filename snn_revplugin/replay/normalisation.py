"""Normalisations. What they compute from the batch (mean, deviation) is small and stays saved; their input is not."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import capture
from ..autograd_internals import Node, attribute_of, is_leaf_edge, name_of, saved_by, shape_of_output, type_of_output
from ..versioned import Versioned
from .operation import Operation, Replay, register
from .recipe import Recipe, Value

if TYPE_CHECKING:
    from .known import Known


def _batch_norm(node: Node) -> Replay:
    training, eps = attribute_of(node, "training"), attribute_of(node, "eps")
    if not training:
        return partial(_normalise_batch, torch.native_batch_norm, *_running_statistics(node), training, eps)
    mean, deviation = (saved_by(node, name) for name in ("result1", "result2"))
    if mean is None or deviation is None or mean.device.type != "cpu":
        return partial(_normalise_batch, torch.native_batch_norm, None, None, training, eps)
    return _FromBatchStatistics(mean.detach(), deviation.detach(), eps)


class _FromBatchStatistics:
    """Batch norm in training from the statistics that its node keeps: one pass over the input instead of three.

    The kernel multiplies with ``weight / deviation`` and adds ``bias - mean weight / deviation``, in training as in
    evaluation; so evaluation with that product for a weight, at a deviation of one, rounds alike. (Half precision does not:
    there the product is rounded.)
    """

    __slots__ = ("deviation", "eps", "mean")

    def __init__(self, mean: Tensor, deviation: Tensor, eps: float) -> None:
        self.mean, self.deviation, self.eps = mean, deviation, eps  # the reciprocal of the deviation

    @property
    def identity(self) -> tuple:
        return type(self), self.eps  # the same input has the same statistics

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.mean.dtype not in (torch.float32, torch.float64):
            return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, self.eps)[0]
        scale = self.deviation if weight is None else weight * self.deviation
        return torch.native_batch_norm(x, scale, bias, self.mean, torch.ones_like(self.mean), False, 0.0, 0.0)[0]


LARGEST_SHIFT = 4.0  # |bias / weight| up to which a batch norm is inverted: rounding grows by so much


def inverse_batch_norm(node: Node, known: Known, output: Value) -> Recipe | None:
    """The input of a batch norm from its output, ``(y - bias) / weight * deviation + mean``: for a neuron that gives its own
    input back, so that no weight layer is computed again for the norm's sake.

    Args:
        output: the norm's output, of any shape that has its elements in order.

    Returns:
        None for any other node, and where rounding would grow: in half precision, or where a weight is small next to its bias.
    """
    if name_of(node) != "NativeBatchNormBackward0" or not attribute_of(node, "training"):
        return None
    mean, deviation, weight = (saved_by(node, name) for name in ("result1", "result2", "weight"))
    bias_node = node.next_functions[2][0] if len(node.next_functions) > 2 else None
    if mean is None or deviation is None or mean.device.type != "cpu":
        return None
    if type_of_output(node)[0] not in (torch.float32, torch.float64) or mean.dtype != type_of_output(node)[0]:
        return None
    affine: tuple[Value | None, Value | None] = (None, None)
    if weight is not None:
        if bias_node is None or not is_leaf_edge(bias_node):
            return None
        bias = bias_node.variable
        if not (bias.detach().abs() <= LARGEST_SHIFT * weight.detach().abs()).all() or not weight.all():
            return None
        affine = known.kept(weight), known.kept(bias)
    shape = tuple(shape_of_output(node))
    return Recipe(partial(_unnormalise, mean.detach(), deviation.detach(), shape), (output, *affine))


def _unnormalise(
    mean: Tensor, deviation: Tensor, shape: tuple[int, ...], y: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    scale = deviation if weight is None else weight * deviation  # deviation is the reciprocal of what it is called
    channels = (-1, *(1,) * (len(shape) - 2))
    shift = mean if bias is None else mean - bias / scale
    return torch.addcmul(shift.view(channels), y.reshape(shape), (1 / scale).view(channels))


def _cudnn_batch_norm(node: Node) -> Replay:
    """In training, from the batch again: the statistics come out the same, and no running one is touched."""
    training, eps = attribute_of(node, "training"), attribute_of(node, "epsilon")
    mean, var = (None, None) if training else _running_statistics(node)
    return partial(_normalise_batch, torch.cudnn_batch_norm, mean, var, training, eps)


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
    eps = _eps_of(sample, deviations, lambda i, eps: torch.native_layer_norm(rows[i : i + 1], shape, None, None, eps)[2])
    return eps and partial(_normalise_layer, shape, eps)


def _normalise_layer(shape: tuple[int, ...], eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
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


def _normalise_groups(arguments: tuple, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return torch.native_group_norm(x, weight, bias, *arguments)[0]


USUAL_EPS = (1e-5, 1e-6, 1e-3, 1e-4, 1e-8, 1e-12, 1e-2, 1e-7)


def _eps_of(sample: Tensor | None, deviations: Tensor, deviation_of) -> float | None:
    """The eps that the norm was called with, which its node does not save.

    It is the one that gives the saved deviation again, bit for bit, in the row where eps weighs most. None, and so a boundary,
    if none of the usual ones does.
    """
    if sample is None:
        return USUAL_EPS[0]
    if not capture.may_ask(sample):
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
    Operation("NativeBatchNormBackward0", ("input", "weight", None), _batch_norm, absent=_without_affine, weighs=True),
    Operation("CudnnBatchNormBackward0", ("input", "weight", None), _cudnn_batch_norm, absent=_without_affine, weighs=True),
    Operation("NativeLayerNormBackward0", ("input", "weight", "bias"), _layer_norm, absent=_layer_norm_absent, weighs=True),
    Operation("NativeGroupNormBackward0", ("input", "weight", None), _group_norm, absent=_without_affine, weighs=True),
)

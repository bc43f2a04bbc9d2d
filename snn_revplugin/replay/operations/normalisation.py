"""Normalisations. Their nodes keep the batch's statistics (mean, deviation), which are small; the
input is recomputed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...torch_internals import capture
from ...torch_internals.graph import Node, attribute_of, name_of
from ...torch_internals.saved_tensors import saved_by
from ...torch_internals.tensors import storage_of
from ...torch_internals.versioned import Versioned
from ..kind import LAYER
from ..recipe import Replay, identity_of
from .operation import Operation, register

BATCH_NORMS = {
    # node: the function and the attribute that holds eps
    "NativeBatchNormBackward0": (torch.native_batch_norm, "eps"),
    "CudnnBatchNormBackward0": (torch.cudnn_batch_norm, "epsilon"),
}


def _batch_norm(function: Callable[..., tuple], name_of_eps: str) -> Callable[[Node], Replay]:
    def replay(node: Node) -> Replay:
        eps = attribute_of(node, name_of_eps)
        if not attribute_of(node, "training"):
            statistics = (saved_by(node, "running_" + name) for name in ("mean", "var"))
            return FromRunningStatistics(*statistics, eps, function)
        mean, deviation = (saved_by(node, name) for name in ("result1", "result2"))
        if mean is None or deviation is None:
            return partial(_normalise_batch, function, eps)
        return FromBatchStatistics(mean.detach(), deviation.detach(), eps, function)

    return replay


def _normalise_batch(
    function: Callable[..., tuple],
    eps: float,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """A batch norm in training, without running statistics."""
    return function(x, weight, bias, None, None, True, 0.0, eps)[0]


def _without_bias(replay: Callable[[Node], Replay]) -> Callable[[Node, Tensor], Replay | None]:
    """A batch norm without a bias, as in batch norm through time (BNTT). The node does not tell it
    from one whose bias has no gradient; input and output do."""

    def without(node: Node, output: Tensor) -> Replay | None:
        x, weight, function = saved_by(node, "input"), saved_by(node, "weight"), replay(node)
        if x is None or not capture.may_synchronise(output):
            return None
        with torch.no_grad():
            return function if torch.equal(function(x, weight, None), output) else None

    return without


class FromBatchStatistics:
    """Batch norm in training. On a CPU it reads the statistics that its node keeps: one pass over
    the input instead of three.

    The kernel there multiplies with ``weight / deviation`` and adds ``bias - mean weight /
    deviation``, in training as in evaluation. So evaluation with that product for a weight, at a
    deviation of one, rounds alike. Half precision does not: there the product is rounded. A view
    with gaps in memory does not either: another kernel computes it.

    Args:
        mean: of each channel.
        deviation: of each channel, its reciprocal.
        eps: of the norm.
        function: the batch norm of a device.
    """

    __slots__ = ("deviation", "eps", "function", "mean")

    def __init__(
        self, mean: Tensor, deviation: Tensor, eps: float, function: Callable[..., tuple]
    ) -> None:
        self.mean, self.deviation, self.eps, self.function = mean, deviation, eps, function

    @property
    def identity(self) -> tuple:
        return type(self), self.function, self.eps  # the same input has the same statistics

    def mean_and_scale(self) -> tuple[Tensor, Tensor]:
        """The mean and the reciprocal of the deviation of each channel."""
        return self.mean, self.deviation

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if (
            self.mean.device.type != "cpu"
            or self.mean.dtype not in (torch.float32, torch.float64)
            or not _is_packed(x)
        ):
            return _normalise_batch(self.function, self.eps, x, weight, bias)
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


class FromRunningStatistics:
    """Batch norm in evaluation.

    Args:
        mean: the running mean of each channel.
        var: the running variance of each channel.
        eps: of the norm.
        function: the batch norm of a device.
    """

    __slots__ = ("eps", "function", "mean", "var")

    def __init__(
        self, mean: Tensor, var: Tensor, eps: float, function: Callable[..., tuple]
    ) -> None:
        self.mean, self.var, self.eps, self.function = (
            Versioned(mean),
            Versioned(var),
            eps,
            function,
        )

    @property
    def identity(self) -> tuple:
        statistics = (identity_of(each) for each in (self.mean, self.var))
        return type(self), self.function, self.eps, *statistics

    def mean_and_scale(self) -> tuple[Tensor, Tensor]:
        """The mean and the reciprocal of the deviation of each channel."""
        mean, var = self._statistics()
        return mean, (var + self.eps).rsqrt()

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return self.function(x, weight, bias, *self._statistics(), False, 0.0, self.eps)[0]

    def _statistics(self) -> tuple[Tensor, Tensor]:
        return self.mean.get("a batch norm"), self.var.get("a batch norm")


def _layer_norm(node: Node) -> Replay | None:
    shape = attribute_of(node, "normalized_shape")
    x, deviation = saved_by(node, "input"), saved_by(node, "result2")
    if x is None or deviation is None:
        return None
    rows, deviations = x.reshape(-1, *shape), deviation.reshape(-1)
    eps = _eps_of(
        node,
        deviations,
        lambda i, eps: torch.native_layer_norm(rows[i : i + 1], shape, None, None, eps)[2],
    )
    return eps and partial(_normalise_layer, shape, eps)


def _normalise_layer(
    shape: tuple[int, ...], eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    return torch.native_layer_norm(x, shape, weight, bias, eps)[0]


def _rms_norm(node: Node) -> Replay | None:
    """The fused norm of a GPU; on a CPU it is composed of operations."""
    shape = attribute_of(node, "normalized_shape")
    x, scale = saved_by(node, "input"), saved_by(node, "result1")
    if x is None or scale is None:
        return None
    rows, scales = x.reshape(-1, *shape), scale.reshape(-1)
    sample = scales.argmax() if scales.numel() else None
    fused = torch.ops.aten._fused_rms_norm
    eps = _eps_of(sample, scales, lambda i, eps: fused(rows[i : i + 1], shape, None, eps)[1])
    return eps and partial(_normalise_rms, shape, eps)


def _normalise_rms(shape: tuple[int, ...], eps: float, x: Tensor, weight: Tensor | None) -> Tensor:
    return torch.ops.aten._fused_rms_norm(x, shape, weight, eps)[0]


def _group_norm(node: Node) -> Replay | None:
    n, c, hxw, groups = (attribute_of(node, name) for name in ("N", "C", "HxW", "group"))
    x, deviation = saved_by(node, "input"), saved_by(node, "result2")
    if x is None or deviation is None:
        return None
    rows, deviations = x.reshape(n * groups, 1, -1), deviation.reshape(-1)
    size = rows.shape[-1]
    eps = _eps_of(
        node,
        deviations,
        lambda i, eps: torch.native_group_norm(rows[i : i + 1], None, None, 1, 1, size, 1, eps)[2],
    )
    return eps and partial(_normalise_groups, (n, c, hxw, groups, eps))


def _normalise_groups(
    arguments: tuple, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    return torch.native_group_norm(x, weight, bias, *arguments)[0]


USUAL_EPS = (1e-5, 1e-6, 1e-3, 1e-4, 1e-8, 1e-12, 1e-2, 1e-7, 2.0**-23, 2.0**-52)


# The eps of a norm that has a weight, by the weight's memory, on a device that is not to be asked
# again.
_known_eps: WeakKeyDictionary[torch.UntypedStorage, dict[str, float]] = WeakKeyDictionary()


def _eps_of(
    node: Node, deviations: Tensor, deviation_of: Callable[[int, float], Tensor]
) -> float | None:
    """The eps that the norm was called with, which its node does not save.

    It is the one that gives the saved deviation bit for bit, in the row where eps weighs most. On
    another device than a CPU that is asked for once for each norm with a weight of its own.

    Returns:
        None, and so a boundary, if none of the usual ones does.
    """
    if deviations.numel() == 0:
        return USUAL_EPS[0]
    if capture.may_compare(deviations):
        return _solved_eps(deviations, deviation_of)
    weight = saved_by(node, "weight")
    is_own = weight is not None and weight.is_leaf and weight.requires_grad
    storage = storage_of(weight) if is_own else None
    known = {} if storage is None else _known_eps.setdefault(storage, {})
    place = f"{name_of(node)} at {0 if weight is None else weight.storage_offset()}"
    if place not in known and capture.may_synchronise(deviations):
        eps = _solved_eps(deviations, deviation_of)
        if eps is not None:
            known[place] = eps
    return known.get(place)


def _solved_eps(deviations: Tensor, deviation_of: Callable[[int, float], Tensor]) -> float | None:
    row = int(deviations.argmax())
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
            LAYER,
            ("input", "weight", None),
            _batch_norm(*by),
            absent=_without_affine,
            of_output=_without_bias(_batch_norm(*by)),
            weight_and_bias=(1, 2),
        )
        for node, by in BATCH_NORMS.items()
    ),
    Operation(
        "NativeLayerNormBackward0",
        LAYER,
        ("input", "weight", "bias"),
        _layer_norm,
        absent=_layer_norm_absent,
    ),
    Operation(
        "FusedRmsNormBackward0",
        LAYER,
        ("input", "weight"),
        _rms_norm,
        absent=lambda node: () if attribute_of(node, "weight") is not None else (1,),
    ),
    Operation(
        "NativeGroupNormBackward0",
        LAYER,
        ("input", "weight", None),
        _group_norm,
        absent=_without_affine,
        weight_and_bias=(1, 2),
    ),
)

"""Reading through a batch norm: its inverse, and a neuron that applies it itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..torch_internals.graph import (
    Node,
    attribute_of,
    is_leaf_edge,
    name_of,
    shape_of_output,
    type_of_output,
)
from ..torch_internals.saved_tensors import saved_by
from .operations.normalisation import FromBatchStatistics, FromRunningStatistics
from .recipe import HeldTensor, Recipe, Recomputable

# |bias / weight| up to which a batch norm is inverted: rounding errors grow by that factor
MAX_SHIFT = 4.0


class Normed(Recomputable):
    """The output of a batch norm, for a reader that takes the input itself and the map of each
    channel, ``(input - mean) scale + bias``, so that the norm's output is not recomputed.

    Its value equals the output up to rounding: the order of torch's operations differs between
    devices and its kernels.

    Attributes:
        input: the norm's input, its channels in dimension 1.
        shape: of the output as the reader has it, with the elements in their order.
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
        """The elements after which the channels repeat."""
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
        mean, scale = self._norm.mean_and_scale()
        if self._weight is not None:
            scale = scale * self._weight.value()
        return mean, scale, torch.zeros_like(mean) if self._bias is None else self._bias.value()

    def value(self) -> Tensor:
        given = self.input.value()
        mean, scale, bias = (each.view(-1, *(1,) * (given.dim() - 2)) for each in self.channels())
        return torch.addcmul(bias, given - mean, scale).reshape(self.shape)


def normed(value: Recomputable | None, current: Tensor) -> Normed | None:
    """The output of a batch norm, perhaps in another shape, by way of the norm's input.

    Args:
        value: the recomputable current.
        current: itself.

    Returns:
        None for any other value, and where statistics are not float32.
    """
    node = current.grad_fn
    while isinstance(value, Recipe) and getattr(value.function, "func", None) is Tensor.reshape:
        value, node = value.inputs[0], node.next_functions[0][0]
    norm = getattr(value, "function", None)
    if not isinstance(norm, FromBatchStatistics | FromRunningStatistics):
        return None
    if norm.mean_and_scale()[0].dtype is not torch.float32:
        return None
    return Normed(value, current.shape, shape_of_output(node))


def inverse_batch_norm(
    node: Node, output: Recomputable, held: Callable[[Tensor], HeldTensor]
) -> Recipe | None:
    """The input of a batch norm from its output, ``(y - bias) / weight * deviation + mean``: for a
    neuron that reconstructs its own input, so that the norm needs no weight layer recomputed.

    Args:
        node: of the norm.
        output: the norm's output, of any shape that has its elements in order.
        held: takes a parameter to a value that holds it.

    Returns:
        None for any other node, and where rounding errors would grow: in half precision, or where
        a weight is small next to its bias.
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
        if not (bias.detach().abs() <= MAX_SHIFT * weight.detach().abs()).all() or not weight.all():
            return None
        affine = held(weight), held(bias)
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
    # torch calls it the deviation; it is the reciprocal
    scale = deviation if weight is None else weight * deviation
    channels = (-1, *(1,) * (len(shape) - 2))
    shift = mean if bias is None else mean - bias / scale
    return torch.addcmul(shift.view(channels), y.reshape(shape), (1 / scale).view(channels))

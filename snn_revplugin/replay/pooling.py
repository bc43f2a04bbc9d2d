"""Pooling. Max pooling's indices, 8 bytes each, are found again together with its output."""

from __future__ import annotations

import torch

from ..autograd_internals import Node, attribute_of, shape_of_output
from .operation import Operation, Replay, register

INDICES = {"result1": 1}


def _max_pool(function):
    def replay(node: Node) -> Replay:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        arguments = [attribute_of(node, name) for name in names]
        return lambda x: function(x, *arguments)

    return replay


def _average_pool(function):
    def replay(node: Node) -> Replay:
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        arguments = [attribute_of(node, name) for name in names]
        return lambda x: function(x, *arguments)

    return replay


def _adaptive(function, dimensions: int):
    def replay(node: Node) -> Replay:
        size = tuple(shape_of_output(node)[-dimensions:])
        return lambda x: function(x, size)

    return replay


aten = torch.ops.aten
register(
    Operation(
        "MaxPool2DWithIndicesBackward0", ("self",), _max_pool(aten.max_pool2d_with_indices), INDICES, weighs=True, several=True
    ),
    Operation(
        "MaxPool3DWithIndicesBackward0", ("self",), _max_pool(aten.max_pool3d_with_indices), INDICES, weighs=True, several=True
    ),
    Operation("AvgPool2DBackward0", ("self",), _average_pool(aten.avg_pool2d), weighs=True),
    Operation("AvgPool3DBackward0", ("self",), _average_pool(aten.avg_pool3d), weighs=True),
    Operation("AdaptiveAvgPool2DBackward0", ("self",), _adaptive(aten._adaptive_avg_pool2d, 2), weighs=True),
    Operation("AdaptiveAvgPool3DBackward0", ("self",), _adaptive(aten._adaptive_avg_pool3d, 3), weighs=True),
    Operation(
        "AdaptiveMaxPool2DBackward0", ("self",), _adaptive(aten.adaptive_max_pool2d, 2), INDICES, weighs=True, several=True
    ),
    Operation(
        "AdaptiveMaxPool3DBackward0", ("self",), _adaptive(aten.adaptive_max_pool3d, 3), INDICES, weighs=True, several=True
    ),
)

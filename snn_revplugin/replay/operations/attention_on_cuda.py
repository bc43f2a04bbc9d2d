"""The fused attention functions that torch chooses among on CUDA.

With dropout they draw random numbers from the device's generator, and are boundaries. What they
give out beside the output and the logarithms of the rows' sums is small, and stays as it is saved.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...torch_internals.graph import Node, attribute_of
from ..kind import PLAIN
from ..recipe import Replay
from .operation import Operation, register

aten = torch.ops.aten
OPERANDS = ("query", "key", "value")


def _flash(node: Node) -> Replay | None:
    if attribute_of(node, "dropout_p"):
        return None
    return partial(_attend_flash, attribute_of(node, "is_causal"), attribute_of(node, "scale"))


def _attend_flash(
    causal: bool, scale: float | None, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, ...]:
    function = aten._scaled_dot_product_flash_attention
    return function(query, key, value, 0.0, causal, scale=scale)


def _with_bias(function: Replay, node: Node) -> Replay | None:
    if attribute_of(node, "dropout_p"):
        return None
    causal, scale = attribute_of(node, "is_causal"), attribute_of(node, "scale")
    return partial(_attend_with_bias, function, causal, scale)


def _attend_with_bias(
    function: Replay,
    causal: bool,
    scale: float | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, ...]:
    # True: with the logarithms of the rows' sums
    return function(query, key, value, bias, True, 0.0, causal, scale=scale)


def _without_bias(node: Node) -> tuple[int, ...]:
    return (3,) if attribute_of(node, "attn_bias") is None else ()


def _biased(name: str, function: Replay, sums: str) -> Operation:
    return Operation(
        f"ScaledDotProduct{name}AttentionBackward0",
        PLAIN,
        (*OPERANDS, "attn_bias"),
        partial(_with_bias, function),
        {"output": 0, sums: 1},
        absent=_without_bias,
    )


register(
    Operation(
        "ScaledDotProductFlashAttentionBackward0",
        PLAIN,
        OPERANDS,
        _flash,
        {"output": 0, "logsumexp": 1},
    ),
    _biased("Efficient", aten._scaled_dot_product_efficient_attention, "log_sumexp"),
    _biased("Cudnn", aten._scaled_dot_product_cudnn_attention, "logsumexp"),
)

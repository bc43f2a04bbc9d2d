"""Attention: the softmax of the scores, and torch's own fused function as a CPU has it. Those that
CUDA has are in :mod:`.attention_on_cuda`, the matrix products in :mod:`.linear`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...torch_internals.graph import Node, attribute_of, type_of_output
from ...torch_internals.saved_tensors import saved_by
from ...torch_internals.versioned import Versioned
from ..kind import PLAIN
from ..recipe import Replay
from .operation import ONE, Operation, register


def _softmax(function: Replay) -> Callable[[Node], Replay]:
    def replay(node: Node) -> Replay:
        return partial(function, dim=attribute_of(node, "dim"), dtype=type_of_output(node)[0])

    return replay


def _scaled_dot_product(node: Node) -> Replay:
    """``torch.nn.functional.scaled_dot_product_attention`` as a CPU computes it, with the logarithm
    of each row's sum."""
    p, causal, scale = (attribute_of(node, name) for name in ("dropout_p", "is_causal", "scale"))
    mask = saved_by(node, "attn_mask")
    return partial(_attend, p, causal, scale, mask if mask is None else Versioned(mask))


def _attend(
    p: float,
    causal: bool,
    scale: float | None,
    mask: Versioned | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> tuple[Tensor, Tensor]:
    mask = mask and mask.get("an attention")
    function = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return function(query, key, value, p, causal, attn_mask=mask, scale=scale)


register(
    Operation("SoftmaxBackward0", PLAIN, ONE, _softmax(torch.softmax), {"result": 0}),
    Operation("LogSoftmaxBackward0", PLAIN, ONE, _softmax(torch.log_softmax), {"result": 0}),
    Operation(
        "SafeSoftmaxBackward0", PLAIN, ONE, _softmax(torch.ops.aten._safe_softmax), {"result": 0}
    ),
    Operation(
        "ScaledDotProductFlashAttentionForCpuBackward0",
        PLAIN,
        ("query", "key", "value"),
        _scaled_dot_product,
        {"output": 0, "logsumexp": 1},
    ),
)

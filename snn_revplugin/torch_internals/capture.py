"""What a CUDA graph forbids: while one is captured, no value may be read from the
device.

A training step whose kernels are captured (``torch.cuda.graph``) replays them without any Python.
What the library decides by looking at values is decided without them then, the larger way:
potentials are kept at anchors and rebuilt forward, not reversed, and an operation that is
recognised by its values is a boundary. The setting ``capturable`` takes the same decisions without
a capture: in the warm-up, so that the capture needs no kernel that was not loaded before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..settings import get_settings


def may_compare(tensor: Tensor) -> bool:
    """Whether the values of a tensor may be read at every time step: on a CPU, where that waits for
    nothing."""
    return tensor.is_cpu and may_synchronise(tensor)


def numbers(tensor: Tensor) -> list[float]:
    """The values of a tensor of one dimension. Waits for the device.

    Raises:
        RuntimeError: the tensor is on the meta device, which has no values.
    """
    return [tensor[0].item()] if tensor.is_meta else tensor.tolist()


def may_synchronise(tensor: Tensor) -> bool:
    """Whether the values of a tensor may be looked at here."""
    if get_settings().capturable:
        return False
    return not tensor.is_cuda or not torch.cuda.is_current_stream_capturing()

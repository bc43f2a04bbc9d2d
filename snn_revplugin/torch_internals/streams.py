"""The stream on which a CUDA device runs what this thread gives it.

Autograd runs a graph node on the stream of its forward, and waits for another stream only where a
gradient comes from there. Memory that a stream has freed, that stream may use again at once. So
what backward computes on a stream stays there: nothing of ours that one stream made is read on
another, but for the bits and anchors of forward, for which the gradients' way is a wait.
"""

from __future__ import annotations

import torch

NO_STREAM = 0


def stream_of(device: torch.device) -> int:
    """What tells the current stream of a device from its others; ``NO_STREAM`` where it has none.

    Args:
        device: any.
    """
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return NO_STREAM
    return torch._C._cuda_getCurrentRawStream(device.index)


def current_stream() -> int:
    """The same of this thread's current device."""
    if not torch.cuda.is_initialized():
        return NO_STREAM
    return torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())

"""What the process holds, next to what its tensors hold.

In a time loop on a CPU large tensors come and go, and small objects that stay, graph nodes and
bits, settle in the gaps. The allocator cannot give such a gap to the next tensor of the same size,
so the process grows by memory that nothing uses: in the convolutional net of snnTorch's tutorials
(batch 32, T=400) by several times what is kept. glibc's ``malloc_trim`` returns the free pages
between them to the system. It costs milliseconds, and memory that is used again has to be requested
again; so it runs in long chains of time steps only.
"""

from __future__ import annotations

import ctypes

from torch import Tensor

# Bytes of membrane potentials that a chain of time steps passes, up or down, between two trims.
BYTES_BETWEEN = 24 << 20


def _find_trim() -> ctypes._CFuncPtr | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another allocator, or another system
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim


_trim = _find_trim()


def chain_has_come_to(step: int, potential: Tensor) -> None:
    """A chain of time steps has come to this one, upwards in forward or downwards in backward.

    Args:
        potential: a membrane potential of the chain, or another tensor of its size.
    """
    if not potential.is_cpu or _trim is None:
        return
    nbytes = potential.nbytes
    if step * nbytes // BYTES_BETWEEN != (step - 1) * nbytes // BYTES_BETWEEN:
        _trim(0)

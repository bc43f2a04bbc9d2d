"""What the process holds, next to what its tensors hold.

In a time loop on a CPU large tensors come and go, and small objects that stay, graph nodes and bits, settle in the gaps. The
allocator cannot give such a gap to the next tensor of the same size, so the process grows by what nobody uses: in the
convolutional net of snnTorch's tutorials (batch 32, T=400) by three times what is kept. glibc's ``malloc_trim`` hands the
free pages between back to the system. It costs a few milliseconds, so it is called seldom.
"""

from __future__ import annotations

import ctypes
import threading

BYTES_BETWEEN = 64 << 20  # of membrane potentials that pass through before the heap is trimmed once

_since = threading.local()


def _find_trim() -> ctypes._CFuncPtr | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another allocator, or another system
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim


_trim = _find_trim()


def passed_through(nbytes: int) -> None:
    """A time step of so many bytes of membrane potential has been taken, and its large tensors are gone or about to go."""
    total = getattr(_since, "bytes", 0) + nbytes
    if total >= BYTES_BETWEEN:
        total = 0
        if _trim is not None:
            _trim(0)
    _since.bytes = total

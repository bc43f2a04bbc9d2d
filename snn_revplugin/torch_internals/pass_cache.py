"""Values that one backward pass computes and shares: they are released with the pass, however it
ends.

Several readers of one value share it here. Most entries are taken out by their last reader; where a
pass walks part of a graph only, or an exception ends it, the rest goes when autograd drops the
pass.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from . import backward_pass, streams


class PassCache(dict[Any, Any]):
    """The values of one backward pass, by the object that they belong to."""

    __slots__ = ("__weakref__",)


# By pass, thread and stream: the nodes of one pass run in a thread for each device, all at the same
# time, and those of one device on the streams of their forward.
_passes: WeakValueDictionary[tuple[int, int, int], PassCache] = WeakValueDictionary()


class _Latest(threading.local):
    """The pass that this thread asked for last: nearly always the one that it asks for next."""

    pass_id, stream = backward_pass.NO_PASS, streams.NO_STREAM
    values: Callable[[], PassCache | None]


_latest = _Latest()


def pass_cache() -> PassCache:
    """The cache of the backward pass that runs in this thread, of what the current stream computes;
    outside of any, an empty one that nothing keeps."""
    pass_id = backward_pass.current_pass()
    if pass_id == backward_pass.NO_PASS:
        return PassCache()
    stream = streams.current_stream()
    is_latest = pass_id == _latest.pass_id and stream == _latest.stream
    if is_latest and (values := _latest.values()) is not None:
        return values
    key = pass_id, threading.get_ident(), stream
    values = _passes.get(key)
    if values is None:
        values = _passes[key] = PassCache()
        backward_pass.at_end_of_pass(values.clear)  # and so it is the pass that keeps it
    _latest.pass_id, _latest.stream, _latest.values = pass_id, stream, weakref.ref(values)
    return values

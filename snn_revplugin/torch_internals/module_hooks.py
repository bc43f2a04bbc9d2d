"""Forward hooks on a module, under names.

``register_forward_hook`` numbers hooks in the order in which a process sets them. Hooks that come
with a copied or unpickled module keep their numbers, and the next hook of the new process may get
the number of one of them and take its place. A name avoids that, and finds the hook again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn as nn

BeforeForward = Callable[[nn.Module, tuple], None]
AfterForward = Callable[[nn.Module, tuple, Any], None]


def set_hooks(
    module: nn.Module, name: str, after: AfterForward, before: BeforeForward | None = None
) -> None:
    """Call ``after`` after each forward of a module, and ``before`` before it. With a ``before``,
    ``after`` is called after a forward that raised, too, with None in the place of the outputs."""
    module._forward_hooks[name] = after
    if before is not None:
        module._forward_pre_hooks[name] = before
        module._forward_hooks_always_called[name] = True


def hook_of(module: nn.Module, name: str) -> AfterForward | None:
    """What :func:`set_hooks` lets a module call after its forward; None where it did not."""
    return module._forward_hooks.get(name)


def remove_hooks(module: nn.Module, name: str) -> None:
    """Undo :func:`set_hooks`."""
    for hooks in (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._forward_hooks_always_called,
    ):
        hooks.pop(name, None)

"""Which releases of the hosts these tests run against, and marks for what only some of them
have."""

from __future__ import annotations

import pytest
import torch
from spikingjelly.activation_based import neuron

PURE = hasattr(
    neuron.BaseNode, "single_step_functional_forward"
)  # SpikingJelly 2; 0.0.0.0.14's neurons write their state
OLDER_TORCH = (
    torch.__version__ < "2.15"
)  # tells less of some graph nodes than the one that this was written with

only_pure = pytest.mark.skipif(
    not PURE, reason="SpikingJelly 0.0.0.0.14 does not have what this test uses"
)

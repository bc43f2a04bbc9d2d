"""What every test needs: the hosts' global registers are left as they were found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _forget_snntorch_neurons() -> Iterator[None]:
    """snnTorch remembers every neuron for ever and resets all of them at once: a test must not meet those of another."""
    try:
        from snntorch import SpikingNeuron
    except ImportError:
        yield
        return
    known = list(SpikingNeuron.instances)
    yield
    SpikingNeuron.instances[:] = known

"""What every test needs: one thread, and the hosts' global registers left as they were found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

# The tensors of these tests are tiny: several threads would spend their time waiting for each other, and a test run beside
# another one many times its own.
torch.set_num_threads(1)


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

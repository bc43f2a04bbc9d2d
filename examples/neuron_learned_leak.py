"""A neuron of one's own on SpikingJelly's ``SimpleBaseNode``: each channel learns its leak.

python examples/neuron_learned_leak.py
"""

import both
import digits
import torch
import torch.nn as nn
from spikingjelly.activation_based import functional, neuron, surrogate

options = digits.options(__doc__.partition("\n")[0], iterations=30, time_steps=16)
torch.manual_seed(0)


class LearnedLeak(neuron.SimpleBaseNode):
    """Only the charge is new; firing and reset are the host's."""

    def __init__(self, channels):
        super().__init__(v_threshold=0.5, surrogate_function=surrogate.ATan(), detach_reset=True)
        self.leak = nn.Parameter(torch.zeros(channels, 1, 1))

    def neuronal_charge(self, x):
        self.v = self.leak.sigmoid() * self.v + x


net = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), LearnedLeak(16),
    nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(32), LearnedLeak(32),
    nn.Conv2d(32, 10, 4), LearnedLeak(10), nn.Flatten(),
)  # fmt: skip


def rates(net, images):
    functional.reset_net(net)
    return sum(net(images) for _ in range(options.time_steps)) / options.time_steps


both.train(net, rates, options)

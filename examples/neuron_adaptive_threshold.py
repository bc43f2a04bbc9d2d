"""A neuron of one's own on SpikingJelly: leaky, with a threshold that rises with each spike.

python examples/neuron_adaptive_threshold.py
"""

import both
import digits
import torch
import torch.nn as nn
from spikingjelly.activation_based import base, functional, layer, surrogate

options = digits.options(__doc__.partition("\n")[0], iterations=30, time_steps=16)
torch.manual_seed(0)


class AdaptiveLIF(base.MemoryModule):
    """A leaky neuron with two states: its potential v, and a, by which its threshold is raised."""

    def __init__(self, step_mode="m"):
        super().__init__()
        self.register_memory("v", 0.0)
        self.register_memory("a", 0.0)
        self.rise = nn.Parameter(torch.tensor(0.2))
        self.surrogate, self.step_mode = surrogate.ATan(), step_mode

    def single_step_forward(self, x):
        v = self.v + (x - self.v) / 2
        spikes = self.surrogate(v - 0.5 - self.a)
        self.v, self.a = v * (1 - spikes.detach()), 0.9 * self.a + self.rise * spikes
        return spikes

    def multi_step_forward(self, x_seq):
        return torch.stack([self.single_step_forward(x) for x in x_seq])


net = nn.Sequential(
    layer.Conv2d(1, 16, 3, padding=1, bias=False), layer.BatchNorm2d(16), AdaptiveLIF(),
    layer.MaxPool2d(2),
    layer.Conv2d(16, 32, 3, padding=1, bias=False), layer.BatchNorm2d(32), AdaptiveLIF(),
    layer.AdaptiveAvgPool2d(2), layer.Flatten(), layer.Linear(128, 10),
)  # fmt: skip
functional.set_step_mode(net, "m")


def rates(net, images):
    functional.reset_net(net)
    return net(images.unsqueeze(0).repeat(options.time_steps, 1, 1, 1, 1)).mean(0)


both.train(net, rates, options)

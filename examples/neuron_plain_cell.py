"""A neuron of no host: a plain module that takes and returns its states, in a time loop.

python examples/neuron_plain_cell.py
"""

import both
import digits
import torch
import torch.nn as nn

import snn_revplugin

options = digits.options(__doc__.partition("\n")[0], iterations=30, time_steps=16)
torch.manual_seed(0)


class Spike(torch.autograd.Function):
    """A step forward, the derivative of a fast sigmoid backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient / (1 + 5 * x.abs()) ** 2


class Cell(nn.Module):
    """A synapse i and a membrane v, both with learned decays."""

    def __init__(self):
        super().__init__()
        self.decays = nn.Parameter(torch.tensor([0.6, 0.8]))

    def forward(self, x, i, v):
        i = self.decays[0] * i + x
        v = self.decays[1] * v + i
        spikes = Spike.apply(v - 1)
        return spikes, i, v - spikes.detach()


snn_revplugin.register_neuron(Cell, states=("i", "v"))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.cell1 = nn.Conv2d(1, 16, 3, padding=1), Cell()
        self.conv2, self.cell2 = nn.Conv2d(16, 16, 3, stride=2), Cell()
        self.fc, self.cell3 = nn.Linear(16 * 9, 10), Cell()

    def forward(self, images):
        zero, total = images.new_zeros(()), 0.0
        a, b, c = [(zero.expand(len(images), *s),) * 2 for s in ((16, 8, 8), (16, 3, 3), (10,))]
        for _ in range(options.time_steps):
            x, *a = self.cell1(self.conv1(images), *a)
            x, *b = self.cell2(self.conv2(x), *b)
            x, *c = self.cell3(self.fc(x.flatten(1)), *c)
            total = total + x
        return total / options.time_steps


both.train(Net(), lambda net, images: net(images), options)

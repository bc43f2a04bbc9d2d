"""Forward-forward learning: each layer learns by itself, without a gradient from the next layer.

A layer learns high firing rates for an image with its right label, and low ones for a wrong label.
The label stands in front of the image. A layer's goodness is the mean square of its neurons' firing
rates.

python examples/snntorch_forward_forward.py             # the host's neurons
snn-revplugin run examples/snntorch_forward_forward.py  # the same file with the neurons swapped
"""

import digits
import snntorch as snn
import torch
import torch.nn as nn
import torch.nn.functional as F
from snntorch import surrogate

options = digits.options(__doc__.partition("\n")[0], iterations=150, time_steps=10)
torch.manual_seed(0)


class Layer(nn.Module):
    def __init__(self, features, neurons):
        super().__init__()
        self.fc = nn.Linear(features, neurons)
        self.lif = snn.Leaky(beta=0.9, spike_grad=surrogate.fast_sigmoid(slope=10))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=5e-3)

    def forward(self, x):
        """Return the neurons' firing rates. The input is scaled to a fixed length, so that no layer
        reads the goodness of the one below."""
        x = F.normalize(x, dim=1) * x.shape[1] ** 0.5
        mem, rate = self.lif.reset_mem(), 0
        for _ in range(options.time_steps):
            spk, mem = self.lif(self.fc(x), mem)
            rate = rate + spk / options.time_steps
        return rate

    def learn(self, right, wrong):
        """Take one training step on both kinds of input. Return the loss, and the layer's new
        outputs for the next layer."""
        good, bad = (self(x).square().mean(1) for x in (right, wrong))
        loss = F.softplus(torch.cat([0.2 - good, bad - 0.2]) * 10).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            return loss.item(), self(right), self(wrong)


def labelled(images, classes):
    return torch.cat([F.one_hot(classes, 10).float(), images.flatten(1)], 1)


layers = nn.ModuleList([Layer(74, 200), Layer(200, 200)])
for i, (images, classes) in enumerate(digits.batches(options.iterations, options.batch)):
    others = (classes + torch.randint(1, 10, classes.shape)) % 10
    right, wrong = labelled(images, classes), labelled(images, others)
    losses = []
    for layer in layers:
        loss, right, wrong = layer.learn(right, wrong)
        losses.append(loss)
    print(f"iteration {i}: loss {' and '.join(f'{each:.6f}' for each in losses)}")

images, classes = digits.held_out()
with torch.no_grad():
    goodness = []
    for label in range(10):  # which label gives the highest firing rates?
        x, sum_of_layers = labelled(images, torch.full_like(classes, label)), 0
        for layer in layers:
            x = layer(x)
            sum_of_layers = sum_of_layers + x.square().mean(1)
        goodness.append(sum_of_layers)
    print(f"test accuracy {(torch.stack(goodness).argmax(0) == classes).float().mean():.1%}")

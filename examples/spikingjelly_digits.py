"""A usual SpikingJelly training script on scikit-learn's digits: conv-BN-LIF, multi-step mode.

python examples/spikingjelly_digits.py                  # the host's neurons
snn-revplugin run examples/spikingjelly_digits.py       # the same file with the neurons swapped
"""

import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from spikingjelly.activation_based import functional, layer, neuron, surrogate

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--time-steps", type=int, default=8)
options = parser.parse_args()
torch.manual_seed(0)


def lif():
    return neuron.LIFNode(tau=2.0, detach_reset=True, surrogate_function=surrogate.ATan())


net = nn.Sequential(
    layer.Conv2d(1, 16, 3, padding=1, bias=False), layer.BatchNorm2d(16), lif(),
    layer.MaxPool2d(2),
    layer.Conv2d(16, 32, 3, padding=1, bias=False), layer.BatchNorm2d(32), lif(),
    layer.AdaptiveAvgPool2d(2), layer.Flatten(), layer.Linear(128, 10),
)  # fmt: skip
functional.set_step_mode(net, "m")

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
classes = torch.tensor(digits.target)
train, test = slice(0, 1500), slice(1500, None)


def rate(x):
    functional.reset_net(net)
    return net(x.unsqueeze(0).repeat(options.time_steps, 1, 1, 1, 1)).mean(0)


optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
for epoch in range(options.epochs):
    net.train()
    for batch in torch.randperm(1500).split(100):
        loss = F.cross_entropy(rate(images[train][batch]), classes[train][batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        accuracy = (rate(images[test]).argmax(1) == classes[test]).float().mean()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {accuracy:.1%}")

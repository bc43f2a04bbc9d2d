"""A usual snnTorch training script on scikit-learn's digits.

The net is convolutional, passes ``mem`` explicitly and has its own time loop.

python examples/snntorch_digits.py                      # the host's neurons
snn-revplugin run examples/snntorch_digits.py           # the same file with the neurons swapped
"""

import argparse

import snntorch as snn
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from snntorch import surrogate

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--time-steps", type=int, default=25)
options = parser.parse_args()
torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        neuron = {"beta": 0.9, "spike_grad": surrogate.fast_sigmoid(slope=25)}
        self.conv1, self.lif1 = nn.Conv2d(1, 12, 3), snn.Leaky(**neuron)
        self.conv2, self.lif2 = nn.Conv2d(12, 32, 3, padding=1), snn.Leaky(**neuron)
        self.fc, self.lif3 = nn.Linear(32 * 3 * 3, 10), snn.Leaky(**neuron)

    def forward(self, x):
        mem1, mem2, mem3 = self.lif1.reset_mem(), self.lif2.reset_mem(), self.lif3.reset_mem()
        mems = []
        for _ in range(options.time_steps):
            spk1, mem1 = self.lif1(self.conv1(x), mem1)
            spk2, mem2 = self.lif2(F.max_pool2d(self.conv2(spk1), 2), mem2)
            _, mem3 = self.lif3(self.fc(spk2.flatten(1)), mem3)
            mems.append(mem3)
        return torch.stack(mems)


digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
classes = torch.tensor(digits.target)
train, test = slice(0, 1500), slice(1500, None)

net = Net()
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
for epoch in range(options.epochs):
    for batch in torch.randperm(1500).split(100):
        mems = net(images[train][batch])
        loss = sum(F.cross_entropy(mem, classes[train][batch]) for mem in mems) / len(mems)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (net(images[test]).sum(0).argmax(1) == classes[test]).float().mean()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {accuracy:.1%}")

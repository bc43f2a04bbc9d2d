"""A fully connected net with a loss on the potential of every time step.

Its loop passes the potentials of both layers from step to step, as in snnTorch's tutorial 5.

python examples/snntorch_feedforward.py                 # the host's neurons
snn-revplugin run examples/snntorch_feedforward.py      # the same file with the neurons swapped
"""

import digits
import snntorch as snn
import torch
import torch.nn as nn
import torch.nn.functional as F

options = digits.options(__doc__.partition("\n")[0], iterations=60, time_steps=25)
torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self, hidden=200):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(64, hidden), snn.Leaky(beta=0.95)
        self.fc2, self.lif2 = nn.Linear(hidden, 10), snn.Leaky(beta=0.95)

    def forward(self, x):
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spikes, potentials = [], []
        for _ in range(options.time_steps):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spikes.append(spk2)
            potentials.append(mem2)
        return torch.stack(spikes), torch.stack(potentials)


net = Net()
optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.9, 0.999))
for i, (images, classes) in enumerate(digits.batches(options.iterations, options.batch)):
    _, potentials = net(images.flatten(1))
    loss = sum(F.cross_entropy(each, classes) for each in potentials)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"iteration {i}: loss {loss.item():.6f}")

images, classes = digits.held_out()
with torch.no_grad():
    spikes, _ = net(images.flatten(1))
    print(f"test accuracy {(spikes.sum(0).argmax(1) == classes).float().mean():.1%}")

"""Regression: the potential of a read-out neuron predicts a patient's progression of diabetes.

The read-out never resets. Each hidden neuron learns its own decay and has its own threshold, as in
snnTorch's first tutorial on regression.

python examples/snntorch_regression.py                  # the host's neurons
snn-revplugin run examples/snntorch_regression.py       # the same file with the neurons swapped
"""

import digits
import snntorch as snn
import torch
import torch.nn as nn
from sklearn.datasets import load_diabetes
from snntorch import surrogate

options = digits.options(__doc__.partition("\n")[0], iterations=200, time_steps=20)
torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self, features, hidden=32):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(features, hidden), self.hidden(hidden)
        self.fc2, self.lif2 = nn.Linear(hidden, hidden), self.hidden(hidden)
        self.fc3 = nn.Linear(hidden, 1)
        self.read_out = snn.Leaky(beta=torch.rand(1), learn_beta=True, reset_mechanism="none")

    @staticmethod
    def hidden(size):
        return snn.Leaky(
            beta=torch.rand(size),
            threshold=torch.rand(size),
            learn_beta=True,
            spike_grad=surrogate.fast_sigmoid(slope=10),
        )

    def forward(self, x):
        mem1, mem2, mem3 = self.lif1.reset_mem(), self.lif2.reset_mem(), self.read_out.reset_mem()
        potentials = []
        for _ in range(options.time_steps):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            _, mem3 = self.read_out(self.fc3(spk2), mem3)
            potentials.append(mem3.squeeze(1))
        return torch.stack(potentials)


diabetes = load_diabetes()
features = torch.tensor(diabetes.data, dtype=torch.float32) * 20
targets = torch.tensor(diabetes.target, dtype=torch.float32) / 100
train, test = slice(0, 350), slice(350, None)
# the potential has to reach the target at the last step
growth = torch.linspace(0, 1, options.time_steps).unsqueeze(1)

net = Net(features.shape[1])
loss_fn = nn.MSELoss()
optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
for i in range(options.iterations):
    batch = torch.randint(350, (options.batch,))
    loss = loss_fn(net(features[train][batch]), growth * targets[train][batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"iteration {i}: loss {loss.item():.6f}")

with torch.no_grad():
    error = loss_fn(net(features[test])[-1], targets[test])
print(f"test error {error:.3f}, of the mean of all patients {targets[test].var(correction=0):.3f}")

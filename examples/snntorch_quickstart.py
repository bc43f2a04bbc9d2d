"""snnTorch's quick start: a convolutional net in one ``nn.Sequential``.

Its neurons store their membrane potential themselves.

python examples/snntorch_quickstart.py                  # the host's neurons
snn-revplugin run examples/snntorch_quickstart.py       # the same file with the neurons swapped
"""

import digits
import snntorch as snn
import snntorch.functional as SF
import torch
import torch.nn as nn
from snntorch import surrogate, utils

options = digits.options(__doc__.partition("\n")[0], iterations=60, time_steps=25)
torch.manual_seed(0)

neuron = {"beta": 0.9, "spike_grad": surrogate.fast_sigmoid(slope=10), "init_hidden": True}
net = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.MaxPool2d(2), snn.Leaky(**neuron),
    nn.Conv2d(8, 16, 3, padding=1), nn.MaxPool2d(2), snn.Leaky(**neuron),
    nn.Flatten(), nn.Linear(16 * 2 * 2, 10), snn.Leaky(**neuron, output=True),
)  # fmt: skip


def spikes_of(images):
    """Show the same image at every time step; return the output's spikes ``[T, N, 10]``."""
    utils.reset(net)
    return torch.stack([net(images)[0] for _ in range(options.time_steps)])


loss_fn = SF.mse_count_loss(correct_rate=0.8, incorrect_rate=0.2)
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
for i, (images, classes) in enumerate(digits.batches(options.iterations, options.batch)):
    loss = loss_fn(spikes_of(images), classes)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"iteration {i}: loss {loss.item():.6f}")

images, classes = digits.held_out()
with torch.no_grad():
    print(f"test accuracy {SF.accuracy_rate(spikes_of(images), classes):.1%}")

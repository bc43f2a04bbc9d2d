"""A convolutional net on frames of events, a different frame at every time step.

The net is one ``nn.Sequential``, as in snnTorch's tutorial 7.

python examples/snntorch_events.py                      # the host's neurons
snn-revplugin run examples/snntorch_events.py           # the same file with the neurons swapped
"""

import digits
import snntorch as snn
import snntorch.functional as SF
import torch
import torch.nn as nn
from snntorch import surrogate, utils

options = digits.options(__doc__.partition("\n")[0], iterations=200, time_steps=20)
torch.manual_seed(0)

neuron = {"beta": 0.9, "spike_grad": surrogate.atan(), "init_hidden": True}
net = nn.Sequential(
    nn.Conv2d(2, 12, 3), snn.Leaky(**neuron), nn.MaxPool2d(2),
    nn.Conv2d(12, 32, 2), snn.Leaky(**neuron), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(32, 10), snn.Leaky(**neuron, output=True),
)  # fmt: skip


def spikes_of(frames):
    """Map frames ``[T, N, 2, 8, 8]`` to spikes ``[T, N, 10]``."""
    utils.reset(net)
    return torch.stack([net(frame)[0] for frame in frames])


loss_fn = SF.ce_rate_loss()
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
for i, (images, classes) in enumerate(digits.batches(options.iterations, options.batch)):
    net.train()
    loss = loss_fn(spikes_of(digits.as_events(images, options.time_steps)), classes)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"iteration {i}: loss {loss.item():.6f}")

images, classes = digits.held_out()
with torch.no_grad():
    net.eval()
    spikes = spikes_of(digits.as_events(images, options.time_steps))
    print(f"test accuracy {SF.accuracy_rate(spikes, classes):.1%}")

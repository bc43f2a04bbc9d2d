"""Population coding: fifty output neurons per class, counted together over very few time steps.

python examples/snntorch_population.py                  # the host's neurons
snn-revplugin run examples/snntorch_population.py       # the same file with the neurons swapped
"""

import digits
import snntorch as snn
import snntorch.functional as SF
import torch
import torch.nn as nn
from snntorch import surrogate, utils

options = digits.options(__doc__.partition("\n")[0], iterations=60, time_steps=3)
torch.manual_seed(0)

neuron = {"beta": 0.9, "spike_grad": surrogate.fast_sigmoid(slope=10), "init_hidden": True}
net = nn.Sequential(
    nn.Flatten(), nn.Linear(64, 128), snn.Leaky(**neuron),
    nn.Linear(128, 500), snn.Leaky(**neuron, output=True),
)  # fmt: skip


def spikes_of(images):
    utils.reset(net)
    return torch.stack([net(images)[0] for _ in range(options.time_steps)])


loss_fn = SF.mse_count_loss(
    correct_rate=1.0, incorrect_rate=0.0, population_code=True, num_classes=10
)
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
for i, (images, classes) in enumerate(digits.batches(options.iterations, options.batch)):
    loss = loss_fn(spikes_of(images), classes)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"iteration {i}: loss {loss.item():.6f}")

images, classes = digits.held_out()
with torch.no_grad():
    accuracy = SF.accuracy_rate(spikes_of(images), classes, population_code=True, num_classes=10)
    print(f"test accuracy {accuracy:.1%}")

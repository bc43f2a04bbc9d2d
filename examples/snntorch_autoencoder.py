"""A spiking autoencoder on scikit-learn's digits.

Convolutions compress the image to a code of spikes, and transposed convolutions reconstruct it.

python examples/snntorch_autoencoder.py                 # the host's neurons
snn-revplugin run examples/snntorch_autoencoder.py      # the same file with the neurons swapped
"""

import digits
import snntorch as snn
import torch
import torch.nn as nn
import torch.nn.functional as F
from snntorch import surrogate, utils

options = digits.options(__doc__.partition("\n")[0], iterations=60, time_steps=10)
torch.manual_seed(0)


def leaky(**more):
    return snn.Leaky(beta=0.5, spike_grad=surrogate.atan(alpha=2.0), init_hidden=True, **more)


class Autoencoder(nn.Module):
    def __init__(self, code=32):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), leaky(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), leaky(),
            nn.Flatten(), nn.Linear(32 * 2 * 2, code), leaky(),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(code, 32 * 2 * 2),
            leaky(),
            nn.Unflatten(1, (32, 2, 2)),
            nn.ConvTranspose2d(32, 16, 3, stride=2, padding=1, output_padding=1),
            nn.BatchNorm2d(16),
            leaky(),
            nn.ConvTranspose2d(16, 1, 3, stride=2, padding=1, output_padding=1),
            leaky(output=True, reset_mechanism="none"),
        )

    def forward(self, images):
        """Return the read-out's potentials at the last time step as an image ``[N, 1, 8, 8]``."""
        utils.reset(self.encoder)
        utils.reset(self.decoder)
        for _ in range(options.time_steps):
            _, potential = self.decoder(self.encoder(images))
        return torch.sigmoid(potential)


net = Autoencoder()
optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
for i, (images, _) in enumerate(digits.batches(options.iterations, options.batch)):
    loss = F.mse_loss(net(images), images)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"iteration {i}: loss {loss.item():.6f}")

images, _ = digits.held_out()
with torch.no_grad():
    net.eval()
    print(
        f"test error {F.mse_loss(net(images), images):.4f}, of a blank image"
        f" {images.square().mean():.4f}"
    )

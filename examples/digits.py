"""What the snnTorch examples share: their command line, and scikit-learn's handwritten digits."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor

TRAINING = 1500  # training images; the other 297 are for the test


def options(
    description: str, iterations: int, time_steps: int, batch: int = 100
) -> argparse.Namespace:
    """Parse the command line; the numbers are its defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--iterations", type=int, default=iterations, help="training steps")
    parser.add_argument("--time-steps", type=int, default=time_steps)
    parser.add_argument("--batch", type=int, default=batch)
    return parser.parse_args()


def _digits() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(digits.target)


def batches(count: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``count`` batches: random training images ``[size, 1, 8, 8]`` between 0 and 1, and
    their classes ``[size]``."""
    images, classes = _digits()
    for _ in range(count):
        chosen = torch.randint(TRAINING, (size,))
        yield images[chosen], classes[chosen]


def held_out() -> tuple[Tensor, Tensor]:
    """The test images and their classes."""
    images, classes = _digits()
    return images[TRAINING:], classes[TRAINING:]


def as_events(images: Tensor, time_steps: int) -> Tensor:
    """Events of moving images: ``[time_steps, N, 2, 8, 8]`` of zeros and ones, with one channel for
    pixels that become brighter and one for those that become darker."""
    moved = [images.roll((t % 3 - 1, t % 4 - 1), (2, 3)) for t in range(time_steps + 1)]
    changes = torch.stack(moved).diff(dim=0).squeeze(2)
    return torch.stack([changes > 0.25, changes < -0.25], 2).float()

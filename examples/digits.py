"""What the snnTorch examples share: their command line, and scikit-learn's handwritten digits in
the shapes that they need."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor

TRAINING = 1500  # images to learn from; the other 297 are for the test


def options(
    description: str, iterations: int, time_steps: int, batch: int = 100
) -> argparse.Namespace:
    """The command line; the numbers are what holds unless others are asked for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--iterations", type=int, default=iterations, help="training steps")
    parser.add_argument("--time-steps", type=int, default=time_steps)
    parser.add_argument("--batch", type=int, default=batch)
    return parser.parse_args()


def _digits() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(
        digits.target
    )


def batches(count: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random training images ``[size, 1, 8, 8]``, between 0 and 1, with their classes ``[size]``;
    ``count`` times."""
    images, classes = _digits()
    for _ in range(count):
        chosen = torch.randint(TRAINING, (size,))
        yield images[chosen], classes[chosen]


def held_out() -> tuple[Tensor, Tensor]:
    """The images and classes of the test."""
    images, classes = _digits()
    return images[TRAINING:], classes[TRAINING:]


def as_events(images: Tensor, time_steps: int) -> Tensor:
    """What a sensor of events sees of images that move to and fro: ``[time_steps, N, 2, 8, 8]`` of
    zeros and ones, one channel for pixels that brighten and one for those that darken."""
    moved = [images.roll((t % 3 - 1, t % 4 - 1), (2, 3)) for t in range(time_steps + 1)]
    changes = torch.stack(moved).diff(dim=0).squeeze(2)
    return torch.stack([changes > 0.25, changes < -0.25], 2).float()

"""What the examples of one's own neurons share: a net and its converted copy train side by side."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import digits
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import snn_revplugin


def train(
    net: nn.Module, rates: Callable[[nn.Module, Tensor], Tensor], options: argparse.Namespace
) -> None:
    """Train a net and a converted copy of it; print their losses, memory and test accuracy.

    Args:
        net: of ordinary neurons.
        rates: runs a net on images; the outputs, averaged over time, ``[N, 10]``.
        options: of the command line, see ``digits.options``.
    """
    nets = [net, copy.deepcopy(net)]
    print(snn_revplugin.convert(nets[1]))
    optimizers = [torch.optim.Adam(each.parameters(), lr=5e-3) for each in nets]
    for i, (images, classes) in enumerate(digits.batches(options.iterations, options.batch)):
        losses = []
        for each, optimizer in zip(nets, optimizers, strict=True):
            loss = F.cross_entropy(rates(each, images), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"iteration {i}: loss {losses[0]:.6f} and {losses[1]:.6f}")

    def step(each: nn.Module) -> Callable[[], None]:
        return lambda: F.cross_entropy(rates(each, images), classes).backward()

    retained, peak = zip(
        *((report.retained, report.peak) for report in
          (snn_revplugin.memory_report(step(each)) for each in nets)),
        strict=True,
    )  # fmt: skip
    for name, (host, ours) in {"retained": retained, "peak": peak}.items():
        print(f"{name}: {host / 1024:.0f} KiB, converted {ours / 1024:.0f} KiB")
    images, classes = digits.held_out()
    with torch.no_grad():
        right = (rates(nets[1], images).argmax(1) == classes).float().mean()
    print(f"test accuracy {right:.1%}")

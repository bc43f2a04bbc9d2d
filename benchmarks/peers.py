"""Measures workload 2 with other ways to save memory.

Run ``python benchmarks/peers.py``. SpikingJelly's conv-BN-LIF net
(64-64-M-128-128-M-256-256-256-256, step mode 'm', T 16, batch 4 of 3x32x32) trains with the host's
``LIFNode`` and with ours. It also trains with each block of convolution, batch norm and neuron
checkpointed: by SpikingJelly's ``memopt.optimize_memory(level=1, checkpoint_budget="memory")``,
which compresses spikes, and by ``torch.utils.checkpoint``; with the host's neurons and with ours.
The script prints the memory of one training step in live tensors, the times of alternating steps,
and the difference of the gradients from the host's.
"""

from __future__ import annotations

import argparse
import platform
import statistics

import torch
import torch.nn as nn
from spikingjelly.activation_based import functional, memopt
from torch import Tensor

from snn_revplugin.cli.comparison import Setup, largest_relative_difference, take_turns, versions
from snn_revplugin.cli.workloads import (
    HOST,
    OURS,
    WORKLOADS,
    Batch,
    Block,
    CheckpointedBlock,
    in_blocks,
)
from snn_revplugin.report.memory import memory_report, mib

COLUMNS = ("method", "retained", "peak", "step", "over the host's", "gradients")


def peers(setup: Setup, batch: Batch, whose: str = HOST) -> dict[str, nn.Module]:
    """Workload 2 under each other way to save memory, by the way's name.

    Args:
        batch: what memopt observes.
        whose: neurons, as in ``snn_revplugin.cli.workloads``.
    """

    blocks = in_blocks(setup.net(whose), Block)
    return {
        "memopt, level 1": in_memopt(setup, blocks, Block, batch),
        "torch.utils.checkpoint": in_blocks(setup.net(whose), CheckpointedBlock),
    }


def in_memopt(
    setup: Setup, net: nn.Module, kinds: type | tuple[type, ...], batch: Batch
) -> nn.Module:
    """A net whose blocks of some classes memopt checkpoints."""

    def forward(net: nn.Module) -> Tensor:
        return net(batch.images, setup.time_steps)

    optimised = memopt.optimize_memory(net, kinds, forward, level=1, checkpoint_budget="memory")
    functional.reset_net(optimised)
    return optimised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--time-steps", type=int, default=16)
    parser.add_argument(
        "--repeats", type=int, default=7, help="number of timed training steps per method"
    )
    options = parser.parse_args()
    setup = Setup.usual(WORKLOADS["vgg"], time_steps=options.time_steps)
    batch = setup.data()
    nets = {"host": setup.net(HOST), "ours": setup.net(OURS)} | {
        f"{prefix}{name}": net
        for whose, prefix in ((HOST, ""), (OURS, "ours in "))
        for name, net in peers(setup, batch, whose).items()
    }
    steps, memory, gradients = {}, {}, {}
    for name, net in nets.items():

        def step(net: nn.Module = net) -> None:
            net.zero_grad(set_to_none=True)
            setup.loss(net, batch).backward()

        steps[name], memory[name] = step, memory_report(lambda net=net: setup.loss(net, batch))
        gradients[name] = [each.grad.clone() for each in net.parameters()]
    seconds = take_turns(steps, options.repeats)
    print(
        ", ".join(f"{name} {version}" for name, version in versions().items() if version), end=", "
    )
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, float32 on cpu\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for name in nets:
        ratio = statistics.median(
            a / b for a, b in zip(seconds[name], seconds["host"], strict=True)
        )
        error = largest_relative_difference(gradients["host"], gradients[name])
        cells = (
            name,
            mib(memory[name].retained),
            mib(memory[name].peak),
            f"{1000 * statistics.median(seconds[name]):.0f} ms",
        )
        print(f"| {' | '.join(cells)} | {ratio:.2f} | {error:.1e} |")


if __name__ == "__main__":
    main()

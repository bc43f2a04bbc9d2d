"""What ``tests/test_distributed.py`` has torchrun start: networks trained by two processes, and by
one.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/distributed_worker.py
    FAMILY FILE

Every set-up of the family trains every net with the host's neurons and with ours; the first process
writes what it saw, one dictionary a training, to FILE.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import snntorch as snn
import torch
import torch.distributed as dist
import torch.nn as nn
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from snn_revplugin.adapters.snntorch import CoupledLeaky, RevLeaky
from snn_revplugin.adapters.spikingjelly import RevLIFNode, RevParametricLIFNode
from snn_revplugin.swap.module import NO_GRADIENT, ReversibleNeuron

T, BATCH, CHANNELS, SIZE = 6, 4, 6, 5
PROCESSES = 2
LIMIT = timedelta(seconds=60)


@dataclass(frozen=True)
class Net:
    """A net to train: its neurons, host's and ours, and how they are called."""

    host: Callable[..., nn.Module]
    ours: Callable[..., nn.Module]
    options: Callable[[], dict[str, Any]]
    sequences: bool = False  # whether a block is given all time steps at once
    norm: type[nn.Module] | None = None
    outside: bool = False  # whether the time loop is around what wraps the network
    evaluates: bool = (
        False  # whether a forward without gradients comes between forward and backward
    )


def _spikingjelly(**options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"surrogate_function": surrogate.ATan(), **options}


LEAKY = {"beta": torch.full((CHANNELS, 1, 1), 0.8), "learn_beta": True, "init_hidden": True}
NETS = {
    # FSDP refuses parameters without a dimension, the host's own ``beta`` among them: one decay a
    # channel.
    "Leaky": Net(snn.Leaky, RevLeaky, lambda: copy.deepcopy(LEAKY)),
    "Leaky, loop outside": Net(snn.Leaky, RevLeaky, lambda: copy.deepcopy(LEAKY), outside=True),
    "Leaky, evaluated before backward": Net(
        snn.Leaky, RevLeaky, lambda: copy.deepcopy(LEAKY), outside=True, evaluates=True
    ),
    "CoupledLeaky, loop outside": Net(
        partial(CoupledLeaky, reversible=False),
        CoupledLeaky,
        lambda: {"init_hidden": True},
        outside=True,
        evaluates=True,
    ),
    "LIF s": Net(neuron.LIFNode, RevLIFNode, _spikingjelly(v_reset=None)),
    "LIF m": Net(neuron.LIFNode, RevLIFNode, _spikingjelly(step_mode="m"), sequences=True),
    "LIF m, batch norm": Net(
        neuron.LIFNode,
        RevLIFNode,
        _spikingjelly(step_mode="m"),
        sequences=True,
        norm=nn.BatchNorm2d,
    ),
    "PLIF m": Net(
        neuron.ParametricLIFNode, RevParametricLIFNode, _spikingjelly(step_mode="m"), sequences=True
    ),
}


class Block(nn.Module):
    """convolution - (norm) - neuron"""

    def __init__(self, channels: int, net: Net, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, CHANNELS, 3, padding=1)
        self.norm = nn.Identity() if net.norm is None else net.norm(CHANNELS)
        self.neuron = kind(**net.options())
        nn.init.normal_(self.conv.weight, std=0.8)

    def forward(self, x: Tensor) -> Tensor:
        current = self.norm(self.conv(x.flatten(0, -4)))
        return self.neuron(current.unflatten(0, x.shape[:-3]) if x.dim() == 5 else current)


class Network(nn.Module):
    """Three blocks and a linear read-out: ``[T, N, 2, 5, 5]`` to ``[N, 3]``."""

    def __init__(self, net: Net, kind: Callable[..., nn.Module], unused: bool = False) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            Block(2, net, kind), Block(CHANNELS, net, kind), Block(CHANNELS, net, kind)
        )
        self.read_out = nn.Linear(CHANNELS * SIZE * SIZE, 3)
        self.sequences = net.sequences
        if unused:
            self.left_out = nn.Linear(3, 3)
        self.spikes: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        spikes = (
            self.blocks(x) if self.sequences else torch.stack([self.blocks(frame) for frame in x])
        )
        self.spikes.append(spikes.detach())
        return self.read_out(spikes.mean(0).flatten(1).to(self.read_out.weight.dtype))


def forget(network: Network) -> None:
    for each in network.blocks:
        each.neuron.reset_mem() if isinstance(
            each.neuron, snn.SpikingNeuron
        ) else each.neuron.reset()


Setup = Callable[[Network], nn.Module]  # to what is trained in its place


def ddp(**options: Any) -> Setup:
    return lambda network: DistributedDataParallel(network, **options)


def fsdp(parts: Callable[[Network], list[nn.Module]], **options: Any) -> Setup:
    def shard(network: Network) -> nn.Module:
        mesh = init_device_mesh("cpu", (PROCESSES,))
        for each in [*parts(network), network]:
            fully_shard(each, mesh=mesh, **options)
        return network

    return shard


def blocks(network: Network) -> list[nn.Module]:
    return list(network.blocks)


def layers(network: Network) -> list[nn.Module]:
    return [
        part
        for each in network.blocks
        for part in (each.conv, each.norm)
        if not isinstance(part, nn.Identity)
    ]


UNUSED, ACCUMULATED, BFLOAT16 = "find_unused_parameters", "no_sync", "blocks, bfloat16"
OWN_BUFFERS = "broadcast_buffers=False"
SETUPS: dict[str, dict[str, Setup]] = {
    "ddp": {
        "plain": ddp(),
        UNUSED: ddp(find_unused_parameters=True),
        "gradients are views of buckets": ddp(gradient_as_bucket_view=True),
        "static_graph": ddp(static_graph=True),
        ACCUMULATED: ddp(),
        OWN_BUFFERS: ddp(broadcast_buffers=False),
    },
    "fsdp": {
        "blocks": fsdp(blocks),
        "blocks, weights stay": fsdp(blocks, reshard_after_forward=False),
        BFLOAT16: fsdp(blocks, mp_policy=MixedPrecisionPolicy(torch.bfloat16)),
        "layers": fsdp(layers),
        "layers, weights stay": fsdp(layers, reshard_after_forward=False),
        "root": fsdp(lambda network: []),
    },
}


def nets_of(family: str, setup: str) -> tuple[str, ...]:
    """The nets that a set-up is tried with."""
    if setup == "plain":
        return tuple(NETS)
    if setup == OWN_BUFFERS:
        return ("Leaky, loop outside",)
    if setup in ("blocks", "layers"):
        # The learned time constant of PLIF has no dimension: FSDP refuses it.
        return tuple(name for name, net in NETS.items() if name != "PLIF m" and not net.evaluates)
    # A norm's running statistics stay float32 where weights are cast, which torch's kernel for a
    # CPU refuses.
    return "Leaky", "LIF m"


def train(
    net: Net, kind: Callable[..., nn.Module], setup: str, wrap: Setup | None
) -> dict[str, Any]:
    """Two steps of the optimiser; without ``wrap`` in one process, on the batches of both."""
    torch.manual_seed(0)
    network = Network(net, kind, unused=setup == UNUSED)
    model = network if wrap is None else wrap(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    share = (
        slice(None)
        if wrap is None
        else slice(dist.get_rank() * BATCH, (dist.get_rank() + 1) * BATCH)
    )
    seen: dict[str, Any] = {}
    for step in range(2):
        for part in range(2 if setup == ACCUMULATED else 1):
            generator = torch.Generator().manual_seed(10 * step + part)
            x = torch.randn(T, PROCESSES * BATCH, 2, SIZE, SIZE, generator=generator)[:, share]
            target = torch.randn(PROCESSES * BATCH, 3, generator=generator)[share]
            apart = setup == ACCUMULATED and part == 0 and wrap is not None
            forget(network)
            with model.no_sync() if apart else nullcontext():
                output = sum(model(frame[None]) for frame in x) / T if net.outside else model(x)
                if net.evaluates:
                    with torch.no_grad():
                        model(x[:1])
                (output - target).square().mean().backward()
        if step == 0:
            seen["gradients"] = {
                name: _whole(each.grad) for name, each in network.named_parameters()
            }
        optimizer.step()
        optimizer.zero_grad()
    seen["spikes"] = torch.cat(network.spikes)[:T]
    seen["parameters"] = {name: _whole(each.detach()) for name, each in network.named_parameters()}
    ledgers = [
        each.record.statistics for each in network.modules() if isinstance(each, ReversibleNeuron)
    ]
    seen["reasons"] = [set(each.reasons) - {NO_GRADIENT} for each in ledgers]
    seen["boundaries"] = [dict(each.boundaries) for each in ledgers]
    return seen


def _whole(tensor: Tensor | None) -> Tensor | None:
    return (
        tensor.full_tensor()
        if hasattr(tensor, "full_tensor")
        else tensor
        if tensor is None
        else tensor.clone()
    )


def main(family: str, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=LIMIT)
    seen = {}
    for setup, wrap in SETUPS[family].items():
        for name in nets_of(family, setup):
            net = NETS[name]
            for whose, kind in (("host", net.host), ("ours", net.ours)):
                seen[setup, name, whose] = train(net, kind, setup, wrap)
            if dist.get_rank() == 0:
                seen[setup, name, "one process"] = train(net, net.ours, setup, None)
    if dist.get_rank() == 0:
        torch.save(seen, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

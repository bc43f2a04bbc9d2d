"""Measures the fast backward of the coupled node against the usual one of reversible layers.

Run ``python benchmarks/fast_backward.py``. Today's reversible layers (RevNet and the libraries
after it) invert, run the layer forward a second time with gradients on, and differentiate that
second graph. Ours builds no second graph. The script trains the same net in four ways. The net
consists of SpikingJelly's conv-BN-LIF blocks (64-64-M-128-128-M-256-256-256-256, step mode 'm',
batch 4 of 3x32x32) with coupled nodes:

* ours: the node's gradient in closed form; the batch norm in front of it is inverted;
* usual: the node's input from the inverse, a second run of the node with gradients on, and
  ``torch.autograd.grad``; autograd stores the batch norm's input;
* usual, layer: ``torch.utils.checkpoint`` over convolution, batch norm and node, which stores as
  little as ours;
* plain: autograd stores everything.

Times are medians of alternating training steps. "shorter by" is how much less time a step of ours
takes, the median over adjacent steps. Memory is that of live tensors. Gradients are compared with
those of the usual way. In float32 they are also compared with those that float64 gives for the same
spikes, which shows the effect of rounding.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from snn_revplugin.adapters.spikingjelly import CoupledLIFNode
from snn_revplugin.cli.comparison import Setup, largest_relative_difference, take_turns, versions
from snn_revplugin.cli.workloads import WORKLOADS, Batch, CheckpointedBlock, in_blocks
from snn_revplugin.neurons.differentiable import differentiable_coupled_step
from snn_revplugin.report.memory import memory_report, mib

TIME_STEPS = (4, 8, 16)
COLUMNS = (
    "T",
    "backward",
    "step",
    "ours is shorter by",
    "retained",
    "peak",
    "gradients",
    "from float64",
)


class UsualNode(CoupledLIFNode):
    """The coupled node with the usual backward of reversible layers."""

    def multi_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[object, ...], **kwargs: object
    ) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
        outputs, v = _Usual.apply(inputs[0], states[0], self)
        return (outputs,), (v,)


class _Usual(torch.autograd.Function):
    """Stores outputs, spikes as bytes and the first potential. Backward inverts, runs the node a
    second time with gradients on, and differentiates that graph."""

    @staticmethod
    def forward(ctx: Any, x_seq: Tensor, v: Tensor, node: UsualNode) -> tuple[Tensor, Tensor]:
        coupled, ctx.node = node._coupled(), node
        outputs, fired, start = [], [], v
        for x in x_seq:
            y, v, s = coupled.step(x, v)
            outputs.append(y)
            fired.append(s)
        y_seq = torch.stack(outputs)
        ctx.save_for_backward(y_seq, torch.stack(fired), start)
        return y_seq, v

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor, grad_last: Tensor) -> tuple[Tensor, Tensor, None]:
        y_seq, fired, start = ctx.saved_tensors
        coupled, fire = ctx.node._coupled(), ctx.node.surrogate_function
        x_seq = coupled.inputs(y_seq, fired.to(y_seq.dtype), time=True).requires_grad_()
        start = start.detach().requires_grad_()
        with torch.enable_grad():
            outputs, v = [], start
            for x in x_seq:
                y, v = differentiable_coupled_step(coupled, x, v, fire)
                outputs.append(y)
            grads = torch.autograd.grad(
                (torch.stack(outputs), v), (x_seq, start), (grad_outputs, grad_last)
            )
        return *grads, None


class SameSpikes(CoupledLIFNode):
    """The plain node. It records which neurons fire in float32; in float64 the same ones fire."""

    def multi_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[object, ...], **kwargs: object
    ) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
        coupled, outputs, (v,) = self._coupled(), [], states
        records = inputs[0].dtype is torch.float32
        if records:
            self.fired = []
        recorded = iter(self.fired)

        def fire(z: Tensor) -> Tensor:
            spikes = self.surrogate_function(z)
            if records:
                self.fired.append(spikes.detach())
                return spikes
            return next(recorded) + (spikes - spikes.detach())

        for x in inputs[0]:
            y, v = differentiable_coupled_step(coupled, x, v, fire)
            outputs.append(y)
        return (torch.stack(outputs),), (v,)


def gradients_in_float64(setup: Setup, batch: Batch) -> list[Tensor]:
    """The gradients for the float32 net's spikes, without the rounding of float32."""
    torch.manual_seed(0)
    net = setup.workload.make(SameSpikes)
    setup.loss(net, batch)
    net.double()
    setup.loss(net, batch._replace(images=batch.images.double())).backward()
    return [each.grad for each in net.parameters()]


def nets(build: Callable[[type[nn.Module]], nn.Module]) -> dict[str, nn.Module]:
    """The four nets, with the same parameters."""
    plain = partial(CoupledLIFNode, reversible=False)
    made = {}
    for name, neuron in (
        ("ours", CoupledLIFNode),
        ("usual", UsualNode),
        ("usual, layer", plain),
        ("plain", plain),
    ):
        torch.manual_seed(0)
        made[name] = build(neuron)
    made["usual, layer"] = in_blocks(made["usual, layer"], CheckpointedBlock)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--time-steps", type=int, nargs="+", default=TIME_STEPS)
    parser.add_argument(
        "--repeats", type=int, default=7, help="number of timed training steps per net"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    options = parser.parse_args()
    print(
        ", ".join(f"{name} {version}" for name, version in versions().items() if version), end=", "
    )
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {options.dtype} on cpu\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    dtype = getattr(torch, options.dtype)
    for time_steps in options.time_steps:
        setup = Setup.usual(WORKLOADS["vgg"], time_steps=time_steps, dtype=dtype)
        for row in rows(setup, options.repeats):
            print(f"| {' | '.join(row)} |", flush=True)


def rows(setup: Setup, repeats: int) -> list[tuple[str, ...]]:
    """The rows of the table for one number of time steps."""
    batch, made = setup.data(), nets(setup.workload.make)
    steps, memory, gradients = {}, {}, {}
    for name, net in made.items():
        net.to(setup.dtype)

        def step(net: nn.Module = net) -> None:
            net.zero_grad(set_to_none=True)
            setup.loss(net, batch).backward()

        steps[name], memory[name] = step, memory_report(lambda net=net: setup.loss(net, batch))
        gradients[name] = [each.grad.clone() for each in net.parameters()]
    exact = gradients_in_float64(setup, batch) if setup.dtype is torch.float32 else None
    seconds = take_turns(steps, repeats)
    lines = []
    for name in made:
        ratio = statistics.median(
            a / b for a, b in zip(seconds["ours"], seconds[name], strict=True)
        )
        lines.append(
            (
                str(setup.time_steps),
                name,
                f"{1000 * statistics.median(seconds[name]):.0f} ms",
                "" if name == "ours" else f"{100 * (1 - ratio):.1f}%",
                mib(memory[name].retained),
                mib(memory[name].peak),
                ""
                if name == "usual"
                else f"{largest_relative_difference(gradients['usual'], gradients[name]):.1e}",
                ""
                if exact is None
                else f"{largest_relative_difference(exact, gradients[name]):.2e}",
            )
        )
    return lines


if __name__ == "__main__":
    main()

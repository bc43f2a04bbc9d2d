"""Measures the hosts' own models with the host's neurons and with ours, in one run.

Run ``python benchmarks/models.py [NAME ...]``. For one training step each, forward and backward, it
prints:

* the memory in bytes of live tensors, which includes the gradients of the parameters;
* the time of steps that alternate between host and ours, and the median of their ratios;
* whether all spikes are equal;
* the largest difference of a layer's gradient, relative to the largest entry of the host's;
* the boundaries that ``explain`` names.

To add a model, add a row, here or in ``models_snntorch.py``.
"""

from __future__ import annotations

import argparse
import gc
import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from models_snntorch import MODELS as SNNTORCH
from torch import Tensor

from snn_revplugin import explain
from snn_revplugin.cli.comparison import Setup, compare, versions
from snn_revplugin.cli.workloads import HOST, OURS, OverTime, Workload
from snn_revplugin.report.memory import mib

COLUMNS = (
    "model",
    "mode",
    "T",
    "batch",
    "image",
    "host retained",
    "ours",
    "less",
    "host peak",
    "ours",
    "less",
    "of which gradients",
    "host step",
    "ours",
    "ratio",
    "spikes",
    "gradients",
    "boundaries",
)


# SpikingJelly
# ------------------------------------------------------------


def spikingjelly(
    name: str,
    module: str,
    image: tuple[int, int, int],
    *modes: str,
    builder: str = "",
    batch: int = 4,
    time_steps: int = 4,
    **options: Any,
) -> list[tuple[Workload, str]]:
    """The rows of one model.

    Args:
        module: the module of ``spikingjelly.activation_based.model`` that contains the builder.
        image: the shape of one image.
        *modes: the step modes; without one, the model itself repeats the image over T.
        builder: the function that makes the model; ``name`` by default.
        options: arguments of the builder.
    """

    def make(mode: str) -> Callable[[type[nn.Module]], nn.Module]:
        def build(neuron: type[nn.Module]) -> nn.Module:
            from spikingjelly.activation_based import surrogate

            sizes = options | ({"T": time_steps} if mode == "own" else {})
            arguments = {
                "surrogate_function": surrogate.ATan(),
                "detach_reset": True,
                "v_threshold": 0.5,
            }
            found = getattr(
                __import__(f"spikingjelly.activation_based.model.{module}", fromlist=["_"]),
                builder or name,
            )
            return OverTime(found(spiking_neuron=neuron, **sizes, **arguments), mode)

        return build

    return [
        (
            Workload(
                name, name, "spikingjelly", make(mode), F.cross_entropy, image, time_steps, batch
            ),
            mode,
        )
        for mode in modes or ("own",)
    ]


TEN = {"num_classes": 10}
MODELS = [
    *spikingjelly("spiking_resnet18", "spiking_resnet", (3, 64, 64), "s", "m", **TEN),
    *spikingjelly("spiking_resnet50", "spiking_resnet", (3, 64, 64), "s", "m", **TEN),
    *spikingjelly(
        "sew_resnet18 ADD",
        "sew_resnet",
        (3, 64, 64),
        "s",
        "m",
        builder="sew_resnet18",
        cnf="ADD",
        **TEN,
    ),
    *spikingjelly(
        "sew_resnet18 AND",
        "sew_resnet",
        (3, 64, 64),
        "s",
        "m",
        builder="sew_resnet18",
        cnf="AND",
        **TEN,
    ),
    *spikingjelly(
        "sew_resnet18 IAND",
        "sew_resnet",
        (3, 64, 64),
        "s",
        "m",
        builder="sew_resnet18",
        cnf="IAND",
        **TEN,
    ),
    *spikingjelly(
        "sew_resnet101 ADD",
        "sew_resnet",
        (3, 64, 64),
        "m",
        builder="sew_resnet101",
        cnf="ADD",
        batch=2,
        **TEN,
    ),
    *spikingjelly("spiking_vgg11_bn", "spiking_vgg", (3, 64, 64), "s", "m", **TEN),
    *spikingjelly("CIFAR10Net", "parametric_lif_net", (3, 32, 32), "s", "m", channels=64),
    *spikingjelly("DVSGestureNet", "parametric_lif_net", (2, 128, 128), "s", "m", channels=32),
    *spikingjelly("ms_resnet18", "ms_resnet", (3, 64, 64), **TEN),
    *spikingjelly("ms_resnet34", "ms_resnet", (3, 64, 64), **TEN),
    *spikingjelly("max_resnet18", "ms_resnet", (3, 16, 16), **TEN),
    *spikingjelly("spikformer_cifar10", "spikformer", (3, 32, 32)),
    *spikingjelly("sdt_8_384", "spike_driven_transformer", (3, 64, 64), **TEN),
    *spikingjelly("qkformer_10_384", "qkformer", (3, 64, 64), **TEN),
    *spikingjelly("maxformer_10_384", "maxformer", (3, 64, 64), **TEN),
    *spikingjelly("maxformer_cifar", "maxformer", (3, 32, 32), **TEN),
    *spikingjelly("att_ms_resnet18", "masnn", (3, 64, 64), **TEN),
    *spikingjelly("masnn_dvs128_gesture", "masnn", (2, 32, 32), time_steps=10, **TEN),
    *SNNTORCH,
]


# The table
# ------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="prefixes of model names; by default all models")
    parser.add_argument(
        "--repeats", type=int, default=3, help="number of timed training steps per model"
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    print(
        ", ".join(f"{name} {version}" for name, version in versions().items() if version), end=", "
    )
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, float32 on {options.device}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    for workload, mode in MODELS:
        if options.names and not any(workload.name.startswith(name) for name in options.names):
            continue
        print(
            f"| {' | '.join(cells_of(workload, mode, options.repeats, options.device))} |",
            flush=True,
        )
        gc.collect()


def cells_of(workload: Workload, mode: str, repeats: int, device: str) -> tuple[str, ...]:
    """The cells of one model's row."""
    setup = Setup.usual(workload, device=device)
    comparison = compare(setup, repeats)
    host, ours = (comparison.memory[whose] for whose in (HOST, OURS))
    step = {
        whose: 1000 * sorted(seconds)[len(seconds) // 2]
        for whose, seconds in comparison.seconds.items()
    }
    error, boundaries = differences(setup)
    return (
        workload.name,
        mode,
        str(setup.time_steps),
        str(setup.batch),
        "x".join(map(str, workload.image)),
        mib(host.retained),
        mib(ours.retained),
        f"{comparison.retained_ratio:.1f}x",
        mib(host.peak),
        mib(ours.peak),
        f"{comparison.peak_ratio:.1f}x",
        mib(ours.left),
        f"{step[HOST]:.0f} ms",
        f"{step[OURS]:.0f} ms",
        f"{comparison.time_ratio:.2f}",
        "equal" if comparison.spikes_equal else "DIFFER",
        f"{error:.1e}",
        boundaries,
    )


def differences(setup: Setup) -> tuple[float, str]:
    """The largest difference of a layer's gradient, relative to the layer's largest entry, and the
    boundaries of our neurons.

    A layer's weight and bias count together: the gradient of a bias in front of a batch norm is
    only rounding.
    """
    batch, gradients = setup.data(), {}
    for whose in (HOST, OURS):
        net = setup.net(whose)
        setup.loss(net, batch).backward()
        gradients[whose] = [
            layer for layer in map(_gradient_of, net.modules()) if layer is not None
        ]
    error = max(
        ((a - b).abs().max() / a.abs().max()).item()
        for a, b in zip(*gradients.values(), strict=True)
        if a.any()
    )
    found = {
        each
        for row in explain(net).rows
        for each in (*row.boundaries, *row.reasons, row.left)
        if each
    }
    return error, ", ".join(sorted(found)) or "none"


def _gradient_of(layer: nn.Module) -> Tensor | None:
    own = [each.grad.flatten() for each in layer.parameters(recurse=False) if each.grad is not None]
    return torch.cat(own) if own else None


if __name__ == "__main__":
    main()

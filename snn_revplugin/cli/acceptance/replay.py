"""Part 2: replay on the device. Each operation is recomputed in a backward pass, where autograd
recomputes it, and compared with what it gave in forward.

Libraries may choose another algorithm in backward: their caches of plans belong to a thread. So the
operation itself is run again beside it, without us: the noise that the host would see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ...bptt.record import NeuronRecord
from ...bptt.step import step
from ...neurons.integrate_and_fire import IntegrateAndFire
from ...neurons.surrogate import Surrogate
from ...replay import attach_recipes
from ...settings import use_settings
from .case import ABSENT, FAILED, NO_CUDA, PASSED, Case, Cases, Finding, Findings, Sizes

CHANNELS_LAST = "channels_last"
# Largest difference of a recomputed tensor, relative to its largest element.
ROUNDING = {"float32": 1e-5, "TF32": 2e-3, "autocast float16": 4e-3, "autocast bfloat16": 2e-2}


class Of(nn.Module):
    """A function of spikes and of freshly drawn parameters of the given shapes."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, spikes: Tensor) -> Tensor:
        return self.function(spikes, *self.weights)


def _evaluated(module: nn.Module) -> nn.Module:
    return module.eval()


def _attention(spikes: Tensor, weight: Tensor) -> Tensor:
    query, key, value = (spikes @ weight).chunk(3, -1)
    return F.scaled_dot_product_attention(query, key, value)


ROWS = 64, 96
TOKENS = 8, 4, 32, 48
LINE = 8, 16, 64
IMAGE = 8, 16, 20, 20
VOLUME = 4, 8, 8, 8, 8

# The shape of the spikes, and what makes the operation.
OPERATIONS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "linear": (ROWS, lambda: nn.Linear(96, 128)),
    "linear without bias": (ROWS, lambda: nn.Linear(96, 128, bias=False)),
    "matmul": (TOKENS, lambda: Of(torch.matmul, (48, 40))),
    "conv1d": (LINE, lambda: nn.Conv1d(16, 32, 3, padding=1)),
    "conv2d": (IMAGE, lambda: nn.Conv2d(16, 32, 3, padding=1, bias=False)),
    "conv2d with stride and bias": (IMAGE, lambda: nn.Conv2d(16, 32, 3, stride=2)),
    "conv2d 1x1": (IMAGE, lambda: nn.Conv2d(16, 64, 1)),
    "conv2d by channel": (IMAGE, lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16)),
    "conv2d dilated": (IMAGE, lambda: nn.Conv2d(16, 16, 3, padding=2, dilation=2)),
    "conv3d": (VOLUME, lambda: nn.Conv3d(8, 8, 3, padding=1)),
    "conv_transpose2d": (IMAGE, lambda: nn.ConvTranspose2d(16, 8, 3, stride=2)),
    "conv2d, batch norm": (
        IMAGE,
        lambda: nn.Sequential(nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32)),
    ),
    "batch norm": (IMAGE, lambda: nn.BatchNorm2d(16)),
    "batch norm, evaluated": (IMAGE, lambda: _evaluated(nn.BatchNorm2d(16))),
    "batch norm of rows": (ROWS, lambda: nn.BatchNorm1d(96)),
    "layer norm": (TOKENS, lambda: nn.LayerNorm(48)),
    "group norm": (IMAGE, lambda: nn.GroupNorm(4, 16)),
    "instance norm": (IMAGE, lambda: nn.InstanceNorm2d(16)),
    "max pooling": (IMAGE, lambda: nn.MaxPool2d(2)),
    "average pooling": (IMAGE, lambda: nn.AvgPool2d(2)),
    "adaptive average pooling": (IMAGE, lambda: nn.AdaptiveAvgPool2d(4)),
    "adaptive max pooling": (IMAGE, lambda: nn.AdaptiveMaxPool2d(4)),
    "nearest": (IMAGE, lambda: nn.Upsample(scale_factor=2)),
    "bilinear": (IMAGE, lambda: nn.Upsample(scale_factor=2, mode="bilinear")),
    "padding": (IMAGE, lambda: Of(lambda s: F.pad(s, (1, 1, 1, 1)))),
    "reflection": (IMAGE, lambda: nn.ReflectionPad2d(1)),
    "relu": (ROWS, nn.ReLU),
    "leaky relu": (ROWS, nn.LeakyReLU),
    "sigmoid": (ROWS, nn.Sigmoid),
    "tanh": (ROWS, nn.Tanh),
    "softmax": (ROWS, lambda: nn.Softmax(-1)),
    "dropout": (ROWS, lambda: nn.Dropout(0.3)),
    "scaled": (ROWS, lambda: Of(torch.mul, (96,))),
    "divided": (ROWS, lambda: Of(lambda s: s / 3.0)),
    "one minus spikes": (ROWS, lambda: Of(lambda s: 1.0 - s)),
    "sum with a constant": (ROWS, lambda: Of(lambda s: s + 0.3)),
    "sum of two branches": (
        ROWS,
        lambda: Of(lambda s, w: s @ w + s, (96, 96)),
    ),
    "mean": (IMAGE, lambda: Of(lambda s: s.mean((2, 3)))),
    "sum": (IMAGE, lambda: Of(lambda s: s.sum(1))),
    "flatten": (IMAGE, nn.Flatten),
    "concatenation": (ROWS, lambda: Of(lambda s: torch.cat([s, 2 * s], 1))),
    "attention": (TOKENS, lambda: Of(_attention, (48, 144))),
}


def cases(sizes: Sizes, device: str) -> Cases:
    for way in sizes.precisions:
        yield Case("replay", "every operation", way, device)


def examine(case: Case) -> Findings:
    if case.way in ("TF32", "cudnn.benchmark") and not case.on_cuda:
        yield case.found(ABSENT, why=NO_CUDA)
        return
    for name, (shape, _) in OPERATIONS.items():
        if case.way == CHANNELS_LAST and len(shape) != 4:
            continue
        try:
            yield compare_operation(case, name)
        except Exception as error:  # the next operation may do better
            message = str(error).partition("\n")[0]
            yield case.found(FAILED, name, f"{type(error).__name__}: {message}")


def compare_operation(case: Case, name: str) -> Finding:
    """Recompute an operation in backward, by its recipe and by itself."""
    shape, make = OPERATIONS[name]
    torch.manual_seed(0)
    operation = make().to(case.device)
    currents = torch.randn(shape, device=case.device)
    if case.way == CHANNELS_LAST:
        currents = currents.to(memory_format=torch.channels_last)
        operation = operation.to(memory_format=torch.channels_last)
    currents.requires_grad_()
    neuron, record = IntegrateAndFire(Surrogate("atan", (2.0,)), 0.5, None, False), NeuronRecord()
    found: list[tuple[Tensor, Tensor]] = []

    def in_backward(grad: Tensor) -> None:
        with torch.no_grad(), _rounding(case):
            found.append((value.value(), operation(spikes.detach())))

    with use_settings(recompute_min_bytes=0):
        spikes, _ = step(neuron, currents, (torch.zeros_like(currents),), NeuronRecord())
        with _rounding(case):
            outputs = operation(spikes)
        value = attach_recipes(outputs, record)
        if value is None:
            return case.found(
                FAILED, name, f"kept: {', '.join(record.statistics.boundaries) or 'no recipe'}"
            )
        value.add_reader()
        outputs.register_hook(in_backward)
        outputs.backward(torch.ones_like(outputs))
    ours, host = (_off(outputs.detach(), each) for each in found[0])
    figures = {"off": ours} if "dropout" in name else {"off": ours, "host_off": host}
    if ours <= ROUNDING.get(case.way, ROUNDING["float32"]):
        return case.found(PASSED, name, **figures)
    return case.found(FAILED, name, "off by more than rounding", **figures)


def _off(first: Tensor, again: Tensor) -> float:
    """The largest difference, relative to the largest element: 0 for equal bits."""
    if torch.equal(first, again):
        return 0.0
    first, again = first.double(), again.double()
    return ((first - again).abs().max() / first.abs().max().clamp_min(1e-30)).item()


@contextmanager
def _rounding(case: Case) -> Iterator[None]:
    """The precision of a case, in this thread: backward has a thread of its own, and autocast holds
    for the thread that entered it."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    with_tf32 = case.way == "TF32"
    cudnn.benchmark = case.way == "cudnn.benchmark"
    cudnn.allow_tf32 = matmul.allow_tf32 = with_tf32
    kind, _, dtype = case.way.partition(" ")
    try:
        with torch.autocast(
            torch.device(case.device).type,
            getattr(torch, dtype or "bfloat16"),
            enabled=kind == "autocast",
        ):
            yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before

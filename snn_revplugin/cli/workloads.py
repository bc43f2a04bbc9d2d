"""The networks that demo, bench and benchmarks train: each builds with the host's neuron class or
with ours, same weights.

A host is imported when a work of its is built, and not before.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

HOST, OURS, COUPLED = "host", "ours", "coupled"

# Module and name of the neuron: the host's, ours in its place, and the coupled node, which is
# another neuron behind the same API (``beta=0.9`` means that it passes on nine tenths of its input,
# where it is the decay of the others).
NEURONS = {
    "snntorch": {
        HOST: ("snntorch", "Leaky"),
        OURS: ("snn_revplugin.adapters.snntorch", "RevLeaky"),
        COUPLED: ("snn_revplugin.adapters.snntorch", "CoupledLeaky"),
    },
    "spikingjelly": {
        HOST: ("spikingjelly.activation_based.neuron", "LIFNode"),
        OURS: ("snn_revplugin.adapters.spikingjelly", "RevLIFNode"),
        COUPLED: ("snn_revplugin.adapters.spikingjelly", "CoupledLIFNode"),
    },
}


class Batch(NamedTuple):
    """Images ``[N, C, H, W]`` and their classes ``[N]``."""

    images: Tensor
    classes: Tensor


@dataclass(frozen=True)
class Workload:
    """A network, its data and its loss.

    Args:
        name: as one calls it on the command line.
        title: what it is, in a line.
        host: a key of ``NEURONS``.
        make: takes a neuron class and a surrogate to the net; the net takes images and T to outputs
            ``[T, N, classes]``.
        loss: takes the outputs and the classes to a scalar.
        image: shape of one image.
        time_steps, batch: the sizes that are used unless others are asked for.
        in_blocks: takes SpikingJelly's net to the class of its blocks, for what saves memory block
            by block; it may gather the net's layers in blocks first, in place.
    """

    name: str
    title: str
    host: str
    make: Callable[[type[nn.Module]], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    image: tuple[int, int, int]
    time_steps: int
    batch: int
    in_blocks: Callable[[nn.Module], type[nn.Module]] | None = None

    def neuron(self, whose: str) -> type[nn.Module]:
        """The neuron class, of ``HOST``, ``OURS`` or ``COUPLED``.

        Raises:
            ImportError: the host is not installed; the message names the extra that brings it.
        """
        module, name = NEURONS[self.host][whose]
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name != self.host:
                raise
            raise ImportError(
                f"{self.name} needs {self.host}: pip install 'snn-revplugin[{self.host}]'"
            ) from error

    def build(self, whose: str, seed: int = 0) -> nn.Module:
        """The net; the same seed gives the same weights, whosever the neurons are, and leaves
        torch's generator alone."""
        neuron = self.neuron(whose)  # outside of the fork: importing a host may draw numbers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make(neuron)

    def data(self, batch: int | None = None, seed: int = 0) -> Batch:
        """Random images and classes."""
        count, generator = batch or self.batch, torch.Generator().manual_seed(seed)
        return Batch(
            torch.rand(count, *self.image, generator=generator),
            torch.randint(10, (count,), generator=generator),
        )


class LeakyConvNet(nn.Module):
    """The convolutional net of snnTorch's tutorials, in its own time loop with explicit ``mem``.

    Args:
        neuron: ``snntorch.Leaky`` or a class that takes the same arguments.
        size: height and width of the images.
        kernel: size of the convolutions' kernels.
    """

    def __init__(self, neuron: type[nn.Module], size: int = 28, kernel: int = 5) -> None:
        super().__init__()
        from snntorch import surrogate

        fast_sigmoid = surrogate.fast_sigmoid(slope=25)
        self.conv1, self.lif1 = nn.Conv2d(1, 12, kernel), neuron(beta=0.9, spike_grad=fast_sigmoid)
        self.conv2, self.lif2 = nn.Conv2d(12, 64, kernel), neuron(beta=0.9, spike_grad=fast_sigmoid)
        size = ((size - kernel + 1) // 2 - kernel + 1) // 2
        self.fc1, self.lif3 = (
            nn.Linear(64 * size * size, 10),
            neuron(beta=0.9, spike_grad=fast_sigmoid),
        )

    def forward(self, images: Tensor, time_steps: int) -> Tensor:
        """The last layer's membrane potentials, ``[T, N, 10]``."""
        mems, outputs = (self.lif1.reset_mem(), self.lif2.reset_mem(), self.lif3.reset_mem()), []
        for _ in range(time_steps):
            mems = self.step(images, *mems)
            outputs.append(mems[-1])
        return torch.stack(outputs)

    def step(
        self, images: Tensor, mem1: Tensor, mem2: Tensor, mem3: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One time step: the membrane potentials after it."""
        spk1, mem1 = self.lif1(F.max_pool2d(self.conv1(images), 2), mem1)
        # snnTorch hands out float32 spikes whatever the net's dtype.
        spk2, mem2 = self.lif2(F.max_pool2d(self.conv2(spk1.to(images.dtype)), 2), mem2)
        _, mem3 = self.lif3(self.fc1(spk2.flatten(1).to(images.dtype)), mem3)
        return mem1, mem2, mem3


class CheckpointedLeakyConvNet(LeakyConvNet):
    """The same with every time step under ``torch.utils.checkpoint``."""

    def step(self, images: Tensor, *mems: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return checkpoint(super().step, images, *mems, use_reentrant=False)


POOL = "M"


class ConvBatchNormLIFNet(nn.Module):
    """SpikingJelly's conv-BN-LIF blocks in multi-step mode, global average pooling, and a linear
    classifier.

    Args:
        neuron: ``LIFNode`` or a class that takes the same arguments.
        channels: of the images.
        blocks: the output channels of each block; ``POOL`` for max pooling by 2.
    """

    def __init__(
        self, neuron: type[nn.Module], channels: int, blocks: tuple[int | str, ...]
    ) -> None:
        super().__init__()
        from spikingjelly.activation_based import functional, layer, surrogate

        layers: list[nn.Module] = []
        for block in blocks:
            if block == POOL:
                layers.append(layer.MaxPool2d(2))
                continue
            lif = neuron(tau=2.0, detach_reset=True, surrogate_function=surrogate.ATan())
            layers += [
                layer.Conv2d(channels, block, 3, padding=1, bias=False),
                layer.BatchNorm2d(block),
                lif,
            ]
            channels = block
        layers += [layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(channels, 10)]
        self.layers = nn.Sequential(*layers)
        functional.set_step_mode(self, "m")

    def forward(self, images: Tensor, time_steps: int) -> Tensor:
        """The classifier's outputs, ``[T, N, 10]``; the neurons start from rest."""
        from spikingjelly.activation_based import functional

        functional.reset_net(self)
        return self.layers(images.expand(time_steps, *images.shape))


class Block(nn.Sequential):
    """Convolution, batch norm and neuron of a :class:`ConvBatchNormLIFNet`, for comparison with
    what checkpoints blocks."""


class CheckpointedBlock(Block):
    """The same under ``torch.utils.checkpoint``; the neuron starts from rest both times."""

    def forward(self, x_seq: Tensor) -> Tensor:
        return checkpoint(self._run, x_seq, use_reentrant=False)

    def _run(self, x_seq: Tensor) -> Tensor:
        conv, norm, neuron = self
        x_seq = norm(conv(x_seq))
        (outputs,), _ = neuron.multi_step_functional_forward(
            (x_seq,), (torch.zeros_like(x_seq[0]),)
        )
        return outputs


def in_blocks(net: ConvBatchNormLIFNet, block: type[Block]) -> ConvBatchNormLIFNet:
    """The net, changed in place, with each convolution, batch norm and neuron in one block."""
    layers, rest = [], list(net.layers)
    while rest:
        size = 3 if isinstance(rest[0], nn.Conv2d) else 1
        layers.append(block(*rest[:3]) if size == 3 else rest[0])
        del rest[:size]
    net.layers = nn.Sequential(*layers)
    return net


def _gathered(net: ConvBatchNormLIFNet) -> type[Block]:
    in_blocks(net, Block)
    return Block


def checkpoint_each(net: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """SpikingJelly's net in step mode 'm', changed in place, with each block of a class under
    ``torch.utils.checkpoint``; the block's neurons start from rest both times."""
    for each in net.modules():
        if isinstance(each, kind):
            each.forward = partial(_checkpointed, each, each.forward)
    return net


def _checkpointed(block: nn.Module, forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    from spikingjelly.activation_based import functional

    def run(*inputs: Tensor) -> Tensor:
        functional.reset_net(block)
        return forward(*inputs)

    return checkpoint(run, *inputs, use_reentrant=False)


class OverTime(nn.Module):
    """A model of SpikingJelly that starts from rest and runs T time steps, to ``[N, classes]``.

    Args:
        net: the model.
        mode: "s" (in a loop), "m", or "own" if the model itself repeats the image.
    """

    def __init__(self, net: nn.Module, mode: str) -> None:
        super().__init__()
        from spikingjelly.activation_based import functional

        self.net, self.mode = net, mode
        if mode != "own":
            functional.set_step_mode(net, mode)
        # so that neurons fire, and no residual branch is multiplied by zero
        for each in net.modules():
            if isinstance(each, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(each.weight, 0.5, 1.5)

    def forward(self, images: Tensor, time_steps: int) -> Tensor:
        from spikingjelly.activation_based import functional

        functional.reset_net(self.net)
        torch.manual_seed(0)  # for dropout
        if self.mode == "s":
            return torch.stack([self.net(images) for _ in range(time_steps)]).mean(0)
        outputs = self.net(images.expand(time_steps, *images.shape) if self.mode == "m" else images)
        return outputs if outputs.dim() == 2 else outputs.mean(0)


def _model(name: str, module: str, builder: str, block: str, mode: str, **options: Any) -> Workload:
    """A model of SpikingJelly.

    Args:
        module: the module of ``spikingjelly.activation_based.model`` that contains the builder.
        builder, block: the function that makes the model, and the class of its blocks.
        mode: of :class:`OverTime`.
        options: arguments of the builder.
    """

    def models() -> ModuleType:
        return importlib.import_module(f"spikingjelly.activation_based.model.{module}")

    def make(neuron: type[nn.Module]) -> nn.Module:
        from spikingjelly.activation_based import surrogate

        arguments = {"surrogate_function": surrogate.ATan(), "detach_reset": True}
        build = getattr(models(), builder)
        return OverTime(build(spiking_neuron=neuron, v_threshold=0.5, **arguments, **options), mode)

    return Workload(
        name,
        f"SpikingJelly's {builder}, 32x32 images",
        "spikingjelly",
        make,
        F.cross_entropy,
        image=(3, 32, 32),
        time_steps=4,
        batch=4,
        in_blocks=lambda _: getattr(models(), block),
    )


def loss_of_every_step(outputs: Tensor, classes: Tensor) -> Tensor:
    """Cross entropy summed over time steps, each with its own say."""
    return sum(F.cross_entropy(output, classes) for output in outputs)


def loss_of_mean(outputs: Tensor, classes: Tensor) -> Tensor:
    """Cross entropy of the outputs' mean over time."""
    return F.cross_entropy(outputs.mean(0), classes)


WORKLOADS = {
    each.name: each
    for each in (
        Workload(
            "csnn",
            "conv(1,12,5)-pool-Leaky, conv(12,64,5)-pool-Leaky, linear-Leaky, time loop with"
            " explicit mem",
            "snntorch",
            LeakyConvNet,
            loss_of_every_step,
            image=(1, 28, 28),
            time_steps=100,
            batch=32,
        ),
        Workload(
            "vgg",
            "conv-BN-LIF x8 (64-64-M-128-128-M-256-256-256-256), step_mode 'm'",
            "spikingjelly",
            lambda neuron: ConvBatchNormLIFNet(
                neuron, 3, (64, 64, POOL, 128, 128, POOL, 256, 256, 256, 256)
            ),
            loss_of_mean,
            image=(3, 32, 32),
            time_steps=16,
            batch=4,
            in_blocks=_gathered,
        ),
        Workload(
            "digits-snntorch",
            "the tutorials' convolutional net of Leaky neurons, time loop with explicit mem, on"
            " digits",
            "snntorch",
            lambda neuron: LeakyConvNet(neuron, size=16, kernel=3),
            loss_of_every_step,
            image=(1, 16, 16),
            time_steps=25,
            batch=64,
        ),
        Workload(
            "digits-spikingjelly",
            "conv-BN-LIF x4 (32-32-M-64-64), step_mode 'm', on digits",
            "spikingjelly",
            lambda neuron: ConvBatchNormLIFNet(neuron, 1, (32, 32, POOL, 64, 64)),
            loss_of_mean,
            image=(1, 8, 8),
            time_steps=8,
            batch=64,
            in_blocks=_gathered,
        ),
        _model(
            "spiking_resnet18",
            "spiking_resnet",
            "spiking_resnet18",
            "BasicBlock",
            "m",
            num_classes=10,
        ),
        _model(
            "sew_resnet18",
            "sew_resnet",
            "sew_resnet18",
            "BasicBlock",
            "m",
            cnf="ADD",
            num_classes=10,
        ),
        _model("spikformer", "spikformer", "spikformer_cifar10", "SpikformerBlock", "own", T=4),
    )
}


def digits(size: int = 16, test_share: float = 0.25, seed: int = 0) -> tuple[Batch, Batch]:
    """scikit-learn's 1797 handwritten digits, enlarged to ``size`` by ``size``; training set and
    test set.

    Raises:
        ImportError: scikit-learn is not installed; the message names the extra that brings it.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits need scikit-learn: pip install 'snn-revplugin[cli]'"
        ) from error
    pixels, classes = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().div(16).view(-1, 1, 8, 8)
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, classes = images[order], torch.from_numpy(classes)[order]
    test = round(len(images) * test_share)
    return Batch(images[test:], classes[test:]), Batch(images[:test], classes[:test])

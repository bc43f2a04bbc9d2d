"""SpikingJelly's own models with reversible neurons, small: spikes, outputs and gradients of the
host's, no boundary, and the memory that a training step holds. To cover another model, add a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import Observed, assert_agree
from hosts import OLDER_TORCH
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model import (
    masnn,
    maxformer,
    ms_resnet,
    parametric_lif_net,
    qkformer,
    sew_resnet,
    spike_driven_transformer,
    spikformer,
    spiking_resnet,
    spiking_vgg,
)
from torch import Tensor, nn

import snn_revplugin
from snn_revplugin import explain
from snn_revplugin.adapters.spikingjelly import RevLIFNode, RevParametricLIFNode
from snn_revplugin.report.memory import memory_report
from snn_revplugin.swap.module import ReversibleNeuron

TIME_STEPS = 3
BATCH = 2
CLASSES = 10
OWN = ""  # the model repeats the image over time itself
LIF = (neuron.LIFNode, RevLIFNode)
PLIF = (neuron.ParametricLIFNode, RevParametricLIFNode)


@dataclass(frozen=True)
class Model:
    """One of SpikingJelly's models.

    Args:
        name: as in the test's id.
        build: makes it of a neuron class (None for the model's own choice) and the neurons'
            arguments.
        image: the shape of one image.
        retained, peak: how many times less than the host's is kept for backward, and held at most.
        modes: the step modes that it has.
        neurons: the host's class and ours.
        threshold: of the neurons, low enough for the deepest of them to fire.
    """

    name: str
    build: Callable[..., nn.Module]
    image: tuple[int, int, int]
    retained: float
    peak: float
    modes: str | tuple[str, ...] = "sm"
    neurons: tuple[type[nn.Module], type[nn.Module]] = LIF
    threshold: float = 0.3


def sew(connect: str, *blocks: int) -> Callable[..., nn.Module]:
    def build(kind: type[nn.Module], **options: Any) -> nn.Module:
        if not blocks:
            return sew_resnet.sew_resnet18(
                cnf=connect, num_classes=CLASSES, spiking_neuron=kind, **options
            )
        return sew_resnet.SEWResNet(
            sew_resnet.BasicBlock,
            blocks,
            num_classes=CLASSES,
            cnf=connect,
            spiking_neuron=kind,
            **options,
        )

    return build


def vgg(kind: type[nn.Module], **options: Any) -> nn.Module:
    """spiking_vgg11_bn with a smaller classifier: its own has 123 million weights."""
    net = spiking_vgg.spiking_vgg11_bn(num_classes=CLASSES, spiking_neuron=kind, **options)
    net.avgpool = layer.AdaptiveAvgPool2d((1, 1))
    net.classifier[0], net.classifier[3], net.classifier[6] = (
        layer.Linear(512, 64),
        layer.Linear(64, 64),
        layer.Linear(64, CLASSES),
    )
    return net


def small(model: Callable[..., nn.Module], **sizes: Any) -> Callable[..., nn.Module]:
    def build(kind: type[nn.Module] | None, **options: Any) -> nn.Module:
        return model(**sizes, spiking_neuron=kind, **options)

    return build


RESNET18 = small(spiking_resnet.spiking_resnet18, num_classes=CLASSES)
RESNET50 = small(spiking_resnet.spiking_resnet50, num_classes=CLASSES)
CIFAR10 = small(parametric_lif_net.CIFAR10Net, channels=16)
GESTURE = small(parametric_lif_net.DVSGestureNet, channels=8)
OVER_TIME = {"T": TIME_STEPS, "num_classes": CLASSES}
MS_RESNET = small(ms_resnet.MSResNet, base_channels=16, layers=(3, 2, 2), **OVER_TIME)
MAX_RESNET = small(
    ms_resnet.MaxResNet,
    layers=(2, 2, 1),
    stage_channels=(16, 32, 32),
    base_channels=16,
    stem_stride=1,
    **OVER_TIME,
)
SPIKFORMER = small(
    spikformer.Spikformer,
    img_size_h=16,
    img_size_w=16,
    patch_size=4,
    embed_dims=64,
    num_heads=4,
    depths=4,
    **OVER_TIME,
)
SPIKE_DRIVEN = small(
    spike_driven_transformer.SpikeDrivenTransformer,
    embed_dims=64,
    num_heads=4,
    depths=4,
    pooling_stat="0011",
    **OVER_TIME,
)
QKFORMER = small(
    qkformer.QKFormer, embed_dims=64, num_heads=(2, 2, 4), depths=(1, 2, 3), **OVER_TIME
)
MAXFORMER = small(maxformer.MaxFormer, embed_dims=64, depths=(1, 2, 3), **OVER_TIME)
MAXFORMER_CIFAR = small(
    maxformer.MaxFormer, embed_dims=64, depths=(1, 1, 2), cifar=True, **OVER_TIME
)
MASNN = small(
    masnn.MASNN, input_size=(16, 16), channels=(16, 32), pools=(1, 2), reduction_t=3, **OVER_TIME
)
ATT_MS_RESNET = small(masnn.AttMSResNet, base_channels=16, layers=(2, 2, 2), **OVER_TIME)
IN_PLACE = {
    ("spiking_resnet18", "m"),
    ("spiking_resnet50", "m"),
}  # with residual sums that are written into a view
MODELS = (
    Model("spiking_resnet18", RESNET18, (3, 64, 64), 9.6, 1.1),
    Model("spiking_resnet50", RESNET50, (3, 32, 32), 8.2, 1.05),
    Model("sew_resnet18 ADD", sew("ADD"), (3, 64, 64), 9.4, 1.1),
    Model("sew_resnet18 AND", sew("AND"), (3, 64, 64), 9.7, 1.1, "s"),
    Model("sew_resnet18 IAND", sew("IAND"), (3, 64, 64), 9.7, 1.1, "m"),
    Model("SEWResNet ADD, a deep stage", sew("ADD", 9, 1, 1, 1), (3, 32, 32), 9.6, 1.75, "m"),
    Model("spiking_vgg11_bn", vgg, (3, 32, 32), 11.4, 1.1),
    Model("CIFAR10Net", CIFAR10, (3, 32, 32), 11.7, 1.1, neurons=PLIF),
    Model("DVSGestureNet", GESTURE, (2, 128, 128), 10.2, 1.55, neurons=PLIF),
    Model("MSResNet", MS_RESNET, (3, 32, 32), 6.1, 2.2, (OWN,)),
    Model("MaxResNet", MAX_RESNET, (3, 16, 16), 8.1, 2.8, (OWN,)),
    Model("Spikformer", SPIKFORMER, (3, 16, 16), 11, 4.7, (OWN,)),
    Model("SpikeDrivenTransformer", SPIKE_DRIVEN, (3, 32, 32), 10.6, 4.4, (OWN,)),
    Model("QKFormer", QKFORMER, (3, 32, 32), 10.3, 3.5, (OWN,)),
    Model("MaxFormer", MAXFORMER, (3, 32, 32), 8.3, 4, (OWN,)),
    Model("MaxFormer for CIFAR", MAXFORMER_CIFAR, (3, 16, 16), 9.6, 3.3, (OWN,)),
    Model("MASNN", MASNN, (2, 16, 16), 20.8, 1.5, (OWN,), threshold=0.02),
    Model("AttMSResNet", ATT_MS_RESNET, (3, 32, 32), 7, 2.3, (OWN,)),
)
BOUNDARY = pytest.mark.skipif(
    OLDER_TORCH, reason="an older torch does not tell what wrote into a view: a boundary"
)


def row(model: Model, mode: str) -> Any:
    return pytest.param(
        model,
        mode,
        id=f"{model.name}-{mode or 'own'}",
        marks=BOUNDARY if (model.name, mode) in IN_PLACE else (),
    )


ROWS = [row(each, mode) for each in MODELS for mode in each.modes]
# one mode of each model, in turns
IN_ONE_MODE = [row(each, each.modes[i % len(each.modes)]) for i, each in enumerate(MODELS)]
CONVERTED = [pytest.param(each, id=each.name) for each in MODELS if each.modes == (OWN,)]


def built(model: Model, kind: type[nn.Module] | None, mode: str) -> nn.Module:
    """The model, its norms' weights and biases not at the ones, zeros and halves that they start
    from."""
    torch.manual_seed(0)
    options = {} if kind is None else {"surrogate_function": surrogate.ATan(), "detach_reset": True}
    net = model.build(kind, v_threshold=model.threshold, **options)
    for each in net.modules():
        if isinstance(each, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(each.weight, 0.5, 1.5)
            nn.init.normal_(each.bias, 0.1, 0.1)
    if mode:
        functional.set_step_mode(net, mode)
    return net


def outputs_of(net: nn.Module, mode: str, images: Tensor) -> Tensor:
    """``[N, classes]``, the mean over time, from rest."""
    functional.reset_net(net)
    torch.manual_seed(2)  # for dropout
    if mode == "s":
        return torch.stack([net(images) for _ in range(TIME_STEPS)]).mean(0)
    outputs = net(images.expand(TIME_STEPS, *images.shape) if mode == "m" else images)
    return outputs if outputs.dim() == 2 else outputs.mean(0)


def observe(net: nn.Module, mode: str, image: tuple[int, int, int]) -> Observed:
    """A training step: all spikes, the outputs, the running statistics and the gradients."""
    seen, spikes = Observed(), []
    neurons = [each for each in net.modules() if isinstance(each, neuron.BaseNode)]
    hooks = [
        each.register_forward_hook(lambda module, inputs, output: spikes.append(output.detach()))
        for each in neurons
    ]
    images = images_of(image)
    outputs = outputs_of(net, mode, images)
    loss_of(outputs).backward()
    for each in hooks:
        each.remove()
    seen.exact = {f"spikes {i}": each for i, each in enumerate(spikes)} | {
        "outputs": outputs.detach()
    }
    seen.exact |= dict(net.named_buffers())
    for name, each in net.named_modules():
        own = [parameter.grad.flatten() for parameter in each.parameters(recurse=False)]
        # a layer's together: a bias in front of a batch norm has no gradient but the rounding of
        # its layer's
        if own:
            seen.gradients[name] = torch.cat(own)
    return seen


def images_of(image: tuple[int, int, int]) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(BATCH, *image)


def loss_of(outputs: Tensor) -> Tensor:
    return F.cross_entropy(outputs, torch.arange(len(outputs)))


def assert_no_boundary(net: nn.Module) -> None:
    neurons = [each for each in net.modules() if isinstance(each, ReversibleNeuron)]
    assert len(neurons) == len(explain(net).rows)
    for row in explain(net).rows:
        assert row.calls and not row.fallback_calls and not row.left and not row.boundaries, str(
            row
        )
        assert row.steps_between_anchors is None or row.steps_between_anchors > 1, str(row)


@pytest.mark.usefixtures("recompute_everything")  # the last layer has few neurons
@pytest.mark.parametrize(("model", "mode"), ROWS)
def test_trains_as_the_host(model: Model, mode: str) -> None:
    host, ours = (built(model, kind, mode) for kind in model.neurons)
    seen = observe(host, mode, model.image)
    fired = [each.mean().item() for name, each in seen.exact.items() if name.startswith("spikes")]
    assert sum(share > 0.01 for share in fired) > 0.8 * len(fired), fired
    assert_agree(seen, observe(ours, mode, model.image))
    assert_no_boundary(ours)
    assert host.state_dict().keys() == ours.state_dict().keys()


@pytest.mark.parametrize("model", CONVERTED)
def test_trains_as_the_host_when_converted(model: Model) -> None:
    """With the neurons that the model's paper chose, but for the threshold."""
    host, ours = (built(model, None, OWN) for _ in range(2))
    report = snn_revplugin.convert(ours)
    assert report.swapped and not report.left
    assert_agree(observe(host, OWN, model.image), observe(ours, OWN, model.image))
    assert_no_boundary(ours)


@pytest.mark.parametrize(("model", "mode"), IN_ONE_MODE)
def test_holds_less(model: Model, mode: str) -> None:
    images, reports = images_of(model.image), []
    for kind in model.neurons:
        net = built(model, kind, mode)
        for each in net.parameters():
            each.grad = torch.zeros_like(each)
        reports.append(memory_report(lambda net=net: loss_of(outputs_of(net, mode, images))))
        functional.reset_net(net)
    host, ours = reports
    assert host.retained >= model.retained * ours.retained
    assert host.peak >= model.peak * ours.peak

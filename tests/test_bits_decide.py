"""No spike and no reset is decided again in backward. Recomputed convolutions may differ in the
last places (another cuDNN algorithm), or by more (TF32); with the kept bits that costs gradients of
the same size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from hosts import only_pure
from spikingjelly.activation_based import layer, neuron, surrogate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from snn_revplugin import convert
from snn_revplugin.torch_internals import backward_pass, capture

OFF, ALLOWED, T = 1e-5, 3e-4, 12
# As far off as TF32, over several anchors. Step mode 'm', which reverses nothing, is 0.015 off.
FAR_OFF, ALLOWED_THEN, LONG = 1e-3, 0.02, 40


class OtherConvolutions(TorchDispatchMode):
    """Convolutions that are recomputed in a backward pass come out a little off."""

    def __init__(self, off: float) -> None:
        super().__init__()
        self.factor, self.recomputed = 1 + off, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        in_backward = backward_pass.current_pass() != backward_pass.NO_PASS
        if in_backward and func is torch.ops.aten.convolution.default:
            self.recomputed += 1
            out = out * self.factor
        return out


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor]:
    net.zero_grad(set_to_none=True)
    loss.backward()
    return [each.grad.clone() for each in net.parameters() if each.grad is not None]


def assert_rounding(net: nn.Module, run, off: float = OFF, allowed: float = ALLOWED) -> None:
    exact = gradients(net, run())
    loss = run()
    with OtherConvolutions(off) as mode:
        found = gradients(net, loss)
    assert mode.recomputed > 0
    largest = max(each.abs().max() for each in exact)
    for a, b in zip(exact, found, strict=True):
        scale = a.abs().max() if a.numel() > 1 else largest  # a single number may cancel
        assert ((a - b).abs().max() / scale).item() <= allowed


def spikingjelly_net(
    mode: str, v_reset: float | None, norm: bool, kind: type[nn.Module], steps: int = T
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A converted net, and a forward of it to a loss."""
    torch.manual_seed(3)

    def node() -> nn.Module:
        options = {"v_reset": v_reset, "surrogate_function": surrogate.ATan(), "step_mode": mode}
        return kind(v_threshold=1.0 if norm else 0.3, **options)

    def block(channels: int) -> list[nn.Module]:
        conv = layer.Conv2d(channels, 8, 3, padding=1, bias=not norm, step_mode=mode)
        return [conv, *([layer.BatchNorm2d(8, step_mode=mode)] if norm else []), node()]

    net = nn.Sequential(*block(2), *block(8), *block(8))
    with torch.no_grad():  # without a norm the currents need some strength
        for each in net:
            if isinstance(each, layer.Conv2d) and not norm:
                each.weight.mul_(3)
    convert(net)
    x = torch.rand(steps, 2, 2, 12, 12)
    weight = torch.linspace(-1, 2, steps * 2 * 8 * 144).view(steps, 2, 8, 12, 12)

    def run() -> Tensor:
        for each in net:
            if hasattr(each, "reset"):
                each.reset()
        out = net(x) if mode == "m" else torch.stack([net(frame) for frame in x])
        assert 0.02 < (out != 0).float().mean() < 0.98
        return (out * weight).sum()

    return net, run


def snntorch_net(delay: bool, reset: str, steps: int = T) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A converted net, and a forward of it to a loss."""
    torch.manual_seed(3)
    options = {"beta": 0.8, "reset_mechanism": reset, "reset_delay": delay, "init_hidden": True}
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), snn.Leaky(**options),
        nn.Conv2d(8, 8, 3, padding=1), snn.Leaky(**options),
    )  # fmt: skip
    with torch.no_grad():
        net[2].weight.mul_(3)
    convert(net)
    x, weight = torch.rand(steps, 2, 2, 12, 12) * 3, torch.linspace(-1, 2, 2 * 8 * 144)

    def run() -> Tensor:
        for lif in (net[1], net[3]):
            lif.reset_mem()
        return sum(
            (net(frame) * (t + weight.view(2, 8, 12, 12))).sum() for t, frame in enumerate(x)
        )

    return net, run


@only_pure
@pytest.mark.parametrize("kind", [neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("v_reset", [None, 0.0])
@pytest.mark.parametrize("mode", ["s", "m"])
def test_spikingjelly(mode: str, v_reset: float | None, norm: bool, kind: type[nn.Module]) -> None:
    assert_rounding(*spikingjelly_net(mode, v_reset, norm, kind))


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("delay", [True, False])
def test_snntorch(delay: bool, reset: str) -> None:
    assert_rounding(*snntorch_net(delay, reset))


@pytest.fixture(params=["compared", "not compared"])
def values(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether values may be compared at once, as on a CPU, or not, as on a GPU."""
    if request.param == "not compared":
        monkeypatch.setattr(capture, "may_compare", lambda tensor: False)


@only_pure
@pytest.mark.parametrize("kind", [neuron.LIFNode, neuron.ParametricLIFNode])
def test_anchors_do_not_mend_what_is_far_off(values: None, kind: type[nn.Module]) -> None:
    """A residue would take a potential that is off by more than its grid for another one, and the
    error would grow from anchor to anchor: it is noticed, and the stretch is rebuilt."""
    assert_rounding(*spikingjelly_net("s", None, True, kind, LONG), FAR_OFF, ALLOWED_THEN)


def test_anchors_of_snntorch_do_not_mend_what_is_far_off(values: None) -> None:
    assert_rounding(*snntorch_net(True, "subtract", LONG), FAR_OFF, ALLOWED_THEN)

"""The memory report by layer agrees with the plain one, and names the layer at the peak."""

import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from either_host import clear
from hosts import only_pure
from spikingjelly.activation_based import neuron
from torch import Tensor
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

from snn_revplugin import convert, memory_report
from snn_revplugin.cli.workloads import HOST, OURS, WORKLOADS, CheckpointedBlock, in_blocks
from snn_revplugin.report.timeline import AFTER, BACKWARD, FORWARD, ITSELF, OUTSIDE, LayerReport

T = 3
LARGE = 2**18  # elements; 1 MiB


def step_of(work: str, whose: str, in_checkpoints: bool = False) -> Callable[[], Tensor]:
    """A training step of a real net on 8 images, with fresh gradients."""
    workload = WORKLOADS[work]
    net, batch = workload.build(whose), workload.data(8)
    if in_checkpoints:
        in_blocks(net, CheckpointedBlock)

    def step() -> Tensor:
        net.zero_grad()
        return workload.loss(net(batch.images, T), batch.classes)

    step()
    return step


def sums_up(report: LayerReport) -> bool:
    """Whether the layers' bytes add up to those of the report."""
    return (
        sum(each.retained for each in report.layers) == report.retained
        and sum(each.at_peak for each in report.layers) == report.peak
        and sum(each.nbytes for each in report.standing) == report.peak
        and max(each.peak for each in report.timeline) == report.peak == report.peak_at.peak
    )


@pytest.mark.parametrize("whose", [HOST, OURS])
@pytest.mark.parametrize("work", ["digits-snntorch", "digits-spikingjelly"])
def test_layers_add_up_to_the_plain_report(work: str, whose: str) -> None:
    step = step_of(work, whose)
    plain, report = memory_report(step), memory_report(step, by="layer")
    assert (report.retained, report.peak, report.left) == (plain.retained, plain.peak, plain.left)
    assert sums_up(report)
    if work == "digits-snntorch":
        order = [each.name for each in report.layers]
        assert order == ["conv1", "lif1", "conv2", "lif2", "fc1", "lif3", ITSELF, OUTSIDE]
    of_neurons = [each for each in report.layers if each.kind.endswith(("Leaky", "LIFNode"))]
    assert [each.calls for each in of_neurons] == (
        [T] * 3 if work == "digits-snntorch" else [1] * 4
    )
    assert all(each.forward and each.backward for each in of_neurons)
    assert not [each for each in report.layers if "surrogate" in each.name]  # is its neuron's


@pytest.mark.parametrize(
    "make", [neuron.QIFNode, partial(snn.Alpha, alpha=0.9, beta=0.8, init_hidden=True)]
)
def test_a_neuron_by_its_own_step_is_one_layer(make: Callable[[], nn.Module]) -> None:
    """Its step runs again in backward, on a copy where it has to."""
    net = nn.Sequential(nn.Linear(64, 512), make(), nn.Linear(512, 2))
    assert convert(net).swapped

    def step() -> Tensor:
        clear(net[1])
        return sum(net(torch.ones(16, 64)).sum() for _ in range(T))

    report = memory_report(step, by="layer")
    assert sums_up(report)
    assert [each.name for each in report.layers] == ["0", "1", "2", OUTSIDE]


@only_pure
@pytest.mark.parametrize("whose", [HOST, OURS])
def test_a_checkpointed_block_runs_forward_in_backward(whose: str) -> None:
    report = memory_report(step_of("digits-spikingjelly", whose, True), by="layer")
    assert sums_up(report)
    conv = report.layer("layers.1.0")
    assert (conv.kind, conv.calls) == ("Conv2d", 1)
    made = {(each.operation, each.layer, each.phase) for each in report.standing}
    assert ("convolution", "layers.1.0", BACKWARD) in made


class Wasteful(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, in_forward: bool, in_backward: bool) -> Tensor:
        ctx.in_backward = in_backward
        if in_forward:
            torch.ones(LARGE)
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.in_backward:
            torch.ones(LARGE)
        return grad, None, None


class WastesAt(nn.Module):
    """Holds a large tensor for a moment, in one call and phase."""

    def __init__(self, call: int, phase: str) -> None:
        super().__init__()
        self.call, self.phase, self.calls = call, phase, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        here = self.calls == self.call
        return Wasteful.apply(x, here and self.phase == FORWARD, here and self.phase == BACKWARD)


class Loop(nn.Module):
    """A time loop of a linear layer, what wastes, and a second linear layer."""

    def __init__(self, call: int, phase: str) -> None:
        super().__init__()
        self.first, self.wastes, self.last = nn.Linear(4, 4), WastesAt(call, phase), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return sum(self.last(self.wastes(self.first(x))).sum() for _ in range(4))


@pytest.mark.parametrize("phase", [FORWARD, BACKWARD])
def test_the_peak_is_named(phase: str) -> None:
    net = Loop(call=2, phase=phase)
    report = memory_report(lambda: net(torch.ones(2, 4)), by="layer")
    at = report.peak_at
    assert (at.layer, at.phase, at.call, report.peak_operation) == ("wastes", phase, 2, "ones")
    assert report.peak - 4 * LARGE < 1024 > 4 * LARGE - at.transient
    largest = report.standing[0]
    assert (largest.layer, largest.phase, largest.shape) == ("wastes", phase, (LARGE,))
    assert (largest.dtype, largest.count, largest.nbytes) == ("float32", 1, 4 * LARGE)
    words = f"the peak is in the {phase} of wastes (WastesAt), call 2 of 4, in ones"
    assert words in str(report)
    assert f"1.0 MiB: {LARGE} float32, ones in the {phase} of wastes" in str(report)


def test_what_runs_outside_of_modules_and_after_a_backward_is_told() -> None:
    first, second = nn.Linear(64, 64), nn.Linear(64, 1)
    optimiser = torch.optim.SGD([*first.parameters(), *second.parameters()], 0.1, momentum=0.9)

    def step() -> None:
        second(first(torch.ones(8, 64))).sum().backward()
        optimiser.step()

    report = memory_report(step, by="layer")
    assert sums_up(report)
    names = [each.name for each in report.layers]
    assert names == ["Linear", "Linear 2", OUTSIDE]  # of two nets, none with a name
    assert report.timeline[-1].phase == AFTER
    outside = report.layer(OUTSIDE)
    assert (outside.kind, outside.calls) == ("", 0)
    with pytest.raises(KeyError, match="Linear 3"):
        report.layer("Linear 3")


def test_a_module_in_another_thread_or_in_a_hook_is_no_layer() -> None:
    net, other = nn.Linear(4, 1), nn.ReLU()

    def step() -> Tensor:
        thread = threading.Thread(target=other, args=(torch.ones(4),))
        thread.start()
        thread.join()
        y = net(torch.ones(2, 4))
        y.register_hook(other)
        return y.sum()

    assert [each.name for each in memory_report(step, by="layer").layers] == [ITSELF, OUTSIDE]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_hooks_are_gone_after_a_step(use_reentrant: bool) -> None:
    net = Loop(2, FORWARD)

    def fails() -> Tensor:
        x = torch.ones(2, 4, requires_grad=True)
        checkpoint(net, x, use_reentrant=use_reentrant).backward()
        return net(torch.ones(1, 5))  # a wrong shape

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        memory_report(fails, by="layer")
    assert not torch_module._global_forward_hooks
    assert not torch_module._global_forward_pre_hooks


def test_host_and_ours_stand_in_one_table_and_one_picture(tmp_path: Path) -> None:
    file = tmp_path / "memory.png"
    host = memory_report(step_of("digits-spikingjelly", HOST), by="layer", plot=file)
    alone = file.read_bytes()
    both = memory_report(
        step_of("digits-spikingjelly", OURS), by="layer", host=host, plot=str(file)
    )
    assert alone.startswith(b"\x89PNG") and file.read_bytes().startswith(b"\x89PNG")
    assert both.host is host and both.peak < host.peak
    lines = str(both).splitlines()
    assert lines[0] == "host:" and lines.count("ours:") == 1
    assert len([each for each in lines if each.startswith("layers.0 ")]) == 2


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"by": "module"}, ValueError, "by must be None or 'layer', got 'module'"),
        ({"plot": "memory.png"}, ValueError, "plot needs by='layer'"),
        ({"host": None, "by": "layer", "plot": "a.png"}, ImportError, r"snn-revplugin\[cli\]"),
        ({"by": "layer", "host": "plain"}, TypeError, "host must be a report by layer"),
    ],
)
def test_a_wrong_choice_is_refused_before_the_step_runs(
    choices: dict, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # not installed
    with pytest.raises(error, match=message):
        memory_report(lambda: pytest.fail("the step ran"), **choices)


@pytest.mark.gpu
def test_layers_of_a_cuda_device() -> None:
    net = Loop(2, BACKWARD).cuda()
    x = torch.ones(2, 4, device="cuda")
    net(x).backward()  # a first step, for workspaces
    net.zero_grad()
    net.wastes.calls = 0
    report = memory_report(lambda: net(x), by="layer", device="cuda")
    assert (report.peak_at.layer, report.peak_at.phase) == ("wastes", BACKWARD)
    assert report.peak >= report.peak_at.peak == sum(each.at_peak for each in report.layers)

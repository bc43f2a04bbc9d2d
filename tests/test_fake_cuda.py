"""What the hosts' models build on CUDA, seen without a device: ``FakeTensorMode`` builds the graph
of a forward over tensors without memory, by CUDA's rules. The table must know each node between two
neurons, by its name and by the names of what it saves.
"""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
from hosts import PURE
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode

from snn_revplugin.adapters.spikingjelly import RevLIFNode
from snn_revplugin.cli.comparison import Setup
from snn_revplugin.cli.workloads import HOST, Workload
from snn_revplugin.replay import OPERATIONS, operation_of
from snn_revplugin.replay.operations.pointwise import dropout_scale

pytestmark = pytest.mark.skipif(
    not PURE or torch.version.cuda is None,
    reason="without SpikingJelly 2 and a build of torch for CUDA there are no such graphs",
)
if PURE:
    from test_spikingjelly_models import MODELS, OWN, built, outputs_of

TUTORIALS = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "models_snntorch.py"))[
    "MODELS"
]
# nodes that only CUDA has, by what builds one
ONLY_ON_CUDA = {
    "CudnnBatchNormBackward0": lambda x: torch.cudnn_batch_norm(
        x, *torch.ones(4, x.shape[1]), True, 0.1, 1e-5
    ),
    "ScaledDotProductFlashAttentionBackward0": lambda x: (
        torch.ops.aten._scaled_dot_product_flash_attention(x, x, x)
    ),
    "ScaledDotProductEfficientAttentionBackward0": lambda x: (
        torch.ops.aten._scaled_dot_product_efficient_attention(x, x, x, None, True)
    ),
    "ScaledDotProductCudnnAttentionBackward0": lambda x: (
        torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)
    ),
}
BOUNDARIES = {
    "ThnnFusedLstmCellBackward0": lambda x: nn.LSTMCell(32, 8)(x.flatten(0, 2)),
}


@contextmanager
def fake_cuda(half: bool = False) -> Iterator[None]:
    """Tensors are made on a fake CUDA device; with ``half`` under autocast, which without a device
    cannot be entered by ``torch.autocast``."""
    with FakeTensorMode(), torch.device("cuda"):
        torch.set_autocast_enabled("cuda", half)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()


def moved(net: nn.Module) -> nn.Module:
    """A net with fake parameters and buffers in the place of its own."""
    for module in net.modules():
        for tensors in (module._parameters, module._buffers):
            for name, each in tensors.items():
                if each is not None:
                    fake = torch.empty(each.shape, dtype=each.dtype)
                    learned = isinstance(each, nn.Parameter)
                    tensors[name] = nn.Parameter(fake, each.requires_grad) if learned else fake
    return net


def nodes_of(outputs: Tensor) -> list[torch.autograd.graph.Node]:
    found, waiting = {}, [outputs.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = None
            waiting += [below for below, _ in node.next_functions]
    return list(found)


def assert_known(nodes: list[torch.autograd.graph.Node]) -> None:
    """The table has each node, with the names of what the node saves. Functions written in Python
    are left out: the hosts' neurons and surrogates."""
    kinds = {type(each) for each in nodes if not isinstance(each, BackwardCFunction)}
    assert {each.__name__ for each in kinds} - OPERATIONS.keys() == {"AccumulateGrad"}
    for kind in kinds:
        assert_names(kind)


def assert_names(kind: type) -> None:
    operation = OPERATIONS.get(kind.__name__)
    if operation is not None:
        names = *(each for each in operation.inputs if each is not None), *operation.outputs
        for name in names:
            assert hasattr(kind, f"_saved_{name}"), (kind.__name__, name)


# every model once, in float32 and under autocast by turns
@pytest.mark.parametrize(
    ("model", "half"),
    [
        pytest.param(each, bool(i % 2), id=f"{each.name}-{'autocast' if i % 2 else 'float32'}")
        for i, each in enumerate(MODELS)
    ],
)
def test_spikingjellys_models(model: Any, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # The host writes it to its log.
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "fake")
    mode = model.modes[-1]
    net = built(model, None if mode == OWN else model.neurons[0], mode)
    with fake_cuda(half):
        outputs = outputs_of(moved(net), mode, torch.rand(2, *model.image))
    nodes = nodes_of(outputs)
    names = {type(each).__name__ for each in nodes}
    assert "CudnnBatchNormBackward0" in names and ("ToCopyBackward0" in names) == half
    assert_known(nodes)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("workload", [pytest.param(each, id=each.name) for each, _ in TUTORIALS])
def test_networks_of_snntorchs_tutorials(workload: Workload, half: bool) -> None:
    net = Setup.usual(workload, time_steps=3, batch=2).net(HOST)
    with fake_cuda(half):
        outputs = moved(net)(torch.rand(2, *workload.image), 3)
    assert_known(nodes_of(outputs))


@pytest.mark.parametrize("name", [*ONLY_ON_CUDA, *BOUNDARIES])
def test_nodes_that_only_cuda_has(name: str) -> None:
    with fake_cuda():
        x = torch.rand(2, 4, 16, 32, requires_grad=True)
        outputs = (ONLY_ON_CUDA | BOUNDARIES)[name](x)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        node = outputs.grad_fn
        assert type(node).__name__ == name
        if name in BOUNDARIES:
            assert operation_of(node) is None
            return
        assert_names(type(node))
        operation = operation_of(node)
        absent = operation.absent(node)
        operands = [None if i in absent else x for i in range(len(operation.inputs))]
        if name == "CudnnBatchNormBackward0":
            operands[1:] = torch.ones(2, x.shape[1])
        with torch.no_grad():
            again = operation.replay(node)(*operands)
        again = again[0] if isinstance(again, tuple) else again
        assert (again.shape, again.dtype, again.stride()) == (x.shape, x.dtype, outputs.stride())


@pytest.mark.parametrize("kind", ["Flash", "Efficient", "Cudnn"])
def test_attention_with_dropout_is_a_boundary(kind: str) -> None:
    function = getattr(torch.ops.aten, f"_scaled_dot_product_{kind.lower()}_attention")
    with fake_cuda():
        x = torch.rand(2, 4, 16, 32, requires_grad=True)
        bias = () if kind == "Flash" else (None, True)
        node = function(x, x, x, *bias, 0.1)[0].grad_fn
        assert operation_of(node).replay(node) is None


SURROGATES = {
    "ATan": surrogate.ATan, "Sigmoid": surrogate.Sigmoid, "Erf": surrogate.Erf,
    "Rect": surrogate.Rect, "S2NN": surrogate.S2NN, "LeakyKReLU": surrogate.LeakyKReLU,
}  # fmt: skip


class Divisions(TorchDispatchMode):
    """Counts divisions by a Python number, which torch computes on CUDA as products with its
    reciprocal, and those by a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.by_number = self.by_tensor = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.overloadpacket is torch.ops.aten.div:
            is_number = not isinstance(args[1], Tensor)
            self.by_number, self.by_tensor = (
                self.by_number + is_number,
                self.by_tensor + (not is_number),
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", SURROGATES)
def test_a_leak_divides_where_the_hosts_does(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "fake")
    options = {"tau": 3.0, "surrogate_function": SURROGATES[name](), "step_mode": "m"}
    ours = RevLIFNode(**options)._build()
    with fake_cuda():
        x = torch.rand(2, 4, 6, dtype=dtype, requires_grad=True)
        host = type(neuron.LIFNode(**options)(x).grad_fn).__name__
        runs_fused = host.startswith("GeneratedBackwardFor_sj_lif")
        with Divisions() as divisions, torch.no_grad():
            ours.charge(x[0], torch.zeros_like(x[0]))
    assert (divisions.by_tensor, divisions.by_number) == (runs_fused, not runs_fused)
    assert ours.kernel_spec(dtype, dtype, on_cuda=True).divides == runs_fused


def test_spikes_keep_the_strides_that_the_hosts_have() -> None:
    """Its kernels keep those of the currents; its torch code stacks the steps' spikes."""
    with fake_cuda():
        x = torch.rand(3, 2, 5, 6, 4).permute(0, 1, 4, 2, 3)  # channels_last in each step
        contiguous = torch.empty(x.shape)
        for name, keeps in (("ATan", True), ("Rect", False)):
            options = {"surrogate_function": SURROGATES[name](), "step_mode": "m"}
            laid_out = RevLIFNode(**options)._build().laid_out(contiguous, x)
            expected = neuron.LIFNode(**options)(x) if keeps else contiguous
            assert laid_out.stride() == expected.stride()
            assert (laid_out.stride() == x.stride()) == keeps


def test_the_scale_of_a_dropout_is_the_kernels() -> None:
    """One ulp of every current at 15 of 99 rates, otherwise."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    rates = [i / 100 for i in range(1, 100)]
    kernels = [float(np.float32(1) / np.float32(1 - p)) for p in rates]
    assert [dropout_scale(p, torch.float32, cuda) for p in rates] == kernels
    on_cpu = [np.float32(dropout_scale(p, torch.float32, cpu)) for p in rates]
    assert sum(a != np.float32(b) for a, b in zip(on_cpu, kernels, strict=True)) == 15
    assert dropout_scale(0.3, torch.float64, cuda) == 1 / (1 - 0.3)

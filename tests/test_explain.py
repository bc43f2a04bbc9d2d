"""``explain`` says what is kept, what is recomputed, and why anything is not."""

import pytest
import snntorch
import torch
import torch.nn as nn
from snntorch._neurons.leakykernel import LeakyKernel
from spikingjelly.activation_based import layer, neuron
from torch import Tensor

from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.adapters.spikingjelly import RevLIFNode
from snn_revplugin.replay import OPERATIONS
from snn_revplugin.report.explain import Account, explain
from snn_revplugin.report.memory import memory_report
from snn_revplugin.settings import use_settings
from snn_revplugin.swap import module


class Halved(torch.autograd.Function):
    """An operation that no table knows."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x / 2

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad / 2


def leaky(**arguments: object) -> RevLeaky:
    return RevLeaky(beta=0.9, init_hidden=True, **arguments)


def rows(net: nn.Module) -> dict[str, Account]:
    return {row.name: row for row in explain(net).rows}


def test_a_neuron_in_a_time_loop():
    net = nn.Sequential(nn.Conv1d(1, 8, 3), nn.MaxPool1d(2), leaky())
    for _ in range(40):
        net(torch.rand(4, 1, 18))
    (row,) = explain(net).rows
    assert (row.name, row.kind) == ("2", "RevLeaky")
    assert (row.calls, row.steps, row.fallback_calls) == (40, 40, 0)
    assert row.bits_per_spike == 1.0
    assert 1 < row.steps_between_anchors < 40
    assert 1 / 8 < row.bytes_per_neuron_step < 1
    assert {"convolution", "max pool 2d"} <= set(row.recomputed)
    assert row.recomputed["convolution"] == 40
    assert not row.boundaries and not row.reasons
    text = str(row)
    assert "1 bit per spike" in text
    assert f"an anchor every {row.steps_between_anchors} steps" in text
    assert "recomputed: " in text and "convolution" in text


def test_a_neuron_that_scans_a_whole_sequence():
    net = nn.Sequential(layer.Conv1d(1, 8, 3, step_mode="m"), RevLIFNode(step_mode="m"))
    net(torch.rand(5, 4, 1, 18))
    (row,) = explain(net).rows
    assert (row.calls, row.steps, row.steps_between_anchors) == (1, 5, None)
    assert row.bytes_per_neuron_step == 1 / 8
    assert "the first potential of a sequence: 0.125 bytes per neuron and step" in str(row)


def test_every_neuron_goes_by_the_name_of_its_module():
    net = nn.ModuleDict({"a": leaky(), "block": nn.Sequential(leaky(), leaky())})
    assert list(rows(net)) == ["a", "block.0", "block.1"]
    assert rows(leaky()).keys() == {""}
    assert str(explain(leaky())).startswith("(the module itself): RevLeaky")


def test_a_neuron_that_was_never_called_says_so():
    assert "never called" in str(explain(nn.Sequential(leaky())))


def test_a_boundary_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.first, self.second = nn.Conv1d(1, 4, 3), leaky(), leaky()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(Halved.apply(self.first(self.conv(x)).sinh()))

    net = Net()
    net(torch.rand(2, 1, 10))
    assert not rows(net)["first"].boundaries
    assert "Halved (an autograd Function)" in rows(net)["second"].boundaries
    assert "not recomputed, activations kept: Halved (an autograd Function)" in str(explain(net))
    assert rows(net)["second"].steps_between_anchors == 1


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: leaky(spike_grad=torch.sigmoid), "the surrogate is no Heaviside step"),
        (lambda: leaky(reversible=False), "switched off"),
    ],
)
def test_the_reason_for_the_host_path_is_told(make, reason: str):
    net = nn.Sequential(nn.Linear(3, 3), make())
    net(torch.rand(2, 3))
    net(torch.rand(2, 3))
    (row,) = explain(net).rows
    assert (row.calls, row.fallback_calls) == (0, 2)
    assert "never called" not in str(row)
    assert f"the host's own path, 2 calls: {reason}" in str(row)


def test_calls_without_a_gradient_stand_beside_those_with_one():
    net = nn.Sequential(nn.Linear(3, 3), leaky())
    net(torch.rand(2, 3))
    with torch.no_grad():
        net(torch.rand(2, 3))
    (row,) = explain(net).rows
    assert (row.calls, row.fallback_calls) == (1, 1)
    assert row.reasons == {"no gradient is recorded": 1}


def test_neurons_of_the_host_are_told_apart():
    net = nn.Sequential(
        snntorch.Leaky(0.9), LeakyKernel(3, 4), neuron.LIFNode(), nn.ReLU(), leaky()
    )
    told = rows(net)
    assert list(told) == ["0", "1", "2", "4"]
    assert "convert" in told["0"].left and "convert" in told["2"].left
    assert told["1"].left == "LeakyKernel has no reversible counterpart"
    assert "not reversible: LeakyKernel has no reversible counterpart" in str(explain(net))
    assert told["4"].left == ""


@pytest.mark.filterwarnings("ignore")
def test_a_neuron_that_was_compiled_on_the_hosts_path(monkeypatch: pytest.MonkeyPatch):
    """As with a torch whose compiler does not trace the operators."""
    monkeypatch.setattr(module, "HAS_COMPILER", False)
    torch.compiler.reset()
    for neurons in (leaky(), RevLIFNode()):
        net = nn.Sequential(nn.Linear(3, 3), neurons)
        torch.compile(net, backend="eager")(torch.rand(2, 3)).sum().backward()
        (row,) = explain(net).rows
        assert row.compiled_fallback and not row.is_reversible
        assert "compiled, on the host's own path: " in str(row)
        assert "never called" not in str(row)


def test_a_net_without_neurons():
    assert explain(nn.Linear(1, 1)).rows == ()
    assert str(explain(nn.Linear(1, 1))) == "no spiking neuron of a known host"


def test_only_a_module_can_be_explained():
    with pytest.raises(TypeError, match=r"net must be a torch\.nn\.Module, got list"):
        explain([leaky()])


def test_names_of_operations_read_like_words():
    from snn_revplugin.report.explain import operation_name

    for node in OPERATIONS:
        assert "Backward" not in operation_name(node)
        assert operation_name(node) == operation_name(node).lower()


@pytest.mark.parametrize("lost_bits", [0, 4])
def test_the_bytes_told_are_the_bytes_held(lost_bits: float):
    """Twenty steps more cost as many bytes more as the account of those steps says."""

    def measure(time_steps: int) -> tuple[int, float]:
        torch.manual_seed(0)
        conv, lif = nn.Conv1d(1, 64, 3), leaky(output=True)
        x = torch.rand(16, 1, 34)

        def step() -> Tensor:
            for _ in range(time_steps):
                _, mem = lif(conv(x))
            return mem.sum()

        with use_settings(lost_bits=lost_bits):
            retained = memory_report(step).retained
        (row,) = explain(lif).rows
        return retained, row.bytes_per_neuron_step * row.steps * 16 * 64 * 32

    (some, told_of_some), (more, told_of_more) = measure(20), measure(40)
    assert more - some == pytest.approx(told_of_more - told_of_some, rel=0.05)


class WeightSigns(torch.autograd.Function):
    """A quantiser outside of the table, which saves a mask at each step."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        ctx.save_for_backward((weight.abs() < 0.1).to(weight.dtype))
        return weight.sign() * 0.1

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


class Recurrent(nn.Module):
    """Two layers in a time loop that keeps what the test asks for."""

    def __init__(self, between=lambda s: s, weight=lambda w: w, behind=lambda s, v: s) -> None:
        super().__init__()
        self.between, self.weight, self.behind = between, weight, behind
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 32)
        self.below, self.above = (RevLeaky(beta=0.9, threshold=0.3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        u, v, out = self.below.reset_mem(), self.above.reset_mem(), []
        for _ in range(STEPS):
            spikes, u = self.below(self.first(x), u)
            current = nn.functional.linear(self.between(spikes), self.weight(self.second.weight))
            spikes, v = self.above(current, v)
            out.append(self.behind(spikes, v).sum())
        return torch.stack(out).sum()


STEPS, BATCH = 20, 24
LAYER = BATCH * 32 * 4  # bytes of the spikes of a layer and time step, as floats
WEIGHT = 32 * 32 * 4
KEPT = {
    "nothing": (Recurrent, {}),
    "an unknown operation": (
        lambda: Recurrent(between=lambda s: torch.sinc(s * 0.7)),
        {"sinc": STEPS * LAYER},  # its output
    ),
    "noise": (
        lambda: Recurrent(between=lambda s: s * torch.rand_like(s)),
        {"constant operands": STEPS * LAYER},
    ),
    "a quantised weight": (
        lambda: Recurrent(weight=WeightSigns.apply),
        {"WeightSigns (an autograd Function)": (STEPS + 1) * WEIGHT},  # masks, and one weight
    ),
    "a weight recomputed": (lambda: Recurrent(weight=lambda w: w / w.abs().max()), {}),
    "a reader of spikes": (
        lambda: Recurrent(behind=lambda s, v: s.square()),
        {"spikes that readers behind a neuron keep": STEPS * LAYER},
    ),
    "a reader of potentials": (
        lambda: Recurrent(behind=lambda s, v: v.square()),
        {"states that code behind a neuron keeps": (STEPS - 1) * LAYER},  # the neuron keeps one
    ),
}


@pytest.mark.parametrize(("build", "kept"), KEPT.values(), ids=KEPT)
def test_the_bytes_of_a_step_by_cause(build, kept: dict[str, int]):
    """They add up to what ``memory_report`` measures."""
    torch.manual_seed(0)
    net, x = build(), torch.rand(BATCH, 16)
    net(x).backward()
    explanation = explain(net, lambda: net(x))
    always = {"spikes as bits", "membrane potentials"}
    assert {cause: explanation.kept.get(cause) for cause in kept} == kept
    assert explanation.kept.keys() == kept.keys() | always
    measured = memory_report(lambda: net(x))
    assert explanation.report == measured
    assert sum(explanation.kept.values()) + explanation.not_attributed == measured.retained
    assert abs(explanation.not_attributed) < 0.03 * measured.retained
    last = str(explanation).splitlines()[-1]
    assert last.startswith("one training step retains ") and "not attributed" in last
    assert all(cause in last for cause in kept)


def test_the_bytes_that_a_neuron_keeps_stand_in_its_row():
    net = Recurrent(between=torch.sinc)
    net(torch.rand(BATCH, 16)).backward()
    assert not rows(net)["below"].kept_bytes
    assert rows(net)["above"].kept_bytes == {"sinc": STEPS * LAYER}
    assert "activations kept: sinc 60.0 KiB" in str(explain(net))
    assert explain(net).report is None and not explain(net).kept


def test_small_tensors_are_counted():
    net = nn.Sequential(nn.Linear(3, 4), leaky(), nn.Linear(4, 4), leaky())
    with use_settings(recompute_min_bytes=1024):
        explanation = explain(net, lambda: [net(torch.rand(2, 3)) for _ in range(5)][-1].sum())
    assert explanation.kept["small tensors"] > 0

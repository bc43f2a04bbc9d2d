"""Time steps of a small layer that backward recomputes together: gradients are the host's, the
calls are few, and nothing stays alive."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import snntorch
import torch
import torch.nn.functional as F
from calls import Calls
from collector import no_garbage_collector
from compare import MakeNeuron, Observed, agree
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import neuron as sj_neuron
from torch import Tensor, nn

from snn_revplugin import use_settings
from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.adapters.spikingjelly import RevIFNode, RevLIFNode
from snn_revplugin.packed.codec import NUMPY
from snn_revplugin.packed.rows import MOST_BYTES
from snn_revplugin.packed.spikes import Block
from snn_revplugin.report.memory import LiveBytes

pytestmark = pytest.mark.usefixtures("recompute_everything")

ADDMM = torch.ops.aten.addmm.default
CONVOLUTION = torch.ops.aten.convolution.default
BATCH, FEATURES = 4, 24
STEPS = 33  # blocks of 1, 2, 4, 8, 16 and 2 rows
CHOICES = {"beta": 0.9, "threshold": 0.4, "spike_grad": snn_surrogate.fast_sigmoid(slope=5)}


def weighted(spikes: Tensor) -> Tensor:
    """A loss in which every spike counts differently."""
    return (spikes * torch.linspace(-1, 2, spikes.numel()).to(spikes).view_as(spikes)).sum()


class Dense(nn.Module):
    """Linear layers between neurons in snnTorch's time loop; ``between`` takes the spikes of one
    layer to the input of the next."""

    def __init__(
        self, make: MakeNeuron, between: Callable[[Tensor], Tensor] = lambda x: x, **choices: object
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(FEATURES, FEATURES, bias=i != 1) for i in range(3))
        self.neurons = nn.ModuleList(make(**CHOICES | choices) for _ in range(3))
        self.between = between

    def forward(self, x_seq: Tensor) -> Tensor:
        mems, out = [torch.zeros(1)] * 3, []
        for x in x_seq:
            for i in range(3):
                x = self.between(x).to(self.layers[i].weight.dtype)  # the host's spikes are float32
                current = self.layers[i](x)
                mems[i] = mems[i].expand_as(current) if mems[i].dim() == 1 else mems[i]
                x, mems[i] = self.neurons[i](current, mems[i])
            out.append(x + 0.1 * mems[i])
        return torch.stack(out)


class Conv(nn.Module):
    """Convolution, pooling, neuron, convolution, relu, neuron, linear, neuron."""

    def __init__(self, make: MakeNeuron, **choices: object) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 6, 3)
        self.fc = nn.Linear(54, 5)
        self.neurons = nn.ModuleList(
            make(**CHOICES | choices, init_hidden=True, reset_mechanism="subtract")
            for _ in range(3)
        )

    def step(self, x: Tensor) -> Tensor:
        x = self.neurons[0](F.max_pool2d(self.conv1(x), 2))
        x = self.neurons[1](F.relu(self.conv2(x)))
        return self.neurons[2](self.fc(x.flatten(1)))

    def forward(self, x_seq: Tensor) -> Tensor:
        return torch.stack([self.step(x) for x in x_seq])


def program_of(
    build: Callable[[MakeNeuron], nn.Module],
    x_seq: Tensor,
    loss: Callable[[Tensor], Tensor] = weighted,
    dtype: torch.dtype = torch.float32,
) -> Callable[[MakeNeuron], Observed]:
    def program(make: MakeNeuron) -> Observed:
        net, data = build(make).to(dtype), x_seq.to(dtype).requires_grad_()
        out = net(data)
        loss(out).backward()
        return Observed({"out": out}).see_gradients(net, x=data)

    return program


def data(steps: int, batch: int = BATCH) -> Tensor:
    torch.manual_seed(1)
    return torch.rand(steps, batch, FEATURES) * 2


def images(steps: int, batch: int = BATCH) -> Tensor:
    torch.manual_seed(1)
    return torch.rand(steps, batch, 2, 12, 12) * 2


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 17, 40])
def test_any_number_of_steps(steps: int) -> None:
    agree(program_of(Dense, data(steps)), snntorch.Leaky, RevLeaky)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("steps", [9, 21])
def test_convolutions(steps: int, batch: int) -> None:
    agree(program_of(Conv, images(steps, batch)), snntorch.Leaky, RevLeaky)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "choices",
    [
        {"graded_spikes_factor": 0.7},
        {"graded_spikes_factor": torch.rand(FEATURES), "learn_graded_spikes_factor": True},
        {"learn_beta": True, "learn_threshold": True},
        {"reset_mechanism": "zero"},
        {"reset_mechanism": "none"},
        {"reset_delay": False},
    ],
    ids=lambda choices: "-".join(choices),
)
def test_neurons_of_all_sorts(choices: dict[str, object], dtype: torch.dtype) -> None:
    program = program_of(lambda make: Dense(make, **choices), data(21), dtype=dtype)
    agree(program, snntorch.Leaky, RevLeaky)


BETWEEN = {
    "shape": lambda x: x.view(len(x), 2, -1).flatten(1),
    "relu": lambda x: F.relu(x - 0.5),
    "batch of pairs": lambda x: x.view(2, -1, FEATURES),
    "two readers": lambda x: x * x.sigmoid(),
    "coupled": lambda x: x - x.mean(0),
    "softmax over the batch": lambda x: x.softmax(0),
    "halves of a batch": lambda x: torch.cat(x.chunk(2)[::-1]),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_what_may_lie_between(between: str) -> None:
    def build(make: MakeNeuron) -> nn.Module:
        return Dense(make, lambda x: BETWEEN[between](x).reshape(-1, FEATURES))

    agree(program_of(build, data(21)), snntorch.Leaky, RevLeaky)


def test_a_bias_for_every_sample() -> None:
    def build(make: MakeNeuron) -> nn.Module:
        net = Dense(make)
        net.biases = nn.Parameter(torch.rand(BATCH, FEATURES))
        net.layers[1].forward = lambda x: torch.addmm(
            net.biases, x, net.layers[1].weight.t(), beta=0.5, alpha=1.5
        )
        return net

    agree(program_of(build, data(21)), snntorch.Leaky, RevLeaky)


def test_channels_last() -> None:
    program = program_of(
        lambda make: Conv(make).to(memory_format=torch.channels_last),
        images(21).flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (21, BATCH)),
    )
    agree(program, snntorch.Leaky, RevLeaky)


def test_batch_norm_stays_on_its_own() -> None:
    def build(make: MakeNeuron) -> nn.Module:
        net = Conv(make)
        net.conv2 = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6))
        return net

    agree(program_of(build, images(9)), snntorch.Leaky, RevLeaky)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_weights(frozen: int) -> None:
    def build(make: MakeNeuron) -> nn.Module:
        net = Dense(make)
        net.layers[frozen].requires_grad_(False)
        return net

    agree(program_of(build, data(21)), snntorch.Leaky, RevLeaky)


@pytest.mark.parametrize(
    "loss",
    [
        lambda out: weighted(out[6]),
        lambda out: weighted(out[3]) + weighted(out[11]),
        lambda out: weighted(out[:, :1]),
    ],
)
def test_a_loss_on_a_part(loss: Callable[[Tensor], Tensor]) -> None:
    agree(program_of(Dense, data(21), loss), snntorch.Leaky, RevLeaky)


def test_a_kept_graph_and_two_nets() -> None:
    def program(make: MakeNeuron) -> Observed:
        one, other, x_seq = Dense(make), Dense(make), data(13).requires_grad_()
        out = one(x_seq)
        both = weighted(out) + weighted(other(out))
        both.backward(retain_graph=True)
        weighted(out[5]).backward(retain_graph=True)
        both.backward()
        return Observed({"out": out}).see_gradients(one, other, x=x_seq)

    agree(program, snntorch.Leaky, RevLeaky)


def test_branches_of_a_chain() -> None:
    def program(make: MakeNeuron) -> Observed:
        torch.manual_seed(0)
        layer, below, above = nn.Linear(FEATURES, FEATURES), make(**CHOICES), make(**CHOICES)
        x_seq, loss, seen = data(12).requires_grad_(), torch.zeros(()), []
        mem_below = mem = torch.zeros(BATCH, FEATURES)
        for x in x_seq[:6]:
            spikes, mem_below = below(x, mem_below)
            _, mem = above(layer(spikes), mem)
        for part in (x_seq[6:9], x_seq[9:]):
            state_below, state = mem_below, mem
            for x in part:
                spikes, state_below = below(x, state_below)
                spikes, state = above(layer(spikes), state)
                loss = loss + weighted(spikes)
                seen.append(spikes)
        loss.backward()
        return Observed({"out": torch.stack(seen)}).see_gradients(layer, x=x_seq)

    agree(program, snntorch.Leaky, RevLeaky)


def above_one_layer(make: MakeNeuron, x_seq: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    """Two neurons above one layer, one of them behind a relu and a view, on the spikes of a
    third."""
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {"layer": nn.Linear(FEATURES, FEATURES)} | {name: make(**CHOICES) for name in "abc"}
    )
    mem_a = mem_b = mem_c = torch.zeros(len(x_seq[0]), FEATURES)
    mem_c, loss, seen = mem_c.view(-1, 2, FEATURES), torch.zeros(()), []
    for x in x_seq:
        spikes, mem_a = net["a"](x, mem_a)
        current = net["layer"](spikes)
        first, mem_b = net["b"](current, mem_b)
        second, mem_c = net["c"](F.relu(current).view(-1, 2, FEATURES), mem_c)
        loss = loss + weighted(first) + weighted(second)
        seen.append(first)
    return net, loss, torch.stack(seen)


def test_two_neurons_above_one_layer() -> None:
    def program(make: MakeNeuron) -> Observed:
        x_seq = data(STEPS).requires_grad_()
        net, loss, out = above_one_layer(make, x_seq)
        loss.backward()
        return Observed({"out": out}).see_gradients(net, x=x_seq)

    agree(program, snntorch.Leaky, RevLeaky)
    _, loss, _ = above_one_layer(RevLeaky, data(STEPS))
    with Calls(ADDMM) as calls:
        loss.backward()
    assert calls.alive == 0
    assert calls.count[ADDMM] <= STEPS


@pytest.mark.parametrize(
    ("host", "ours"), [(sj_neuron.LIFNode, RevLIFNode), (sj_neuron.IFNode, RevIFNode)]
)
@pytest.mark.parametrize("v_reset", [0.0, None])
def test_spikingjelly(host: type[nn.Module], ours: type[nn.Module], v_reset: float | None) -> None:
    def program(make: MakeNeuron) -> Observed:
        net = nn.Sequential()
        for _ in range(3):
            net.extend([nn.Linear(FEATURES, FEATURES), make(v_threshold=0.3, v_reset=v_reset)])
        x_seq = data(21).requires_grad_()
        out = torch.stack([net(x) for x in x_seq])
        weighted(out).backward()
        return Observed({"out": out}).see_gradients(net, x=x_seq)

    agree(program, host, ours)


def test_the_gradient_of_a_gradient() -> None:
    def program(make: MakeNeuron) -> Observed:
        net, x_seq = Dense(make), data(13).requires_grad_()
        out = net(x_seq)
        (grad,) = torch.autograd.grad(weighted(out), x_seq, create_graph=True)
        grad.square().sum().backward()
        return Observed({"out": out}).see_gradients(net, x=x_seq)

    agree(program, snntorch.Leaky, RevLeaky, tolerance=1e-4)


@pytest.mark.parametrize("written", [0, 4])
def test_data_that_is_written_into_raises_where_it_is_read(written: int) -> None:
    """And not where another step is recomputed."""
    net, frames = Dense(RevLeaky), list(data(9))
    out = net(frames)
    frames[written].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weighted(out).backward()


# ------------------------------------------------------------------------------------ few calls


def counted(net: nn.Module, x_seq: Tensor, monkeypatch: pytest.MonkeyPatch, **settings) -> tuple:
    """The operations of a backward, and how often bits were unpacked."""
    with use_settings(**settings):
        loss = weighted(net(x_seq))
    unpacked = []
    unpack = NUMPY.unpack_array
    monkeypatch.setattr(NUMPY, "unpack_array", lambda *a: unpacked.append(a) or unpack(*a))
    with Calls(ADDMM, CONVOLUTION) as calls:
        loss.backward()
    monkeypatch.undo()
    assert calls.alive == 0
    return calls, len(unpacked)


def blocks_of(steps: int, at_most: int) -> int:
    """The calls for so many steps, of at most so many each."""
    calls, rows = 0, 1
    while steps > 0:
        calls += -(-min(rows, steps) // at_most)
        steps, rows = steps - rows, min(2 * rows, Block.MOST_ROWS)
    return calls


def test_one_call_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step of a pass is alone."""
    nbytes = 4 * BATCH * FEATURES
    calls, unpacked = counted(Dense(RevLeaky), data(STEPS), monkeypatch)
    most = blocks_of(STEPS, MOST_BYTES // nbytes) + 2
    assert 2 <= calls.count[ADDMM] <= 2 * most
    assert 3 <= unpacked <= 3 * most
    calls, _ = counted(Dense(RevLeaky), data(STEPS), monkeypatch, match_host_order=True)
    assert calls.count[ADDMM] >= 2 * (STEPS - 1)


def test_few_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, _ = counted(Conv(RevLeaky), images(STEPS, 1), monkeypatch)
    assert calls.count[CONVOLUTION] <= STEPS
    assert calls.most_alive <= 4


def test_large_layers_stay_on_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Dense(RevLeaky)
    calls, _ = counted(net, data(5, MOST_BYTES // (4 * FEATURES)), monkeypatch)
    assert calls.count[ADDMM] >= 2 * 4


def test_nothing_stays() -> None:
    net, x_seq = Dense(RevLeaky), data(STEPS)
    weighted(net(x_seq)).backward()
    left = []
    with LiveBytes() as live, no_garbage_collector():
        for part in (slice(None), slice(7, 8), slice(0, 20)):
            net.zero_grad(set_to_none=False)
            out = net(x_seq)
            weighted(out[part]).backward(retain_graph=True)
            weighted(out[part]).backward()
            del out
            left.append(live.now())
    assert left[0] == left[1] == left[2]

"""RevLeaky against snntorch.Leaky: every three options together, both state forms, and snnTorch's
own tools."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import product

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from compare import MakeNeuron, Observed, agree, assert_alive
from nets import BATCH
from pairs import every_pair
from snntorch import functional as SF
from snntorch import surrogate, utils
from snntorch.functional import quant
from torch import Tensor

from snn_revplugin.adapters.snntorch import RevLeaky

FEATURES = {"linear": (6,), "conv": (3, 3, 3)}  # of the first layer's neurons
LENGTHS = 1, 2, 9, 30  # a stretch between anchors may be longer than a sequence, or much shorter
PASSED, HIDDEN, HIDDEN_WITH_OUTPUT = "mem passed", "init_hidden", "init_hidden, output"


class _UsersStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).float()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / (1 + 3 * x.abs())


SURROGATES: dict[str, Callable[[], Callable | None]] = {
    "default": lambda: None,
    "fast_sigmoid": lambda: surrogate.fast_sigmoid(slope=4),
    "sigmoid": lambda: surrogate.sigmoid(slope=5),
    "atan": lambda: surrogate.atan(alpha=1.5),
    "straight_through": surrogate.straight_through_estimator,
    "spike_rate_escape": lambda: surrogate.spike_rate_escape(beta=0.7, slope=2),
    "custom_surrogate": lambda: surrogate.custom_surrogate(
        lambda z, grad, spikes: grad * (0.2 + spikes) / (1 + z * z)
    ),
    "user's autograd Function": lambda: _UsersStep.apply,
}


class Net(nn.Module):
    """A weight layer, neurons, a linear layer, neurons; the time loop is :func:`train`'s."""

    def __init__(self, make: MakeNeuron, kind: str, first: dict, second: dict) -> None:
        super().__init__()
        self.weigh = nn.Linear(5, 6) if kind == "linear" else nn.Conv2d(2, 3, 3)
        self.lif1 = make(**first)
        self.readout = nn.Linear(math.prod(FEATURES[kind]), 4)
        self.lif2 = make(**second)
        for layer in (self.weigh, self.readout):
            nn.init.normal_(layer.weight, std=2 / layer.weight[0].numel() ** 0.5)
            nn.init.constant_(layer.bias, 0.4)


def draw(kind: str, T: int, dtype: torch.dtype, batch: int = BATCH) -> Tensor:
    """A sequence of inputs ``[T, batch, ...]`` that makes a :class:`Net` fire at some steps."""
    shape = (5,) if kind == "linear" else (2, 5, 5)
    return torch.randn(T, batch, *shape).to(dtype).requires_grad_()


def train(net: Net, x: Tensor, form: str, initial: tuple[Tensor, Tensor] | None = None) -> Observed:
    """One forward over time and one backward from every spike and membrane."""
    mem = initial
    if mem is None:
        mem = net.lif1.reset_mem(), net.lif2.reset_mem()
    elif form != PASSED:
        net.lif1.mem, net.lif2.mem = mem
    record: dict[str, list[Tensor]] = {
        name: [] for name in ("spk1", "mem1", "spk2", "mem2", "reset")
    }
    for frame in x:
        out1 = net.lif1(net.weigh(frame), *mem[:1] if form == PASSED else ())
        spk1, mem1 = (out1, net.lif1.mem) if form == HIDDEN else out1
        out2 = net.lif2(
            net.readout(spk1.flatten(1).to(frame.dtype)), *mem[1:] if form == PASSED else ()
        )
        spk2, mem2 = (out2, net.lif2.mem) if form == HIDDEN else out2
        mem = mem1, mem2
        for name, value in zip(record, (spk1, mem1, spk2, mem2, net.lif1.reset), strict=True):
            record[name].append(value)
    exact = {name: torch.stack(values) for name, values in record.items()}
    loss = sum(
        (each * torch.randn(each.shape)).sum() for name, each in exact.items() if name != "reset"
    )
    loss.backward()
    return Observed(exact).see_gradients(net, x=x)


def per_neuron(low: float, high: float, shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape) * (high - low) + low


def _table() -> list:
    """Options of which every three values meet, chosen from all combinations, with a net, T,
    surrogate and initial state that are dealt out at random."""
    deal = random.Random(0).choice
    combinations = product(
        ("subtract", "zero", "none"),
        (True, False),
        (False, True),
        (False, True),
        (False, True),
        (False, True),
        (1.0, 0.7),
        (PASSED, HIDDEN, HIDDEN_WITH_OUTPUT),
        (torch.float32, torch.float64),
    )
    rows = [
        (
            *each,
            deal(tuple(SURROGATES)),
            deal((*LENGTHS, 2, 9)),
            deal(tuple(FEATURES)),
            deal((False, True)),
        )
        for each in combinations
    ]
    return [
        pytest.param(*row, id="-".join(str(each).removeprefix("torch.") for each in row))
        for row in every_pair(rows, together=3)
    ]


@pytest.mark.parametrize(
    (
        "reset",
        "delay",
        "learn_beta",
        "learn_threshold",
        "learn_factor",
        "vectors",
        "factor",
        "form",
        "dtype",
        "spike_grad",
        "T",
        "kind",
        "initial",
    ),
    _table(),
)
def test_every_three_options_together(
    reset: str,
    delay: bool,
    learn_beta: bool,
    learn_threshold: bool,
    learn_factor: bool,
    vectors: bool,
    factor: float,
    form: str,
    dtype: torch.dtype,
    spike_grad: str,
    T: int,
    kind: str,
    initial: bool,
) -> None:
    def program(make: MakeNeuron) -> Observed:
        def options(shape: tuple[int, ...]) -> dict:
            return {
                "beta": per_neuron(0.5, 0.99, shape) if vectors else 0.9,
                "threshold": per_neuron(0.6, 1.2, shape) if vectors else 0.8,
                "graded_spikes_factor": per_neuron(0.5, 1.5, shape) * factor if vectors else factor,
                "spike_grad": SURROGATES[spike_grad](),
                "reset_mechanism": reset,
                "reset_delay": delay,
                "learn_beta": learn_beta,
                "learn_threshold": learn_threshold,
                "learn_graded_spikes_factor": learn_factor,
                "init_hidden": form != PASSED,
                "output": form == HIDDEN_WITH_OUTPUT,
            }

        first = FEATURES[kind] if T != 9 else (FEATURES[kind][0], *(1 for _ in FEATURES[kind][1:]))
        net = Net(make, kind, options(first), options((4,))).to(dtype)
        x = draw(kind, T, dtype)
        mem = None
        if initial:
            mem = tuple(
                torch.randn(BATCH, *shape, dtype=dtype, requires_grad=True)
                for shape in (FEATURES[kind], (4,))
            )
        observed = train(net, x, form, mem)
        if T >= 9:
            assert_alive(observed.exact["spk1"])
            assert_alive(observed.exact["spk2"])
        if initial:
            observed.gradients |= {"mem1_0": mem[0].grad, "mem2_0": mem[1].grad}
        return observed

    agree(program, snn.Leaky, RevLeaky)


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_mantissas(dtype: torch.dtype, reset: str, learned: bool) -> None:
    def program(make: MakeNeuron) -> Observed:
        options = {
            "beta": 0.9,
            "threshold": 0.8,
            "reset_mechanism": reset,
            "learn_beta": learned,
            "learn_threshold": learned,
        }
        net = Net(make, "linear", options, options).to(dtype)
        return train(net, draw("linear", 9, dtype), PASSED)

    agree(program, snn.Leaky, RevLeaky)


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize(
    "beta",
    [0.0, 1e-3, 1.0, 1.3, -0.2, torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5, 1e-6])],
    ids=lambda b: f"beta{b}"[:12],
)
def test_decay_at_its_ends_is_clamped_as_the_host_does(beta: float | Tensor, reset: str) -> None:
    def program(make: MakeNeuron) -> Observed:
        first = {
            "beta": torch.as_tensor(beta).clone(),
            "learn_beta": True,
            "reset_mechanism": reset,
        }
        return train(
            Net(make, "linear", first, {"beta": 0.5}), draw("linear", 9, torch.float32), PASSED
        )

    agree(program, snn.Leaky, RevLeaky)


@pytest.mark.parametrize("mem_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_input_and_membrane_of_different_dtypes(
    input_dtype: torch.dtype, mem_dtype: torch.dtype
) -> None:
    def program(make: MakeNeuron) -> Observed:
        lif = make(beta=0.9, learn_beta=True, learn_threshold=True)
        x = torch.randn(9, BATCH, 4, dtype=input_dtype, requires_grad=True)
        start = mem = torch.randn(BATCH, 4, dtype=mem_dtype, requires_grad=True)
        spikes = []
        for frame in x * 2:
            spk, mem = lif(frame, mem)
            spikes.append(spk)
        (torch.stack(spikes).sum() + (mem * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum()).backward()
        return Observed({"spk": torch.stack(spikes), "mem": mem}).see_gradients(
            lif, x=x, start=start
        )

    agree(program, snn.Leaky, RevLeaky)


def test_surrogate_disable_passes_no_gradient_but_to_the_graded_factor() -> None:
    def program(make: MakeNeuron) -> Observed:
        options = {
            "beta": 0.9,
            "surrogate_disable": True,
            "learn_graded_spikes_factor": True,
            "learn_beta": True,
        }
        return train(
            Net(make, "linear", options, options), draw("linear", 9, torch.float32), PASSED
        )

    agree(program, snn.Leaky, RevLeaky)


def test_surrogate_disable_makes_spikes_that_need_no_gradient() -> None:
    def program(make: MakeNeuron) -> Observed:
        net = Net(
            make,
            "linear",
            {"beta": 0.9, "surrogate_disable": True},
            {"beta": 0.9, "surrogate_disable": True},
        )
        mem1, mem2 = net.lif1.reset_mem(), net.lif2.reset_mem()
        for frame in draw("linear", 3, torch.float32):
            spk1, mem1 = net.lif1(net.weigh(frame), mem1)
            spk2, mem2 = net.lif2(net.readout(spk1), mem2)
        (mem1.sum() + mem2.sum()).backward()
        return Observed({"spk1": spk1, "spk2": spk2, "mem1": mem1, "mem2": mem2}).see_gradients(net)

    agree(program, snn.Leaky, RevLeaky)


@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"inhibition": True}, "reversible"),
        ({"state_quant": quant.state_quant(num_bits=4)}, "reversible"),
        ({"spike_grad": lambda z: z.sigmoid()}, "host"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_reversed_run_by_the_own_step(options: dict, path: str) -> None:
    def program(make: MakeNeuron) -> Observed:
        net = Net(make, "linear", {"beta": 0.9, **options}, {"beta": 0.9, **options})
        return train(net, draw("linear", 9, torch.float32), PASSED)

    neurons = agree(
        program, snn.Leaky, RevLeaky, path=path, reason="Heaviside" if path == "host" else None
    )
    assert path == "host" or all(each.record.latest_transition.own_code for each in neurons)


def _changed(make: MakeNeuron, change: Callable[[nn.Module], None], **options) -> Observed:
    """Three steps, a change, ten steps."""
    lif, weigh = make(beta=0.9, **options), nn.Linear(5, 6)
    x = draw("linear", 13, torch.float32)
    mem, record = lif.reset_mem(), []
    for t, frame in enumerate(x):
        if t == 3:
            change(lif)
        spk, mem = lif(weigh(frame) * 2, mem)
        record += [spk, mem, lif.reset]
    seen = torch.stack(record)
    (seen * torch.randn(seen.shape)).sum().backward()
    return Observed({"seen": seen}).see_gradients(weigh, lif, x=x)


CHANGES: dict[str, tuple[Callable[[nn.Module], None], dict]] = {
    "reset_mechanism": (lambda lif: setattr(lif, "reset_mechanism", "zero"), {}),
    "reset_mechanism, no delay": (
        lambda lif: setattr(lif, "reset_mechanism", "zero"),
        {"reset_delay": False},
    ),
    "state_function": (lambda lif: setattr(lif, "state_function", lif._base_zero), {}),
    "reset_delay": (lambda lif: setattr(lif, "reset_delay", False), {}),
    "spike_grad": (lambda lif: setattr(lif, "spike_grad", surrogate.fast_sigmoid(3)), {}),
    "beta replaced": (lambda lif: setattr(lif, "beta", torch.tensor(0.3)), {}),
    "factor replaced": (lambda lif: setattr(lif, "graded_spikes_factor", torch.tensor(2.0)), {}),
    "threshold replaced": (lambda lif: setattr(lif, "threshold", torch.tensor(0.4)), {}),
    "user's state_function": (
        lambda lif: setattr(lif, "state_function", lambda x: 0.5 * lif.mem + x - 0.1 * lif.reset),
        {},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_option_changed_between_two_steps(name: str) -> None:
    change, options = CHANGES[name]
    # A charge of the user's own, or one reset in the charge and another after the spike, is the
    # host's to compute.
    path = (
        "both" if name in ("user's state_function", "reset_mechanism, no delay") else "reversible"
    )
    agree(lambda make: _changed(make, change, **options), snn.Leaky, RevLeaky, path=path)


def test_reset_mechanism_that_disagrees_with_the_charge_takes_the_hosts_path() -> None:
    def program(make: MakeNeuron) -> Observed:
        return _changed(
            make, lambda lif: setattr(lif, "reset_mechanism", "zero"), reset_delay=False
        )

    agree(program, snn.Leaky, RevLeaky, path="both")


@pytest.mark.parametrize("value", [-0.2, 0.05, 0.5, 0.999, 1.5])
def test_a_decay_written_through_data_between_two_sequences(value: float) -> None:
    """Writing through ``.data`` leaves no trace in a version, and training scripts clamp their
    decay that way; nor does FSDP, which gathers weights anew for every forward. The distance
    between anchors depends on it, and the clamp's derivative."""

    def program(make: MakeNeuron) -> Observed:
        lif, weigh = make(beta=0.99, learn_beta=True), nn.Linear(5, 6)
        observed = Observed()
        for run in range(2):
            x, mem, loss = draw("linear", 40, torch.float32), lif.reset_mem(), 0.0
            for frame in x:
                spk, mem = lif(weigh(frame), mem)
                loss = loss + (mem * torch.randn(mem.shape)).sum() + spk.sum()
            loss.backward()
            observed.exact[f"mem{run}"] = mem
            lif.beta.data.fill_(value)
        return observed.see_gradients(lif, weigh, x=x)

    agree(program, snn.Leaky, RevLeaky)


def test_parameters_with_more_elements_than_the_input() -> None:
    """The host broadcasts: the membrane grows to the parameters' shape, and is zeroed at each call
    for it."""

    def program(make: MakeNeuron) -> Observed:
        lif = make(beta=torch.rand(3, 4), learn_beta=True)
        x = torch.randn(5, 4, requires_grad=True)
        mem, loss = lif.reset_mem(), 0.0
        for frame in x:
            spk, mem = lif(frame, mem)
            loss = loss + (spk + mem * mem).sum()
        loss.backward()
        return Observed({"spk": spk, "mem": mem}).see_gradients(lif, x=x)

    agree(program, snn.Leaky, RevLeaky, path="host", reason="threshold or graded_spikes_factor")


def test_a_membrane_of_another_shape_starts_afresh() -> None:
    def program(make: MakeNeuron) -> Observed:
        lif, weigh = make(beta=0.9, init_hidden=True), nn.Linear(5, 6)
        record = []
        for batch in (90, 90, 70, 70, 90, 50):
            record += [lif(weigh(torch.randn(batch, 5)) * 3), lif.mem]
        sum((each * torch.randn(each.shape)).sum() for each in record).backward()
        return Observed({str(i): each for i, each in enumerate(record)}).see_gradients(weigh)

    agree(program, snn.Leaky, RevLeaky)


def test_mem_passed_with_init_hidden_is_the_hosts_error() -> None:
    for kind in (snn.Leaky, RevLeaky):
        lif = kind(beta=0.9, init_hidden=True)
        with pytest.raises(TypeError, match="should not be passed as an argument"):
            lif(torch.randn(2, 3, requires_grad=True), torch.zeros(2, 3))


@pytest.mark.parametrize("option", [{"reset_mechanism": "twice"}, {"betta": 0.9}])
def test_bad_options_raise_as_the_host_does(option: dict) -> None:
    errors = []
    for kind in (snn.Leaky, RevLeaky):
        with pytest.raises((ValueError, TypeError)) as caught:
            kind(0.9, **option)
        errors.append((caught.type, str(caught.value).replace("RevLeaky", "Leaky")))
    assert errors[0][0] is errors[1][0]
    assert errors[0][1] == errors[1][1]


def test_all_arguments_by_position() -> None:
    arguments = (
        0.8,
        0.9,
        None,
        False,
        True,
        False,
        True,
        True,
        "zero",
        False,
        True,
        0.7,
        True,
        False,
    )
    host, ours = snn.Leaky(*arguments), RevLeaky(*arguments)
    hidden = ("spike_grad", "state_function")
    for name, value in vars(host).items():
        if not name.startswith("_") and name not in hidden:
            assert getattr(ours, name) == value, name
    assert str(ours.state_dict()) == str(host.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [
        name for name, _ in host.named_parameters()
    ]
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in host.named_buffers()]
    assert ours.state_function.__name__ == host.state_function.__name__


def test_reversible_false_takes_the_hosts_path() -> None:
    def program(make: MakeNeuron) -> Observed:
        options = (
            {"beta": 0.9}
            if make(beta=0.1).__class__ is snn.Leaky
            else {"beta": 0.9, "reversible": False}
        )
        return train(
            Net(make, "linear", options, options), draw("linear", 9, torch.float32), PASSED
        )

    neurons = agree(program, snn.Leaky, RevLeaky, path="any")
    for neuron in neurons[1:]:
        assert neuron.record.statistics.steps == 0
        assert any("reversible=False" in reason for reason in neuron.record.statistics.reasons)


def test_state_dict_goes_both_ways() -> None:
    options = {
        "learn_beta": True,
        "learn_threshold": True,
        "learn_graded_spikes_factor": True,
        "reset_mechanism": "zero",
    }
    for kind, other in ((snn.Leaky, RevLeaky), (RevLeaky, snn.Leaky)):
        source, target = kind(beta=0.7, threshold=0.6, **options), other(beta=0.1, **options)
        x = torch.randn(2, 3, requires_grad=True)
        source(
            x, torch.zeros(2, 3)
        )  # a state and a reset signal are there, and belong to no checkpoint
        target(x, torch.zeros(2, 3))
        assert list(source.state_dict()) == list(target.state_dict())
        target.load_state_dict(source.state_dict(), strict=True)
        assert str(source.state_dict()) == str(target.state_dict())
        assert torch.equal(source(x, torch.ones(2, 3))[1], target(x, torch.ones(2, 3))[1])


def test_repr_differs_in_the_name_alone() -> None:
    assert repr(RevLeaky(beta=0.9)) == repr(snn.Leaky(beta=0.9)).replace("Leaky", "RevLeaky")
    assert isinstance(RevLeaky(beta=0.9), snn.SpikingNeuron)


class Hidden(nn.Sequential):
    """The tutorials' net: a Sequential of neurons that keep their state."""

    def __init__(self, make: MakeNeuron) -> None:
        spike_grad = surrogate.fast_sigmoid(slope=5)
        super().__init__(
            nn.Linear(5, 8),
            make(beta=0.9, threshold=0.6, spike_grad=spike_grad, init_hidden=True),
            nn.Linear(8, 4),
            make(beta=0.8, threshold=0.6, spike_grad=spike_grad, init_hidden=True, output=True),
        )


@pytest.mark.parametrize(
    "clear", ["utils.reset", "detach_hidden", "reset_hidden", "reset_mem", "none"]
)
def test_hidden_states_cleared_between_sequences(clear: str) -> None:
    """Between two sequences and once in the middle of one, before its backward."""

    def program(make: MakeNeuron) -> Observed:
        net = Hidden(make)
        clearing = {
            "utils.reset": lambda: utils.reset(net),
            "detach_hidden": snn.Leaky.detach_hidden,
            "reset_hidden": snn.Leaky.reset_hidden,
            "reset_mem": lambda: [net[1].reset_mem(), net[3].reset_mem()],
            "none": lambda: None,
        }[clear]
        record = []
        for _ in range(1 if clear == "none" else 3):
            sequence = []
            for t in range(9):
                if t == 6:
                    clearing()
                sequence += net(torch.randn(BATCH, 5) * 2)
            seen = torch.stack(sequence)
            (seen * torch.randn(seen.shape)).sum().backward()
            clearing()
            record.append(seen.detach())
        return Observed({"record": torch.cat(record), "mem": net[1].mem}).see_gradients(net)

    agree(program, snn.Leaky, RevLeaky)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("rule", ["BPTT", "RTRL", "TBPTT 1", "TBPTT 4", "TBPTT 4, rate"])
def test_training_by_snntorchs_backprop(rule: str) -> None:
    """Three optimizer steps and more: weights after them agree, and spikes all along."""
    from snntorch import backprop

    def program(make: MakeNeuron) -> Observed:
        net = Hidden(make)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        frames = (
            (10, BATCH, 5) if rule == "BPTT" else (BATCH, 5)
        )  # snnTorch 1.0's TBPTT raises on data that vary with time
        data = [(torch.randn(frames), torch.randint(4, (BATCH,))) for _ in range(3)]
        criterion = SF.ce_rate_loss() if "rate" in rule else SF.ce_max_membrane_loss()
        if rule == "BPTT":
            loss = backprop.BPTT(net, data, optimizer, criterion, time_var=True)
        elif rule == "RTRL":
            loss = backprop.RTRL(net, data, optimizer, criterion, num_steps=10, time_var=False)
        else:
            steps = int(rule.split()[1].strip(","))
            loss = backprop.TBPTT(
                net, data, optimizer, criterion, num_steps=10, time_var=False, K=steps
            )
        return Observed(
            {}, {"loss": loss.detach()} | {name: p.detach() for name, p in net.named_parameters()}
        )

    agree(program, snn.Leaky, RevLeaky)


def test_the_tutorials_loop_trains_as_the_hosts_does() -> None:
    """Twenty steps of Adam on one batch: same loss curve, and the loss falls."""

    def program(make: MakeNeuron) -> Observed:
        options = {
            "beta": 0.9,
            "spike_grad": surrogate.fast_sigmoid(slope=5),
            "learn_beta": True,
            "learn_threshold": True,
        }
        net = Net(make, "conv", options, options)
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        x, target, losses = (
            draw("conv", 8, torch.float32, batch=12).detach(),
            torch.arange(12) % 4,
            [],
        )
        for _ in range(20):
            mem1, mem2, loss = net.lif1.reset_mem(), net.lif2.reset_mem(), torch.zeros(())
            for frame in x:
                spk1, mem1 = net.lif1(net.weigh(frame), mem1)
                _, mem2 = net.lif2(net.readout(spk1.flatten(1)), mem2)
                loss = loss + nn.functional.cross_entropy(mem2, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert losses[-1] < 0.7 * losses[0]
        return Observed({}, {"losses": torch.stack(losses)})

    agree(program, snn.Leaky, RevLeaky, tolerance=1e-3)

"""RevSynaptic and RevLapicque against snntorch.Synaptic and snntorch.Lapicque: the options that
RevLeaky has, two by two, and what a second state adds."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from compare import MakeNeuron, Observed, agree, assert_alive
from nets import BATCH, step_spike
from pairs import every_pair
from snntorch import surrogate, utils
from snntorch.functional import quant
from torch import Tensor

import snn_revplugin
from snn_revplugin.adapters.snntorch import RevLapicque, RevSynaptic

KINDS = {"Synaptic": (snn.Synaptic, RevSynaptic), "Lapicque": (snn.Lapicque, RevLapicque)}
WIDTH = 6
PASSED, HIDDEN, HIDDEN_WITH_OUTPUT = "states passed", "init_hidden", "init_hidden, output"
SURROGATES: dict[str, Callable[[], Callable | None]] = {
    "default": lambda: None,
    "fast_sigmoid": lambda: surrogate.fast_sigmoid(slope=4),
    "sigmoid": lambda: surrogate.sigmoid(slope=5),
    "triangular": lambda: surrogate.triangular(threshold=1),
    "straight_through": surrogate.straight_through_estimator,
    "heaviside": surrogate.heaviside,
    "spike_rate_escape": lambda: surrogate.spike_rate_escape(beta=0.7, slope=2),
    "SFS": lambda: surrogate.SFS(slope=5, B=2),
    "user's": lambda: step_spike,
}


class Net(nn.Module):
    """linear - neurons - linear - neurons."""

    def __init__(self, make: MakeNeuron, **options: Any) -> None:
        super().__init__()
        self.weigh, self.readout = nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.neurons = nn.ModuleList([make(**options), make(**options)])
        for layer in (self.weigh, self.readout):
            nn.init.normal_(layer.weight, std=2 / layer.weight[0].numel() ** 0.5)
            nn.init.constant_(layer.bias, 0.4)


def states_of(neuron: nn.Module) -> tuple[Tensor, ...]:
    return (neuron.syn, neuron.mem) if isinstance(neuron, snn.Synaptic) else (neuron.mem,)


def train(
    net: Net,
    T: int = 9,
    form: str = PASSED,
    start: bool = False,
    mid_graph: bool = False,
    change: Callable[[nn.Module], None] | None = None,
) -> Observed:
    """One forward over time and one backward from every spike and state.

    Args:
        start: whether the first layer starts from random states.
        mid_graph: whether to see the gradients at all states and spikes.
        change: called with each neuron before the fourth step.
    """
    dtype = net.weigh.weight.dtype
    x = torch.randn(T, BATCH, 5).to(dtype).requires_grad_()
    zeros = (each.reset_mem() for each in net.neurons)
    states = [each if isinstance(each, tuple) else (each,) for each in zeros]
    first = ()
    if start:
        first = [torch.randn(BATCH, WIDTH).to(dtype).requires_grad_() for _ in states[0]]
        states[0] = tuple(first)
        if form != PASSED:
            _hold(net.neurons[0], states[0])
    seen, at = [], []
    for t, frame in enumerate(x):
        if t == 3 and change is not None:
            for each in net.neurons:
                change(each)
        for i, (layer, neuron) in enumerate(
            zip((net.weigh, net.readout), net.neurons, strict=True)
        ):
            given = layer(frame.to(dtype))
            result = neuron(given, *states[i]) if form == PASSED else neuron(given)
            frame, *after = result if isinstance(result, tuple) else (result, *states_of(neuron))
            states[i] = tuple(after)
            seen += [frame, *after, neuron.reset]
            at += [frame, *after]
    if mid_graph:
        for each in at:
            if each.requires_grad:
                each.retain_grad()
    loss = sum((each * torch.randn(each.shape)).sum() for each in seen if each.requires_grad)
    loss.backward()
    observed = Observed({str(i): each for i, each in enumerate(seen)}).see_gradients(net, x=x)
    observed.gradients |= {f"start {i}": each.grad for i, each in enumerate(first)}
    if mid_graph:
        observed.gradients |= {f"at {i}": e.grad for i, e in enumerate(at) if e.requires_grad}
    if T >= 9 and change is None:
        assert_alive(torch.stack([each.detach() for each in at[:: len(at) // T]]))
    return observed


def _hold(neuron: nn.Module, states: tuple[Tensor, ...]) -> None:
    names = ("syn", "mem")[-len(states) :]
    for name, each in zip(names, states, strict=True):
        setattr(neuron, name, each)


def per_neuron(low: float, high: float) -> Tensor:
    return torch.rand(WIDTH) * (high - low) + low


def check(kind: str, program: Callable[[MakeNeuron], Observed], **more: Any) -> list[nn.Module]:
    return agree(program, *KINDS[kind], **more)


# ------------------------------------------------------------------------------------- the options


def _rows(*options: tuple) -> list:
    deal = random.Random(0).choice
    rows = [
        (*each, deal(tuple(SURROGATES)), deal((1, 2, 9, 20)), deal((False, True)))
        for each in product(*options)
    ]
    chosen = every_pair(rows)
    return [
        pytest.param(*row, id="-".join(str(each).removeprefix("torch.") for each in row))
        for row in chosen
    ]


RESETS = "subtract", "zero", "none"
FORMS = PASSED, HIDDEN, HIDDEN_WITH_OUTPUT
DTYPES = torch.float32, torch.float64
BOTH = False, True


@pytest.mark.parametrize(
    "reset, delay, alpha, beta, threshold, vectors, factor, form, dtype, spike_grad, T, start",
    _rows(RESETS, BOTH, BOTH, BOTH, BOTH, BOTH, (1.0, 0.7), FORMS, DTYPES),
)
def test_every_two_options_of_synaptic(
    reset: str,
    delay: bool,
    alpha: bool,
    beta: bool,
    threshold: bool,
    vectors: bool,
    factor: float,
    form: str,
    dtype: torch.dtype,
    spike_grad: str,
    T: int,
    start: bool,
) -> None:
    def program(make: MakeNeuron) -> Observed:
        net = Net(
            make,
            alpha=per_neuron(0.4, 0.9) if vectors else 0.6,
            beta=per_neuron(0.5, 0.99) if vectors else 0.8,
            threshold=per_neuron(0.6, 1.2) if vectors else 0.8,
            spike_grad=SURROGATES[spike_grad](),
            reset_mechanism=reset,
            reset_delay=delay,
            learn_alpha=alpha,
            learn_beta=beta,
            learn_threshold=threshold,
            init_hidden=form != PASSED,
            output=form == HIDDEN_WITH_OUTPUT,
        )
        for each in net.neurons:
            each.graded_spikes_factor = torch.tensor(factor)
        return train(net.to(dtype), T, form, start)

    check("Synaptic", program)


CIRCUITS = {
    "beta": {"beta": 0.85},
    "small beta": {"beta": 0.2},  # the host's decay is negative
    "C of each neuron": {"R": 1.0, "C": 3.0},
    "R and C": {"R": 2.0, "C": 2.5, "time_step": 0.5},
    "beta and R": {"beta": 0.8, "R": 0.7},
}


@pytest.mark.parametrize(
    "reset, circuit, threshold, vectors, factor, form, dtype, spike_grad, T, start",
    _rows(RESETS, CIRCUITS, BOTH, BOTH, (1.0, 0.7), FORMS, DTYPES),
)
def test_every_two_options_of_lapicque(
    reset: str,
    circuit: str,
    threshold: bool,
    vectors: bool,
    factor: float,
    form: str,
    dtype: torch.dtype,
    spike_grad: str,
    T: int,
    start: bool,
) -> None:
    def program(make: MakeNeuron) -> Observed:
        net = Net(
            make,
            **CIRCUITS[circuit],
            threshold=per_neuron(0.6, 1.2) if vectors else 0.5,
            spike_grad=SURROGATES[spike_grad](),
            reset_mechanism=reset,
            learn_threshold=threshold,
            init_hidden=form != PASSED,
            output=form == HIDDEN_WITH_OUTPUT,
        )
        for each in net.neurons:
            each.graded_spikes_factor = torch.tensor(factor)
            if circuit == "C of each neuron":
                each.C = per_neuron(2, 6)
        return train(net.to(dtype), T, form, start)

    check("Lapicque", program)


OPTIONS: dict[str, dict[str, Any]] = {
    "Synaptic": {"alpha": 0.6, "beta": 0.8, "threshold": 0.8},
    "Lapicque": {"beta": 0.8, "threshold": 0.5},
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@EVERY_KIND
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_mantissas(dtype: torch.dtype, reset: str, kind: str) -> None:
    def program(make: MakeNeuron) -> Observed:
        options = OPTIONS[kind] | {"reset_mechanism": reset, "learn_threshold": True}
        return train(Net(make, **options).to(dtype))

    check(kind, program)


@pytest.mark.parametrize("value", [0.0, 1e-3, 1.0, 1.3, -0.2])
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_decays_at_their_ends_are_clamped_as_the_host_does(name: str, value: float) -> None:
    def program(make: MakeNeuron) -> Observed:
        options = OPTIONS["Synaptic"] | {name: value, f"learn_{name}": True}
        return train(Net(make, **options))

    check("Synaptic", program)


@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
@EVERY_KIND
@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"inhibition": True}, "reversible"),
        ({"state_quant": quant.state_quant(num_bits=4)}, "reversible"),
        ({"spike_grad": lambda z: z.sigmoid()}, "host"),
    ],
    ids=["inhibition", "state_quant", "spike_grad"],
)
def test_options_without_equations(options: dict, path: str, kind: str) -> None:
    reason = "Heaviside" if path == "host" else None
    check(
        kind, lambda make: train(Net(make, **OPTIONS[kind], **options), 2), path=path, reason=reason
    )


def test_a_learned_beta_of_lapicque_takes_the_hosts_path() -> None:
    def program(make: MakeNeuron) -> Observed:
        return train(Net(make, beta=0.8, learn_beta=True))

    check("Lapicque", program, path="host", reason="beta is learned")


def test_a_current_without_a_gradient_takes_the_hosts_path() -> None:
    def program(make: MakeNeuron) -> Observed:
        lif, total = make(0.6, 0.8, learn_beta=True, init_hidden=True), 0.0
        for frame in torch.randn(9, BATCH, WIDTH):
            total = total + (lif(2 * frame) * lif.mem).sum()
        total.backward()
        return Observed({"syn": lif.syn, "mem": lif.mem}).see_gradients(lif)

    check("Synaptic", program, path="host", reason="the synaptic current has no gradient")


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "state_function": lambda lif: setattr(lif, "state_function", lif._base_zero),
    "reset_mechanism": lambda lif: setattr(lif, "reset_mechanism", "zero"),
    "spike_grad": lambda lif: setattr(lif, "spike_grad", surrogate.fast_sigmoid(3)),
    "threshold": lambda lif: setattr(lif, "threshold", torch.tensor(0.4)),
    "factor": lambda lif: setattr(lif, "graded_spikes_factor", torch.tensor(2.0)),
    "inhibition": lambda lif: setattr(lif, "inhibition", True),
}
OF_SYNAPTIC: dict[str, Callable[[nn.Module], None]] = {
    "alpha": lambda lif: setattr(lif, "alpha", torch.tensor(0.2)),
    "beta": lambda lif: lif.beta.fill_(0.3),
    "reset_delay": lambda lif: setattr(lif, "reset_delay", False),
}
OF_LAPICQUE: dict[str, Callable[[nn.Module], None]] = {
    "C": lambda lif: setattr(lif, "C", torch.tensor(2.0)),
    "time_step": lambda lif: setattr(lif, "time_step", torch.tensor(0.5)),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [("Synaptic", each) for each in CHANGES | OF_SYNAPTIC]
    + [("Lapicque", each) for each in CHANGES | OF_LAPICQUE],
)
def test_an_option_changed_between_two_steps(kind: str, name: str) -> None:
    change = (CHANGES | OF_SYNAPTIC | OF_LAPICQUE)[name]
    check(kind, lambda make: train(Net(make, **OPTIONS[kind]), change=change), path="reversible")


# ------------------------------------------------------------------------------------ the gradients


@EVERY_KIND
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("delay", BOTH)
def test_gradients_at_spikes_and_states_in_mid_graph(delay: bool, reset: str, kind: str) -> None:
    options = OPTIONS[kind] | {"reset_mechanism": reset}
    if kind == "Synaptic":
        options |= {"reset_delay": delay, "learn_alpha": True, "learn_beta": True}
    check(kind, lambda make: train(Net(make, **options), 12, mid_graph=True))


@pytest.mark.parametrize("what", ["syn of the last step", "syn of some steps", "mem", "spikes"])
@pytest.mark.parametrize("reset", RESETS)
def test_a_loss_on_part_of_what_a_step_gives(reset: str, what: str) -> None:
    def program(make: MakeNeuron) -> Observed:
        weigh, lif, total = nn.Linear(5, WIDTH), make(**OPTIONS["Synaptic"], learn_alpha=True), 0.0
        syn, mem = lif.reset_mem()
        for t, frame in enumerate(torch.randn(20, BATCH, 5) * 2):
            spk, syn, mem = lif(weigh(frame), syn, mem)
            if what == "spikes" or (t % 7 == 2 and what == "syn of some steps"):
                total = total + ((spk if what == "spikes" else syn) * (t + 1)).sum()
        total = total + (mem.square().sum() if what == "mem" else syn.sum())
        total.backward()
        return Observed({"syn": syn, "mem": mem}).see_gradients(weigh, lif)

    check("Synaptic", program)


@pytest.mark.parametrize(
    "state", ["syn detached", "syn scaled", "mem scaled in place", "syn scaled in place", "swapped"]
)
def test_states_that_are_not_what_the_step_gave(state: str) -> None:
    """Each starts a new chain of time steps."""

    def program(make: MakeNeuron) -> Observed:
        weigh, lif, seen = nn.Linear(5, WIDTH), make(**OPTIONS["Synaptic"], learn_beta=True), []
        syn, mem = lif.reset_mem()
        for t, frame in enumerate(torch.randn(9, BATCH, 5) * 2):
            spk, syn, mem = lif(weigh(frame), syn, mem)
            seen += [spk, syn * 1, mem * 1]
            if t % 3 == 2:
                if state == "syn detached":
                    syn = syn.detach()
                elif state == "syn scaled":
                    syn = syn * 0.9
                elif state == "swapped":
                    syn, mem = mem, syn
                else:
                    (mem if state.startswith("mem") else syn).mul_(0.5)
        sum((each * torch.randn(each.shape)).sum() for each in seen).backward()
        exact = {str(i): each for i, each in enumerate(seen)}
        return Observed(exact).see_gradients(weigh, lif)

    check("Synaptic", program)


@EVERY_KIND
def test_an_input_that_cannot_be_recomputed(kind: str) -> None:
    """Of two states the input is kept instead."""

    def program(make: MakeNeuron) -> Observed:
        weigh, lif, seen = nn.Linear(5, WIDTH), make(**OPTIONS[kind], init_hidden=True), []
        for frame in torch.randn(20, BATCH, 5) * 2:
            seen += [lif(torch.special.erf(weigh(frame)) * 2), *states_of(lif)]
        sum((each * torch.randn(each.shape)).sum() for each in seen).backward()
        return Observed({"last": seen[-1]}).see_gradients(weigh, lif)

    check(kind, program, path="any")


@EVERY_KIND
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("delay", BOTH)
def test_gradients_that_are_differentiated_again(delay: bool, reset: str, kind: str) -> None:
    def program(make: MakeNeuron) -> Observed:
        options = OPTIONS[kind] | {"reset_mechanism": reset, "spike_grad": surrogate.atan()}
        if kind == "Synaptic":
            options |= {"reset_delay": delay, "learn_alpha": True, "learn_beta": True}
        net = Net(make, **options).double()
        x = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
        states, total = [tuple(torch.zeros(3, WIDTH).double() for _ in states_of(each))
                         for each in net.neurons], 0.0  # fmt: skip
        for frame in x:
            for i, layer in enumerate((net.weigh, net.readout)):
                frame, *states[i] = net.neurons[i](layer(frame.double()), *states[i])
            total = total + (frame * states[1][-1]).sum() + states[0][0].sin().sum()
        (grad,) = torch.autograd.grad(total, x, create_graph=True)
        grad.square().sum().backward()
        return Observed({}, {"first": grad.detach()}).see_gradients(net, x=x)

    # snnTorch's spikes are float32.
    check(kind, program, tolerance=1e-6, path="any")


def test_gradients_of_several_passes_with_retain_graph() -> None:
    def program(make: MakeNeuron) -> Observed:
        net = Net(make, **OPTIONS["Synaptic"], learn_alpha=True, init_hidden=True)
        losses = []
        for frame in torch.randn(15, BATCH, 5) * 2:
            out = net.neurons[1](net.readout(net.neurons[0](net.weigh(frame))))
            losses.append((out * net.neurons[0].syn).sum())
        for each in losses[::5]:
            each.backward(retain_graph=True)
        return Observed({"mem": net.neurons[0].mem}).see_gradients(net)

    check("Synaptic", program)


# ----------------------------------------------------------------------------- training as users do


@EVERY_KIND
@pytest.mark.parametrize("clear", ["utils.reset", "detach_hidden", "reset_hidden", "reset_mem"])
def test_hidden_states_cleared_between_sequences(clear: str, kind: str) -> None:
    def program(make: MakeNeuron) -> Observed:
        net, record = Net(make, **OPTIONS[kind], init_hidden=True), []
        layers = nn.Sequential(net.weigh, net.neurons[0], net.readout, net.neurons[1])
        clearing = {
            "utils.reset": lambda: utils.reset(layers),
            "detach_hidden": KINDS[kind][0].detach_hidden,
            "reset_hidden": KINDS[kind][0].reset_hidden,
            "reset_mem": lambda: [each.reset_mem() for each in net.neurons],
        }[clear]
        for _ in range(2):
            seen = []
            for t in range(9):
                if t == 6:
                    clearing()
                seen.append(layers(torch.randn(BATCH, 5) * 2))
            out = torch.stack(seen)
            (out * torch.randn(out.shape)).sum().backward()
            clearing()
            record.append(out.detach())
        return Observed({"record": torch.cat(record)}).see_gradients(net)

    check(kind, program)


@EVERY_KIND
def test_state_dict_goes_both_ways(kind: str) -> None:
    host, ours = KINDS[kind]
    options = OPTIONS[kind] | {"learn_threshold": True, "reset_mechanism": "zero"}
    for one, other in ((host, ours), (ours, host)):
        source, target = one(**options), other(**options | {"threshold": 0.3})
        source(torch.randn(2, 3, requires_grad=True))
        assert list(source.state_dict()) == list(target.state_dict())
        target.load_state_dict(source.state_dict(), strict=True)
        assert str(source.state_dict()) == str(target.state_dict())
    assert repr(ours(**options)) == repr(host(**options)).replace(kind, f"Rev{kind}")


@EVERY_KIND
def test_states_passed_with_init_hidden_are_the_hosts_error(kind: str) -> None:
    for each in KINDS[kind]:
        lif = each(**OPTIONS[kind], init_hidden=True)
        with pytest.raises(TypeError, match="should not be passed as an argument"):
            lif(torch.randn(2, 3, requires_grad=True), torch.zeros(2, 3))


@EVERY_KIND
def test_convert_restore_and_explain(kind: str, recompute_everything: None) -> None:
    host, ours = KINDS[kind]
    lif = host(**OPTIONS[kind], init_hidden=True)
    net = nn.Sequential(nn.Linear(5, WIDTH), lif, nn.Linear(WIDTH, 3))
    report = snn_revplugin.convert(net, generic=False)
    assert report.swapped == {"1": (kind, f"Rev{kind}")}
    assert not report.by_own_step and type(net[1]) is ours
    x = torch.randn(20, BATCH, 5) * 2
    for frame in x:
        net(frame)
    (row,) = snn_revplugin.explain(net).rows
    assert "an anchor every" in str(row) and not row.reasons
    snn_revplugin.restore(net)
    assert type(lif) is host and lif.reset.shape == (BATCH, WIDTH)
    net(x[0])


@EVERY_KIND
def test_reversed_potentials_are_the_potentials(kind: str) -> None:
    found = snn_revplugin.check_reversible(KINDS[kind][0](**OPTIONS[kind]))
    assert found.reversed and 1 < found.steps_between_anchors < 64
    assert 0 < found.error < 1e-4


def test_anchors_bound_the_error_of_two_states() -> None:
    """In units of the largest state's last place, as :func:`steps_between_anchors` promises."""
    for alpha, beta in ((0.5, 0.9), (0.8, 0.9), (0.9, 0.8), (0.95, 0.95)):
        found = snn_revplugin.check_reversible(
            RevSynaptic(alpha, beta, reset_mechanism="none"), torch.randn(60, 8, 64)
        )
        assert found.reversed
        rounding = 2.0 ** torch.tensor(found.largest).log2().ceil().item() * 2**-25
        assert found.error <= 5 * 2**4 * rounding, (alpha, beta, found)


@pytest.mark.parametrize("learned", BOTH)
def test_backward_rebuilds_the_anchors_between_two_stored_ones(learned: bool) -> None:
    options = OPTIONS["Synaptic"] | {"learn_alpha": learned, "learn_beta": learned}
    with snn_revplugin.use_settings(max_anchor_interval=16):
        check("Synaptic", lambda make: train(Net(make, **options), 41, start=True, mid_graph=True))


def test_two_states_take_hardly_more_memory_than_one(recompute_everything: None) -> None:
    def retained(kind: type[nn.Module]) -> int:
        net = nn.Sequential(nn.Linear(8, 512), kind(**OPTIONS["Synaptic"], init_hidden=True))
        x = torch.randn(60, 32, 8)
        report = snn_revplugin.memory_report(lambda: sum(net(each).mean() for each in x))
        return report.retained - 2 * 4 * net[1].mem.numel()  # the two states that it holds

    assert retained(snn.Synaptic) / retained(RevSynaptic) > 25

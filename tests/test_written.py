"""Writes between time steps, and between forward and backward: parameters and membrane potentials
that a training loop changes, with a version or without one (``.data``). The host's numbers, or an
error; never a wrong number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from compare import Observed, agree, assert_agree
from snntorch import utils

from snn_revplugin.adapters.snntorch import CoupledLeaky, RevLeaky

T, SHAPE = 12, (16, 40)  # 2560 bytes per time step: recomputed with the default settings


def sequence_of(lif: nn.Module, weigh: nn.Module, x: torch.Tensor, each_step=lambda t, mem: None):
    """Spikes and potentials of T time steps, with something done before each."""
    mem, spikes, mems = torch.zeros(SHAPE), [], []
    for t, frame in enumerate(x):
        each_step(t, mem)
        spk, mem = lif(weigh(frame), mem)
        spikes.append(spk)
        mems.append(mem)
    return spikes, mems


def inputs() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(20, 40), torch.randn(T, 16, 20) * 2


WRITES: dict[str, Callable[[torch.Tensor, float], None]] = {
    "another tensor": lambda tensor, value: setattr(tensor, "data", torch.tensor(value)),
    "the same memory": lambda tensor, value: tensor.data.fill_(value) and None,
}


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("name", ["beta", "threshold", "graded_spikes_factor"])
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("when", ["between sequences", "in mid-sequence"])
def test_a_parameter_written_through_data(when: str, learn: bool, name: str, how: str) -> None:
    learned = {f"learn_{name}": learn}

    def program(make) -> Observed:
        (weigh, x), lif = inputs(), make(beta=0.9, **learned)
        write = WRITES[how]
        spikes, mems = sequence_of(lif, weigh, x)
        sum(spk.sum() for spk in spikes).backward()

        def change(t: int, mem: torch.Tensor) -> None:
            if t == (0 if when == "between sequences" else 5):
                write(getattr(lif, name), 0.5)

        spikes, mems = sequence_of(lif, weigh, x, change)
        exact = {
            f"{kind} {t}": each.detach()
            for kind, found in (("spikes", spikes), ("mem", mems))
            for t, each in enumerate(found)
        }
        # In mid-sequence the host's backward reads the new factor for steps that took the old one;
        # ours has the derivative of what was computed. A learned parameter raises, see below.
        if when == "between sequences" or not (learn or name == "graded_spikes_factor"):
            (sum(spk.sum() for spk in spikes) + mems[-1].sum()).backward()
        return Observed(exact).see_gradients(weigh)

    agree(program, snn.Leaky, RevLeaky)


@pytest.mark.parametrize("name", ["beta", "threshold"])
def test_a_learned_parameter_written_through_data_before_backward_raises(name: str) -> None:
    (weigh, x), lif = inputs(), RevLeaky(beta=0.9, learn_beta=True, learn_threshold=True)
    spikes, mems = sequence_of(lif, weigh, x)
    getattr(lif, name).data.fill_(0.4)
    with pytest.raises(RuntimeError, match=r"learned parameter .* written through .data"):
        (sum(spk.sum() for spk in spikes) + mems[-1].sum()).backward()


ADAPTED = [(True, "subtract"), (True, "zero"), (True, "none"), (False, "zero"), (False, "none")]


@pytest.mark.parametrize(("delay", "reset"), ADAPTED)  # the host raises for the sixth combination
def test_a_threshold_adapted_in_the_loop(delay: bool, reset: str) -> None:
    """Homeostasis: the threshold rises with the activity, under ``no_grad``."""

    def program(make) -> Observed:
        (weigh, x), lif = inputs(), make(beta=0.9, reset_mechanism=reset, reset_delay=delay)
        mem, exact, total = torch.zeros(SHAPE), {}, 0
        for t, frame in enumerate(x):
            spk, mem = lif(weigh(frame), mem)
            with torch.no_grad():
                lif.threshold.add_(0.05 * (spk.mean() - 0.1))
            exact |= {f"spikes {t}": spk.detach(), f"mem {t}": mem.detach()}
            total = total + (spk * (t + 1)).sum()
        (total + mem.sum()).backward()
        return Observed(exact | {"threshold": lif.threshold}).see_gradients(weigh)

    agree(program, snn.Leaky, RevLeaky)


POTENTIAL_WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "scaled": lambda mem: mem.data.mul_(0.5),
    "clamped": lambda mem: mem.data.clamp_(-0.5, 0.5),
    "one element": lambda mem: mem.data[3, 4].fill_(7.0),
    "another tensor": lambda mem: setattr(mem, "data", mem.data * 0.25),
}


@pytest.mark.parametrize("how", POTENTIAL_WRITES)
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("at", [3, 7])
def test_a_potential_written_through_data_in_mid_sequence(at: int, reset: str, how: str) -> None:
    def program(make) -> Observed:
        (weigh, x), lif = inputs(), make(beta=0.9, reset_mechanism=reset)

        def write(t: int, mem: torch.Tensor) -> None:
            if t == at:
                POTENTIAL_WRITES[how](mem)

        spikes, _ = sequence_of(lif, weigh, x, write)
        exact = {f"spikes {t}": each.detach() for t, each in enumerate(spikes)}
        sum((spk * (t + 1)).sum() for t, spk in enumerate(spikes)).backward()
        return Observed(exact).see_gradients(weigh)

    agree(program, snn.Leaky, RevLeaky)


def test_a_potential_zeroed_through_data_after_the_loop() -> None:
    def program(make) -> Observed:
        (weigh, x), lif = inputs(), make(beta=0.9)
        spikes, mems = sequence_of(lif, weigh, x)
        mems[-1].data.zero_()
        sum((spk * (t + 1)).sum() for t, spk in enumerate(spikes)).backward()
        return Observed().see_gradients(weigh)

    agree(program, snn.Leaky, RevLeaky)


def test_numbers_of_the_coupled_node_set_one_after_the_other() -> None:
    """A freed buffer's identity is given to the next one: the equations must not go by it."""
    torch.manual_seed(0)
    x = torch.randn(4, 6, requires_grad=True)
    for _ in range(40):
        lif = CoupledLeaky(alpha=0.25)
        lif(x, torch.zeros(4, 6))
        lif.alpha = torch.tensor(0.5)
        lif.alpha = torch.tensor(0.75)
        seen = []
        for neuron in (lif, CoupledLeaky(alpha=0.75, reversible=False)):
            utils.reset(neuron)
            _, mem = neuron(x, torch.ones(4, 6))
            seen.append(Observed({"mem": mem.detach()}))
        assert_agree(*seen)

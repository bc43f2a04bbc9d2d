"""The chain rule through a neuron's states: partial losses, several backwards, branches,
truncation, edits of the membrane.

Each scenario is a few lines of a user's training code. It runs with the host's neuron and with
ours, for every kind of reset and for currents that can be recomputed and currents that cannot,
with anchors only a few steps apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from compare import MakeNeuron, Observed, agree, assert_agree
from either_host import step_of
from pairs import every_pair
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor

from snn_revplugin.adapters.snntorch import CoupledLeaky, RevLeaky
from snn_revplugin.adapters.spikingjelly import (
    CoupledLIFNode,
    RevIFNode,
    RevLIFNode,
    RevParametricLIFNode,
)
from snn_revplugin.settings import use_settings

pytestmark = pytest.mark.usefixtures("recompute_everything")

T = 14

SNNTORCH = (snn.Leaky, RevLeaky)
# The coupled node has no host of its own: it is compared with plain autograd on the same node.
COUPLED_SNNTORCH = (partial(CoupledLeaky, reversible=False), CoupledLeaky)
COUPLED_SPIKINGJELLY = (partial(CoupledLIFNode, reversible=False), CoupledLIFNode)
KINDS: dict[str, tuple[tuple[type, type], dict]] = {
    "Leaky, subtract": (SNNTORCH, {"beta": 0.8}),
    "Leaky, subtract, learned": (
        SNNTORCH,
        {"beta": 0.8, "learn_beta": True, "learn_threshold": True},
    ),
    "Leaky, zero": (SNNTORCH, {"beta": 0.8, "reset_mechanism": "zero", "learn_beta": True}),
    "Leaky, none": (SNNTORCH, {"beta": 0.8, "reset_mechanism": "none"}),
    "Leaky, subtract at once": (SNNTORCH, {"beta": 0.8, "reset_delay": False}),
    "Leaky, zero at once": (
        SNNTORCH,
        {"beta": 0.8, "reset_delay": False, "reset_mechanism": "zero", "learn_threshold": True},
    ),
    "IF, hard": ((neuron.IFNode, RevIFNode), {}),
    "IF, soft": ((neuron.IFNode, RevIFNode), {"v_reset": None, "detach_reset": True}),
    "LIF, hard": (
        (neuron.LIFNode, RevLIFNode),
        {"v_reset": -0.1, "surrogate_function": surrogate.ATan()},
    ),
    "LIF, soft": ((neuron.LIFNode, RevLIFNode), {"v_reset": None, "tau": 1.6}),
    "PLIF, soft": (
        (neuron.ParametricLIFNode, RevParametricLIFNode),
        {"v_reset": None, "decay_input": False},
    ),
    "PLIF, hard": ((neuron.ParametricLIFNode, RevParametricLIFNode), {}),
    "coupled Leaky, soft": (COUPLED_SNNTORCH, {"split_dim": -1}),
    "coupled Leaky, hard": (
        COUPLED_SNNTORCH,
        {"split_dim": -1, "reset_mechanism": "zero", "detach_reset": False, "alpha": 0.7},
    ),
    "coupled LIF, hard": (COUPLED_SPIKINGJELLY, {"split_dim": -1, "v_reset": -0.1, "beta": 0.6}),
    "coupled LIF, soft": (COUPLED_SPIKINGJELLY, {"split_dim": -1, "v_reset": None, "tau": 1.2}),
}
SOURCES = ("a leaf", "a convolution of data", "a linear layer on spikes")


class Cell(nn.Module):
    """A neuron, and ``T`` currents for it.

    Args:
        source: what the currents come from; a leaf cannot be recomputed.
    """

    def __init__(self, make: MakeNeuron, options: dict, source: str) -> None:
        super().__init__()
        self.lif = make(**options)
        self.inputs = [torch.randn(2, 1, 8, requires_grad=True) for _ in range(T)]
        if source == "a leaf":
            self.currents = self.inputs = [
                (torch.randn(2, 1, 6) + 0.4).requires_grad_() for _ in range(T)
            ]
        elif source == "a convolution of data":
            self.weigh = nn.Conv1d(1, 1, 3)
            nn.init.constant_(self.weigh.bias, 0.5)
            self.currents = [self.weigh(2 * x) for x in self.inputs]
        else:
            self.below, self.weigh = make(**options), nn.Linear(8, 6)
            nn.init.normal_(self.weigh.weight)
            nn.init.constant_(self.weigh.bias, 0.4)
            v, self.currents = torch.zeros(2, 1, 8), []
            for x in self.inputs:
                spikes, v = step_of(self.below, 2 * x, v)
                self.currents.append(self.weigh(spikes))
        self.start = torch.zeros(2, 1, 6, requires_grad=True)

    def forward(self, t: int, v: Tensor) -> tuple[Tensor, Tensor]:
        return step_of(self.lif, self.currents[t], v)

    def run(self, v: Tensor, first: int = 0, last: int = T) -> tuple[list[Tensor], list[Tensor]]:
        spikes, potentials = [], []
        for t in range(first, last):
            s, v = self(t, v)
            spikes.append(s)
            potentials.append(v)
        return spikes, potentials


def weighted(*tensors: Tensor) -> Tensor:
    """A loss that reads each element of each tensor."""
    return sum((each * torch.randn(each.shape)).sum() for each in tensors)


def loss_on_all_steps(cell: Cell) -> dict:
    spikes, potentials = cell.run(cell.start)
    weighted(*spikes, *potentials).backward()
    return {"s": spikes, "v": potentials}


def loss_on_some_spikes(cell: Cell) -> dict:
    spikes, potentials = cell.run(cell.start)
    weighted(spikes[2], spikes[9]).backward()
    return {"s": spikes, "v": potentials}


def loss_on_one_membrane_in_the_middle(cell: Cell) -> dict:
    _, potentials = cell.run(cell.start)
    weighted(potentials[6]).backward()
    return {"v": potentials}


def loss_on_the_last_membrane(cell: Cell) -> dict:
    _, potentials = cell.run(cell.start)
    weighted(potentials[-1]).backward()
    return {"v": potentials}


def loss_on_the_first_spikes(cell: Cell) -> dict:
    spikes, _ = cell.run(cell.start)
    weighted(spikes[0]).backward()
    return {"s": spikes}


def a_backward_for_every_step_with_retain_graph(cell: Cell) -> dict:
    spikes, potentials = cell.run(cell.start)
    for t in (3, 0, T - 1, 8, 8):
        weighted(spikes[t], potentials[t]).backward(retain_graph=True)
    weighted(*spikes).backward()
    return {"s": spikes}


def backward_and_on_from_the_same_membrane(cell: Cell) -> dict:
    spikes, potentials = cell.run(cell.start, 0, 8)
    weighted(*spikes).backward(retain_graph=True)
    more, further = cell.run(potentials[-1], 8, T)
    weighted(*more, *further).backward()
    return {"s": spikes + more}


def two_branches_from_one_membrane(cell: Cell) -> dict:
    spikes, potentials = cell.run(cell.start, 0, 6)
    left = cell.run(potentials[-1], 6, T)
    right = cell.run(potentials[-1], 8, T)
    weighted(*spikes, *left[0], *right[0], left[1][-1], right[1][-1]).backward()
    return {"s": spikes + left[0] + right[0]}


def a_branch_from_every_membrane(cell: Cell) -> dict:
    _, potentials = cell.run(cell.start)
    branches = [cell((t + 3) % T, v) for t, v in enumerate(potentials)]
    weighted(*(s for s, _ in branches), *(v for _, v in branches)).backward()
    return {"s": [s for s, _ in branches]}


def branches_with_a_backward_each(cell: Cell) -> dict:
    _, potentials = cell.run(cell.start, 0, 7)
    left, right = cell.run(potentials[-1], 7, T), cell.run(potentials[4], 7, T)
    weighted(*left[0]).backward(retain_graph=True)
    weighted(*right[1]).backward()
    return {"s": left[0] + right[0]}


def a_branch_begun_after_a_backward(cell: Cell) -> dict:
    spikes, potentials = cell.run(cell.start)
    weighted(*spikes[10:]).backward(retain_graph=True)
    more = cell.run(potentials[4], 5, 9)
    weighted(*more[0], *more[1], spikes[2]).backward()
    return {"s": spikes + more[0]}


def truncated_by_detach_in_place(cell: Cell) -> dict:
    record, v = [], cell.start
    for t in range(T):
        s, v = cell(t, v)
        record.append(s)
        if t % 5 == 4:
            weighted(*record[t - 4 :], v * 1).backward(retain_graph=True)
            v.detach_()
    return {"s": record, "v": [v]}


def truncated_by_detach_in_place_before_the_backward(cell: Cell) -> dict:
    record, v = [], cell.start
    for t in range(T):
        s, v = cell(t, v)
        record.append(s)
        if t % 5 == 4:
            v.detach_()
    weighted(*record).backward()
    return {"s": record, "v": [v]}


def truncated_by_a_detached_copy(cell: Cell) -> dict:
    record, v = [], cell.start
    for t in range(T):
        s, v = cell(t, v)
        record += [s, v]
        if t % 4 == 3:
            v = v.detach()
    weighted(*record).backward()
    return {"s": record}


def a_clone_in_mid_sequence(cell: Cell) -> dict:
    spikes, potentials = cell.run(cell.start, 0, 6)
    more, further = cell.run(potentials[-1].clone(), 6, T)
    weighted(*spikes, *more, further[-1]).backward()
    return {"s": spikes + more}


def a_membrane_rebuilt_by_the_user(cell: Cell) -> dict:
    spikes, potentials = cell.run(cell.start, 0, 6)
    more, further = cell.run(potentials[-1] * 0.5 + 0.1 * spikes[-1], 6, T)
    weighted(*spikes, *more, further[-1]).backward()
    return {"s": spikes + more}


def membranes_zeroed_for_part_of_a_batch(cell: Cell) -> dict:
    spikes, potentials = cell.run(cell.start, 0, 6)
    more, further = cell.run(
        torch.where(torch.tensor([[[True]], [[False]]]), potentials[-1], 0.0), 6, T
    )
    weighted(*spikes, *more, further[-1]).backward()
    return {"s": spikes + more}


def _edited(cell: Cell, edit: Callable[[Tensor], object]) -> dict:
    record, v = [], cell.start
    for t in range(T):
        s, v = cell(t, v)
        record.append(s)
        if t in (2, 3, 9):
            edit(v)
    weighted(*record, v).backward()
    return {"s": record, "v": [v]}


def membrane_scaled_in_place(cell: Cell) -> dict:
    return _edited(cell, lambda v: v.mul_(0.5))


def membrane_partly_overwritten(cell: Cell) -> dict:
    return _edited(cell, lambda v: v[0].fill_(0.3))


def membrane_written_into_under_no_grad(cell: Cell) -> dict:
    def edit(v: Tensor) -> None:
        with torch.no_grad():
            v.clamp_(max=0.2)

    return _edited(cell, edit)


def membrane_zeroed_in_place_and_detached(cell: Cell) -> dict:
    return _edited(cell, lambda v: v.detach_().zero_())


def membranes_written_into_between_forward_and_backward(cell: Cell) -> dict:
    spikes, potentials = cell.run(cell.start)
    loss = weighted(*spikes, *potentials)
    with torch.no_grad():
        for t in (1, 5, 6, T - 1):
            potentials[t].zero_()
    loss.backward()
    return {"s": spikes}


def start_written_into_between_forward_and_backward(cell: Cell) -> dict:
    start = torch.full((2, 1, 6), 0.3)
    spikes, potentials = cell.run(start)
    loss = weighted(*spikes, *potentials)
    start.add_(1)
    loss.backward()
    return {"s": spikes}


def gradients_of_currents_and_start(cell: Cell) -> dict:
    """``autograd.grad`` with chosen inputs walks a part of the graph; afterwards all of it is
    walked."""
    spikes, potentials = cell.run(cell.start)
    loss = weighted(*spikes, potentials[-1])
    at = torch.autograd.grad(loss, [cell.currents[4], cell.currents[11]], retain_graph=True)
    alone = torch.autograd.grad(weighted(potentials[7]), [cell.currents[2]], retain_graph=True)
    start = torch.autograd.grad(loss, cell.start, retain_graph=True)
    loss.backward()
    return {"s": spikes, "gradients": [*at, *alone, *start]}


def gradients_of_a_membrane(cell: Cell) -> dict:
    """In snnTorch a spike is a function of the membrane that comes with it, and that gradient is
    part of the membrane's."""
    spikes, potentials = cell.run(cell.start)
    loss = weighted(*spikes, potentials[-1])
    at = torch.autograd.grad(loss, [potentials[4], potentials[9]], retain_graph=True)
    alone = torch.autograd.grad(weighted(potentials[7]), [potentials[2]])
    return {"s": spikes, "gradients": [*at, *alone]}


def gradients_of_spikes(cell: Cell) -> dict:
    """A reset at once is a function of the spikes in snnTorch, and that gradient is part of
    theirs."""
    spikes, potentials = cell.run(cell.start)
    return {
        "s": spikes,
        "gradients": torch.autograd.grad(weighted(*spikes, potentials[-1]), [spikes[4], spikes[9]]),
    }


def gradients_given_to_several_roots(cell: Cell) -> dict:
    spikes, potentials = cell.run(cell.start)
    roots = [spikes[3], potentials[7], spikes[-1]]
    torch.autograd.backward(roots, [torch.randn_like(each) for each in roots])
    return {"s": spikes}


def a_hook_that_clips_the_membranes_gradient(cell: Cell) -> dict:
    spikes, potentials = cell.run(cell.start)
    for v in potentials:
        v.register_hook(lambda grad: grad.clamp(-0.5, 0.5))
    weighted(*spikes, potentials[-1]).backward()
    return {"s": spikes}


def hooks_on_currents_and_spikes(cell: Cell) -> dict:
    seen = []
    cell.currents[5].register_hook(lambda grad: seen.append(grad) or grad * 0.5)
    spikes, potentials = cell.run(cell.start)
    cell.currents[8].register_hook(lambda grad: seen.append(grad))
    weighted(*spikes, potentials[-1]).backward()
    return {"s": spikes, "gradients": seen}


def membranes_that_feed_other_layers(cell: Cell) -> dict:
    spikes, v = [], cell.start
    for t in range(T):
        s, v = step_of(cell.lif, cell.currents[t] + 0.3 * v, v)
        spikes.append(s)
    weighted(*spikes, v).backward()
    return {"s": spikes}


def spikes_fed_back(cell: Cell) -> dict:
    spikes, s, v = [], torch.zeros(2, 1, 6), cell.start
    for t in range(T):
        s, v = step_of(cell.lif, cell.currents[t] - 0.4 * s.roll(1, -1), v)
        spikes.append(s)
    weighted(*spikes, v).backward()
    return {"s": spikes}


def a_synapse_of_the_users_own(cell: Cell) -> dict:
    spikes, current, v = [], torch.zeros(2, 1, 6), cell.start
    for t in range(T):
        current = 0.6 * current + cell.currents[t]
        s, v = step_of(cell.lif, current, v)
        spikes.append(s)
    weighted(*spikes, v, current).backward()
    return {"s": spikes}


def spikes_taken_for_a_membrane(cell: Cell) -> dict:
    spikes, _ = cell.run(cell.start, 0, 4)
    more, further = cell.run(spikes[-1], 4, T)
    weighted(*spikes, *more, further[-1]).backward()
    return {"s": spikes + more}


def steps_without_gradient_in_between(cell: Cell) -> dict:
    spikes, potentials = cell.run(cell.start, 0, 5)
    with torch.no_grad():
        quiet, still = cell.run(potentials[-1], 5, 8)
    more, further = cell.run(still[-1], 8, T)
    weighted(*spikes, *more, further[-1]).backward()
    return {"s": spikes + quiet + more}


def a_current_changed_in_place_after_the_step(cell: Cell) -> dict:
    spikes, v = [], cell.start
    for t in range(T):
        current = cell.currents[t] * 1
        s, v = step_of(cell.lif, current, v)
        current.add_(s)
        spikes.append(s + current)
    weighted(*spikes, v).backward()
    return {"s": spikes}


def one_current_for_several_steps(cell: Cell) -> dict:
    spikes, v = [], cell.start
    for t in range(T):
        s, v = cell(t // 5, v)
        spikes.append(s)
    weighted(*spikes, v, cell.currents[0]).backward()
    return {"s": spikes}


def a_backward_after_every_step_of_forward(cell: Cell) -> dict:
    spikes, v = [], cell.start
    for t in range(T):
        s, v = cell(t, v)
        spikes.append(s)
        weighted(s, v).backward(retain_graph=True)
    return {"s": spikes, "v": [v]}


def one_neuron_for_two_layers(cell: Cell) -> dict:
    spikes, v, w = [], cell.start, torch.zeros(2, 1, 4)
    for t in range(T):
        s, v = cell(t, v)
        above, w = step_of(cell.lif, 1.5 * s[..., 1:5] + 0.3, w)
        spikes += [s, above]
    weighted(*spikes, v, w).backward()
    return {"s": spikes, "v": [v, w]}


def a_graph_of_the_gradient_that_is_not_used(cell: Cell) -> dict:
    spikes, potentials = cell.run(cell.start)
    gradients = torch.autograd.grad(
        weighted(*spikes, potentials[-1]), [cell.start, cell.currents[3]], create_graph=True
    )
    return {"s": spikes, "gradients": [each.detach() for each in gradients]}


SCENARIOS: tuple[Callable[[Cell], dict], ...] = (
    loss_on_all_steps,
    loss_on_some_spikes,
    loss_on_one_membrane_in_the_middle,
    loss_on_the_last_membrane,
    loss_on_the_first_spikes,
    a_backward_for_every_step_with_retain_graph,
    backward_and_on_from_the_same_membrane,
    two_branches_from_one_membrane,
    a_branch_from_every_membrane,
    branches_with_a_backward_each,
    a_branch_begun_after_a_backward,
    truncated_by_detach_in_place,
    truncated_by_detach_in_place_before_the_backward,
    truncated_by_a_detached_copy,
    a_clone_in_mid_sequence,
    a_membrane_rebuilt_by_the_user,
    membranes_zeroed_for_part_of_a_batch,
    membrane_scaled_in_place,
    membrane_partly_overwritten,
    membrane_written_into_under_no_grad,
    membrane_zeroed_in_place_and_detached,
    membranes_written_into_between_forward_and_backward,
    start_written_into_between_forward_and_backward,
    gradients_of_currents_and_start,
    gradients_of_a_membrane,
    gradients_of_spikes,
    gradients_given_to_several_roots,
    a_hook_that_clips_the_membranes_gradient,
    hooks_on_currents_and_spikes,
    membranes_that_feed_other_layers,
    spikes_fed_back,
    a_synapse_of_the_users_own,
    spikes_taken_for_a_membrane,
    steps_without_gradient_in_between,
    a_current_changed_in_place_after_the_step,
    a_backward_after_every_step_of_forward,
    one_neuron_for_two_layers,
    a_graph_of_the_gradient_that_is_not_used,
    one_current_for_several_steps,
)


def observed_in(cell: Cell, scenario: Callable[[Cell], dict]) -> Observed:
    seen = scenario(cell)
    observed = Observed(
        {f"{name}{i}": each for name in ("s", "v") for i, each in enumerate(seen.get(name, ()))}
    )
    observed.gradients = {f"at {i}": each for i, each in enumerate(seen.get("gradients", ()))}
    return observed.see_gradients(
        cell, start=cell.start, **{f"x{t}": x for t, x in enumerate(cell.inputs)}
    )


IN_PLACE = "modified by an inplace operation"


def host_can(kind: str, source: str, scenario: Callable[[Cell], dict]) -> bool:
    """Whether the host itself runs a scenario: it may have saved a tensor that the scenario writes
    into."""
    (host, _), options = KINDS[kind]
    try:
        torch.manual_seed(0)
        scenario(Cell(host, options, source))
    except RuntimeError as error:
        assert IN_PLACE in str(error)
        return False
    return True


def assert_raises_or_is_right(kind: str, source: str, scenario: Callable[[Cell], dict]) -> None:
    """Where the host raises, ours may raise too, or give the gradients of the values before the
    write: the host gives those once autograd saves copies."""
    (host, ours), options = KINDS[kind]
    torch.manual_seed(0)
    try:
        seen = observed_in(Cell(ours, options, source), scenario)
    except RuntimeError as error:
        assert IN_PLACE in str(error)
        return
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        expected = observed_in(Cell(host, options, source), scenario)
    assert_agree(expected, seen)


@pytest.mark.parametrize(
    ("scenario", "kind", "source"),
    every_pair(product(SCENARIOS, KINDS, SOURCES)),
    ids=lambda each: getattr(each, "__name__", each),
)
def test_chain_rule(scenario: Callable[[Cell], dict], kind: str, source: str) -> None:
    kinds, options = KINDS[kind]

    def program(make: MakeNeuron) -> Observed:
        return observed_in(Cell(make, options, source), scenario)

    with use_settings(max_anchor_interval=4, rebuild_interval=3):
        if host_can(kind, source, scenario):
            path = "both" if scenario is steps_without_gradient_in_between else "reversible"
            neurons = agree(program, *kinds, path="any")
            if path == "both":
                assert neurons[0].record.statistics.fallback_calls == 3
            else:
                assert not any(each.record.statistics.fallback_calls for each in neurons)
            assert all(each.record.statistics.steps for each in neurons)
        else:
            assert_raises_or_is_right(kind, source, scenario)


def _layers(
    make: MakeNeuron, options: dict, length: int, scale: float = 1.0, bias: float = 0.3
) -> Observed:
    """Two layers of neurons over many steps; the second one's currents are recomputed from the
    first one's spikes."""
    below, weigh, lif = make(**options), nn.Linear(8, 6), make(**options)
    nn.init.normal_(weigh.weight, std=0.7)
    nn.init.constant_(weigh.bias, bias)
    x = (torch.randn(length, 3, 8) + 0.5).requires_grad_()
    v1, v2, record = torch.zeros(3, 8), torch.zeros(3, 6), []
    for frame in x * scale:
        s1, v1 = step_of(below, frame, v1)
        s2, v2 = step_of(lif, weigh(s1) * scale, v2)
        record += [s2, v2 / scale]
    seen = torch.stack(record)
    (seen * torch.randn(seen.shape)).sum().backward()
    return Observed({"seen": seen}).see_gradients(below, weigh, lif, x=x)


DECAYS = {
    **{
        f"Leaky {beta}": (SNNTORCH, {"beta": beta, "learn_beta": True})
        for beta in (0.02, 0.3, 0.7, 0.95, 0.999, 1.0)
    },
    "Leaky, one decay a neuron": (
        SNNTORCH,
        {"beta": torch.tensor([0.3]), "learn_beta": True, "reset_mechanism": "none"},
    ),
    **{
        f"LIF {tau}": ((neuron.LIFNode, RevLIFNode), {"tau": tau, "v_reset": None})
        for tau in (1.01, 1.3, 2.0, 20.0, 1e4)
    },
    **{
        f"PLIF {tau}": (
            (neuron.ParametricLIFNode, RevParametricLIFNode),
            {"init_tau": tau, "v_reset": None},
        )
        for tau in (1.05, 2.0, 50.0)
    },
    "IF": ((neuron.IFNode, RevIFNode), {"v_reset": None}),
}


@pytest.mark.parametrize("name", DECAYS)
def test_rounding_is_bounded_over_long_sequences(name: str) -> None:
    kinds, options = DECAYS[name]
    agree(lambda make: _layers(make, options, length=150), *kinds)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.03, 30.0, 1e4, 1e8])
@pytest.mark.parametrize(
    "kind", ["Leaky, subtract, learned", "Leaky, none", "IF, soft", "LIF, soft", "PLIF, soft"]
)
def test_potentials_far_below_and_far_above_the_threshold(kind: str, scale: float) -> None:
    kinds, options = KINDS[kind]
    agree(lambda make: _layers(make, options, length=40, scale=scale), *kinds)


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 1e-6, 0.01, 30.0, 1e4, 1e8, float("inf")])
@pytest.mark.parametrize(
    "kind",
    [
        "Leaky, subtract, learned",
        "Leaky, zero",
        "Leaky, none",
        "IF, soft",
        "LIF, soft",
        "PLIF, soft",
    ],
)
def test_any_threshold(kind: str, threshold: float) -> None:
    """Zero and negative ones; ones never reached, as readouts that are not to fire have them."""
    kinds, options = KINDS[kind]
    name = "threshold" if kind.startswith("Leaky") else "v_threshold"
    options = {key: value for key, value in options.items() if key != "learn_threshold"}
    agree(lambda make: _layers(make, options | {name: threshold}, length=40), *kinds)


def test_thresholds_of_very_different_sizes_in_one_layer() -> None:
    def program(make: MakeNeuron) -> Observed:
        options = {"beta": 0.9, "learn_beta": True, "learn_threshold": True}
        below, weigh = make(**options), nn.Linear(6, 6)
        lif = make(threshold=torch.tensor([1e-3, 0.02, 0.5, 3.0, 200.0, 1e5]), **options)
        x, v1, v2, loss = torch.randn(40, 3, 6) + 0.5, torch.zeros(3, 6), torch.zeros(3, 6), 0.0
        for frame in x:
            s1, v1 = below(frame, v1)
            s2, v2 = lif(weigh(s1), v2)
            loss = loss + (s2 + v2 * torch.randn(v2.shape)).sum()
        loss.backward()
        return Observed({"s": s2, "v": v2}).see_gradients(below, weigh, lif)

    agree(program, *SNNTORCH)


def test_one_neuron_among_many_that_explodes() -> None:
    """Its potential is so large that a normal one next to it would be swallowed; the others'
    gradients must not suffer."""

    def program(make: MakeNeuron) -> Observed:
        below, weigh, lif = make(v_reset=None), nn.Linear(6, 4), make(v_reset=None)
        with torch.no_grad():
            weigh.weight[0] = 3e6
        x, record = (torch.randn(40, 3, 6) + 0.5).requires_grad_(), []
        for t, frame in enumerate(x):
            current = weigh(below(frame))
            record.append(lif(current * torch.tensor([1.0 if t in (3, 20) else 1e-6, 1, 1, 1])))
        seen = torch.stack(record)
        (seen * torch.randn(seen.shape)).sum().backward()
        gradients = {f"row {i}": row for i, row in enumerate(weigh.weight.grad)}
        return Observed({"seen": seen, "v": lif.v}, gradients)

    agree(program, neuron.LIFNode, RevLIFNode)


def test_a_long_synapse_of_the_users_own() -> None:
    """A recurrence outside the neuron makes a current that hangs on all the currents before it."""

    def program(make: MakeNeuron) -> Observed:
        below, weigh, lif = make(beta=0.9), nn.Linear(6, 4), make(beta=0.9)
        v1, v2, current, loss = torch.zeros(3, 6), torch.zeros(3, 4), torch.zeros(3, 4), 0.0
        for frame in (torch.randn(600, 3, 6) + 0.5).requires_grad_():
            s1, v1 = below(frame, v1)
            current = 0.8 * current + weigh(s1)
            s2, v2 = lif(current, v2)
            loss = loss + (s2 * torch.randn(s2.shape)).sum()
        loss.backward()
        return Observed({"s": s2, "v": v2}).see_gradients(weigh)

    agree(program, *SNNTORCH)

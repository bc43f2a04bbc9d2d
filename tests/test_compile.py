"""``torch.compile``: neurons are operators, the graph does not break, and spikes are those of the
host without a compiler."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from compare import Observed, assert_agree
from pairs import every_pair
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import functional, neuron
from spikingjelly.activation_based import surrogate as sj_surrogate
from torch import Tensor

import snn_revplugin
from snn_revplugin.adapters.snntorch import CoupledLeaky, RevLapicque, RevLeaky, RevSynaptic
from snn_revplugin.adapters.spikingjelly import (
    CoupledLIFNode,
    RevIFNode,
    RevLIFNode,
    RevParametricLIFNode,
)
from snn_revplugin.cli.workloads import CheckpointedBlock
from snn_revplugin.compile import operators
from snn_revplugin.compile.equations import KINDS, equations_id
from snn_revplugin.compile.operators import SEQUENCE_KEEPS, STEP_KEEPS
from snn_revplugin.swap.module import HAS_COMPILER, OLDEST_COMPILER
from snn_revplugin.torch_internals.transforms import recomputed_when_compiled

T = 3
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # those of the compiler
    pytest.mark.skipif(
        not HAS_COMPILER,
        reason=f"before torch {OLDEST_COMPILER} the host's own path is compiled (test_tools.py)",
    ),
]
Make = Callable[..., nn.Module]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """Nets of earlier tests go first: SpikingJelly's ``reset_net`` keeps a weak dictionary of nets,
    the compiler guards it by position, and fails where one of them goes while it compiles."""
    torch.compiler.reset()
    gc.collect()


class TimeLoop(nn.Module):
    """linear-neuron-linear in a loop over time, with the states passed on or held by the
    module."""

    def __init__(self, make: Make, mode: str = "s", **options: Any) -> None:
        super().__init__()
        self.first, self.neuron, self.second = nn.Linear(6, 8), make(**options), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        spikes, currents = [], self.first(x)
        if isinstance(self.neuron, snn.SpikingNeuron):
            states = self.neuron.reset_mem()
            states = states if isinstance(states, tuple) else (states,)
            for current in currents:
                if self.neuron.init_hidden:
                    spikes.append(self.neuron(current))
                else:
                    s, *states = self.neuron(current, *states)
                    spikes.append(s)
            seen = {"potential": self.neuron.mem}
            if isinstance(self.neuron, snn.Synaptic):
                seen["synaptic current"] = self.neuron.syn
            if hasattr(self.neuron, "reset"):
                seen["reset"] = self.neuron.reset
        else:
            functional.reset_net(self.neuron)
            if self.neuron.step_mode == "m":
                spikes = list(self.neuron(currents))
            else:
                spikes = [self.neuron(current) for current in currents]
            seen = {"potential": self.neuron.v}
            if self.neuron.store_v_seq:
                seen["path"] = self.neuron.v_seq
        return {"spikes": torch.stack(spikes), "outputs": self.second(torch.stack(spikes)), **seen}


def observe(
    net: nn.Module,
    run: Callable[[Tensor], dict[str, Tensor]] | None = None,
    dtype: torch.dtype = torch.float32,
):
    x = (
        (2 * torch.randn(T, 5, 6, generator=torch.Generator().manual_seed(0)))
        .to(dtype)
        .requires_grad_()
    )
    seen = (net if run is None else run)(x)
    loss = sum(
        (each * torch.linspace(0.5, 1.5, each.numel()).view(each.shape)).sum()
        for each in seen.values()
    )
    loss.backward()
    return Observed({name: each.detach() for name, each in seen.items()}).see_gradients(net, x=x)


def check(
    host: Make,
    ours: Make,
    *,
    backend: str = "aot_eager",
    keeps: str | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> TimeLoop:
    """The host's eager run, and ours compiled without a break of the graph."""
    nets = []
    for make in (host, ours):
        torch.manual_seed(0)
        nets.append(TimeLoop(make, **options).to(dtype))
    expected = observe(nets[0], dtype=dtype)
    found = observe(nets[1], torch.compile(nets[1], backend=backend, fullgraph=True), dtype)
    assert 0.02 < expected.exact["spikes"].ge(0.5).double().mean() < 0.98
    assert_agree(expected, found)
    if keeps is not None:
        assert nets[1].neuron._compiled_calls.keeps == keeps
        assert keeps in str(snn_revplugin.explain(nets[1])) or not keeps
    return nets[1]


LEAKY = {
    "plain": {},
    "hidden": {"init_hidden": True},
    "zero": {"reset_mechanism": "zero"},
    "none": {"reset_mechanism": "none", "spike_grad": snn_surrogate.fast_sigmoid(slope=10)},
    "learned": {"learn_beta": True, "learn_threshold": True, "learn_graded_spikes_factor": True},
    "at once": {"reset_delay": False, "learn_threshold": True, "learn_graded_spikes_factor": True},
    "zero at once": {"reset_delay": False, "reset_mechanism": "zero", "learn_beta": True},
    "each neuron's own": {
        "beta": torch.linspace(-0.1, 1.1, 8),
        "learn_beta": True,
        "threshold": torch.linspace(0.5, 1, 8),
    },
}
LEARNED = {"learn_alpha": True, "learn_beta": True, "learn_threshold": True}
SYNAPTIC = {
    "plain": {},
    "hidden": {"init_hidden": True, "reset_mechanism": "none"},
    "learned": LEARNED,
    "zero at once": {"reset_delay": False, "reset_mechanism": "zero"} | LEARNED,
}
LAPICQUE = {
    "a negative decay": {"beta": 0.2, "init_hidden": True},
    "zero": {"R": 2.0, "C": 1.5, "time_step": 0.5, "reset_mechanism": "zero"},
}
NODES = {"IF": (neuron.IFNode, RevIFNode), "LIF": (neuron.LIFNode, RevLIFNode)}
NODES["PLIF"] = neuron.ParametricLIFNode, RevParametricLIFNode
OPTIONS = {
    "hard": {},
    "soft": {"v_reset": None, "surrogate_function": sj_surrogate.ATan()},
    "detached": {"detach_reset": True, "v_reset": 0.1},
    "path": {"store_v_seq": True},
}


@pytest.mark.parametrize("options", LEAKY.values(), ids=LEAKY)
def test_leaky(options: dict[str, Any]) -> None:
    check(snn.Leaky, RevLeaky, keeps=STEP_KEEPS, **({"beta": 0.8} | options))


@pytest.mark.parametrize("options", SYNAPTIC.values(), ids=SYNAPTIC)
def test_synaptic(options: dict[str, Any]) -> None:
    check(snn.Synaptic, RevSynaptic, keeps=STEP_KEEPS, alpha=0.6, beta=0.8, **options)


@pytest.mark.parametrize("options", LAPICQUE.values(), ids=LAPICQUE)
def test_lapicque(options: dict[str, Any]) -> None:
    check(snn.Lapicque, RevLapicque, keeps=STEP_KEEPS, threshold=0.15, **options)


@pytest.mark.parametrize(("kind", "mode", "options"), every_pair(product(NODES, "sm", OPTIONS)))
def test_node(kind: str, mode: str, options: str) -> None:
    def build(node: Make) -> Make:
        return lambda **others: node(step_mode=mode, **others)

    check(
        *(build(each) for each in NODES[kind]),
        keeps=SEQUENCE_KEEPS if mode == "m" else STEP_KEEPS,
        **OPTIONS[options],
    )


@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_coupled_leaky(reset: str) -> None:
    def plain(**options: Any) -> nn.Module:
        return CoupledLeaky(reversible=False, **options)

    check(plain, CoupledLeaky, keeps=operators.OUTPUTS_KEEP, beta=0.8, reset_mechanism=reset)


@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("mode", ["s", "m"])
def test_coupled_node(mode: str, v_reset: float | None) -> None:
    def plain(**options: Any) -> nn.Module:
        return CoupledLIFNode(reversible=False, step_mode=mode, **options)

    def ours(**options: Any) -> nn.Module:
        return CoupledLIFNode(step_mode=mode, **options)

    keeps = operators.OUTPUTS_KEEP
    check(plain, ours, keeps=keeps, v_reset=v_reset)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    def build(node: Make) -> Make:
        return lambda **others: node(step_mode="m", **others)

    check(build(neuron.LIFNode), build(RevLIFNode), keeps=SEQUENCE_KEEPS, dtype=dtype)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("kind", ["Leaky", "PLIF"])
def test_inductor(kind: str) -> None:
    if kind == "Leaky":
        check(
            snn.Leaky,
            RevLeaky,
            backend="inductor",
            keeps=STEP_KEEPS,
            beta=0.8,
            reset_delay=False,
            learn_threshold=True,
        )
        return
    host, ours = NODES[kind]
    check(
        lambda **others: host(step_mode="m", **others),
        lambda **others: ours(step_mode="m", **others),
        backend="inductor",
        keeps=SEQUENCE_KEEPS,
    )


def test_the_backend_that_compiles_nothing() -> None:
    check(snn.Leaky, RevLeaky, backend="eager", keeps=STEP_KEEPS, beta=0.8)


# ------------------------------------------------------------------------------ the host's own path


def test_what_operators_cannot_express_takes_the_hosts_path() -> None:
    def spike(z: Tensor) -> Tensor:
        return snn_surrogate.ATan.apply(z, 2.0)

    check(snn.Leaky, RevLeaky, keeps="", beta=0.8, spike_grad=spike)
    check(snn.Leaky, lambda **options: RevLeaky(reversible=False, **options), keeps="", beta=0.8)


def test_without_gradients_the_hosts_path_is_compiled() -> None:
    net = TimeLoop(RevLeaky, beta=0.8)
    with torch.no_grad():
        torch.compile(net, backend="eager", fullgraph=True)(torch.randn(T, 5, 6))
    assert net.neuron._compiled_calls.keeps == ""


def test_what_changes_is_compiled_again() -> None:
    """Numbers and surrogates that the graph holds are guarded."""
    nets = []
    for make in (snn.Leaky, RevLeaky):
        torch.manual_seed(0)
        nets.append(TimeLoop(make, beta=0.8, spike_grad=snn_surrogate.fast_sigmoid(slope=25)))
    compiled = torch.compile(nets[1], backend="aot_eager", fullgraph=True)
    assert_agree(observe(nets[0]), observe(nets[1], compiled))
    for net in nets:
        net.neuron.spike_grad = snn_surrogate.fast_sigmoid(slope=5)
        net.neuron.beta = torch.tensor(0.6)
        net.zero_grad()
    assert_agree(observe(nets[0]), observe(nets[1], compiled))

    nodes = [TimeLoop(each, step_mode="m") for each in (neuron.LIFNode, RevLIFNode)]
    nodes[1].load_state_dict(nodes[0].state_dict())
    compiled = torch.compile(nodes[1], backend="aot_eager", fullgraph=True)
    for threshold, tau in ((1.0, 2.0), (0.6, 3.0), (0.7, 1.5)):
        for net in nodes:
            net.neuron.v_threshold, net.neuron.tau = threshold, tau
            net.zero_grad()
        assert_agree(observe(nodes[0]), observe(nodes[1], compiled))


def test_sizes_that_are_not_known_when_it_is_compiled() -> None:
    net = TimeLoop(RevLIFNode, step_mode="m")
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (5, 3, 9):
        x = torch.randn(T, size, 6)
        found = compiled(x)
        assert torch.equal(found["spikes"], net(x)["spikes"])
        found["outputs"].sum().backward()


def test_around_a_compiled_step_the_loop_is_ordinary() -> None:
    """One step is compiled, the loop is not: its potentials go in and out of the graph."""
    seen = []
    for make in (snn.Leaky, RevLeaky):
        torch.manual_seed(0)
        first, leaky = nn.Linear(6, 8), make(beta=0.8)

        def step(
            x: Tensor, mem: Tensor, first: nn.Module = first, leaky: nn.Module = leaky
        ) -> tuple[Tensor, Tensor]:
            return leaky(first(x), mem)

        compiled = (
            step if make is snn.Leaky else torch.compile(step, backend="aot_eager", fullgraph=True)
        )
        mem, spikes = torch.zeros(5, 8), []
        for x in 2 * torch.randn(T, 5, 6):
            spk, mem = compiled(x, mem)
            spikes.append(spk)
        (torch.stack(spikes).sum() + mem.square().sum()).backward()
        seen.append(Observed({"spikes": torch.stack(spikes).detach()}).see_gradients(first))
    assert_agree(*seen)


def test_inside_of_a_checkpoint() -> None:
    """The compiler computes the block again; the neuron's operators with it."""
    seen = []
    for make in (neuron.LIFNode, RevLIFNode):
        torch.manual_seed(0)
        block = CheckpointedBlock(nn.Linear(6, 8), nn.Identity(), make(step_mode="m"))
        run = (
            block
            if make is neuron.LIFNode
            else torch.compile(block, backend="aot_eager", fullgraph=True)
        )
        x = torch.randn(T, 5, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
        spikes = run(2 * x)
        (spikes * torch.linspace(0.5, 1.5, spikes.numel()).view(spikes.shape)).sum().backward()
        seen.append(Observed({"spikes": spikes.detach()}).see_gradients(block, x=x))
    assert_agree(*seen)


# ------------------------------------------------------------------------------------- what is kept


class ConvNeuronConv(nn.Module):
    def __init__(self, make: Make) -> None:
        super().__init__()
        self.first, self.neuron, self.second = (
            nn.Conv2d(3, 8, 3),
            make(step_mode="m"),
            nn.Conv2d(8, 8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        currents = self.first(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        spikes, _ = self.neuron.multi_step_functional_forward(
            (currents,), (torch.zeros_like(currents[0]),)
        )
        return self.second(spikes[0].flatten(0, 1)).sum()


def kept_by(net: nn.Module, x: Tensor) -> dict[torch.dtype, int]:
    """Bytes that a compiled forward keeps for its backward, parameters and input aside, by
    dtype."""
    loss = torch.compile(net, backend="aot_eager", fullgraph=True)(x)
    node = loss.grad_fn
    own, kept = {each.data_ptr() for each in (*net.parameters(), x)}, {}
    for each in node.saved_tensors:
        if each.data_ptr() not in own:
            kept[each.dtype] = kept.get(each.dtype, 0) + each.nbytes
    loss.backward()
    return kept


def test_spikes_are_kept_as_bits_and_potentials_not_at_all() -> None:
    x = torch.randn(T, 2, 3, 12, 12)
    host, ours = (kept_by(ConvNeuronConv(each), x) for each in (neuron.LIFNode, RevLIFNode))
    neuron_steps = T * 2 * 8 * 10 * 10
    assert ours == {
        torch.uint8: neuron_steps // 8,
        torch.float32: 4 * neuron_steps + 4 * neuron_steps // T,
    }
    assert sum(host.values()) >= 8 * neuron_steps  # potentials, and spikes as floats


def test_the_mark_for_the_partitioner_does_not_stay() -> None:
    from torch.fx.traceback import current_meta

    with recomputed_when_compiled():
        assert "recompute" in current_meta
        with recomputed_when_compiled():
            pass
        assert "recompute" in current_meta
    assert "recompute" not in current_meta and "ac_graph_id" not in current_meta


# ---------------------------------------------------------------------------------------- operators

X = torch.randn(T, 3, 6)
COUPLED = [torch.tensor(each) for each in (2.0, 0.25, 1.0, 1.0)]
# By the id of the equations: whether there are sequences, the tensors, the surrogate, the numbers.
SAMPLES = {
    equations_id("leaky", "subtract"): (
        False,
        lambda: [torch.tensor(0.8), torch.tensor(1.0), torch.tensor(1.0)],
        "atan",
        [2.0],
    ),
    equations_id("leaky", "zero", "immediate"): (
        False,
        lambda: [torch.rand(6), torch.tensor(1.0), torch.tensor(0.7)],
        "fast_sigmoid",
        [25.0],
    ),
    equations_id("if", "soft"): (True, list, "sigmoid", [1.0, 0.0, 0.0, 4.0]),
    equations_id("lif", "hard", "detached", "decay_input"): (
        True,
        list,
        "atan",
        [1.0, 0.1, 2.0, 2.0],
    ),
    equations_id("plif", "hard", "", "decay_input"): (
        True,
        lambda: [torch.tensor(0.3)],
        "atan",
        [1.0, 0.0, 0.0, 2.0],
    ),
    equations_id("coupled", "hard"): (
        True,
        list,
        "atan",
        [2.0, 0.25, 1.0, 1.0, 0.0, -1.0, 2.0],
    ),
    equations_id("coupled", "soft", "detached", "strict"): (
        True,
        lambda: COUPLED,
        "atan",
        [0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 2.0],
    ),
}


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("id", SAMPLES)
def test_operators(id: str, learned: bool) -> None:
    sequences, make, surrogate, numbers = SAMPLES[id]
    parameters, equations = make(), ([id, surrogate], numbers)
    from_outputs = KINDS[id].from_outputs
    learns = learned and not from_outputs  # its numbers are fixed in training
    x, v = 2 * X[0], torch.randn(3, 6)
    if not from_outputs:
        torch.library.opcheck(operators.charge, (x, v, parameters, *equations))
    x, v = (each.clone().requires_grad_(learned) for each in (x, v))
    traced = [each.clone().requires_grad_(learns) for each in parameters]
    torch.library.opcheck(torch.ops.snn_revplugin.step, (x, v, traced, *equations))
    if not sequences:
        return
    for with_path in (False, True)[: 1 if from_outputs else 2]:
        taken = (X, v.detach(), parameters, *equations, with_path)
        torch.library.opcheck(operators.scan, taken)
        bits, outputs, *_ = operators.scan(*taken)
        path = torch.randn_like(X) if with_path else None
        gradients = [torch.randn_like(X), torch.randn(3, 6), path]
        kept = [outputs if from_outputs else X, bits, v.detach()]
        learning = bool(parameters) and not from_outputs
        torch.library.opcheck(
            operators.scan_backward, (gradients, kept, parameters, *equations, learning)
        )
        x_seq = X.clone().requires_grad_(learned)
        torch.library.opcheck(
            torch.ops.snn_revplugin.sequence, (x_seq, v, traced, *equations, with_path)
        )

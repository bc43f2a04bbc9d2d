"""``check_reversible`` finds how far off a reversed potential is, and says where nothing can be
reversed."""

import pytest
import snntorch
import torch
import torch.nn as nn
from spikingjelly.activation_based import neuron

from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.adapters.spikingjelly import RevIFNode, RevLIFNode, RevParametricLIFNode
from snn_revplugin.neurons.leaky import Leaky as LeakyEquations
from snn_revplugin.report.check import check_reversible
from snn_revplugin.settings import use_settings

INVERTIBLE = {
    "Leaky": lambda: RevLeaky(beta=0.9),
    "Leaky, fast decay": lambda: RevLeaky(beta=0.25),
    "Leaky, no decay": lambda: RevLeaky(beta=1.0),
    "Leaky, no reset": lambda: RevLeaky(beta=0.9, reset_mechanism="none"),
    "Leaky, a beta and threshold for each": lambda: RevLeaky(
        beta=torch.linspace(0.5, 1, 64), threshold=torch.linspace(0.5, 2, 64)
    ),
    "Leaky, learned and hidden": lambda: RevLeaky(
        beta=0.8, learn_beta=True, learn_threshold=True, init_hidden=True
    ),
    "IF": lambda: RevIFNode(v_reset=None),
    "LIF": lambda: RevLIFNode(tau=2.0, v_reset=None),
    "LIF, input not decayed": lambda: RevLIFNode(tau=10.0, v_reset=None, decay_input=False),
    "parametric LIF, multi-step": lambda: RevParametricLIFNode(v_reset=None, step_mode="m"),
}
TOO_FAST_TO_REVERSE = {
    "Leaky, little left": lambda: RevLeaky(beta=0.01),
    "Leaky, nothing left": lambda: RevLeaky(beta=0.0),
    "Leaky, next to nothing left": lambda: RevLeaky(beta=1e-6),
    "LIF, next to nothing left": lambda: RevLIFNode(tau=1.000001, v_reset=None),
}
WITHOUT_INVERSE = {
    "Leaky, zero": lambda: RevLeaky(beta=0.9, reset_mechanism="zero"),
    "Leaky, reset at once": lambda: RevLeaky(beta=0.9, reset_delay=False),
    "IF": lambda: RevIFNode(),
    "LIF": lambda: RevLIFNode(v_reset=-0.5),
    "parametric LIF, multi-step": lambda: RevParametricLIFNode(step_mode="m"),
}


@pytest.mark.parametrize("make", INVERTIBLE.values(), ids=INVERTIBLE)
def test_invertible_dynamics_are_reversed(make):
    found = check_reversible(make(), time_steps=150)
    assert found.invertible and found.reversed
    assert found.time_steps == 150
    assert found.largest > 1  # it fired
    assert found.error <= 1e-4 * found.largest
    assert float(found) == found.error
    assert str(found).startswith("reversed with an anchor every")


@pytest.mark.parametrize("make", TOO_FAST_TO_REVERSE.values(), ids=TOO_FAST_TO_REVERSE)
def test_a_decay_close_to_zero_loses_nothing(make):
    found = check_reversible(make(), time_steps=40)
    assert found.invertible and not found.reversed
    assert found.error == 0 < found.largest
    assert "would lose too much" in str(found)


@pytest.mark.parametrize("make", WITHOUT_INVERSE.values(), ids=WITHOUT_INVERSE)
def test_dynamics_without_an_inverse_are_rebuilt_exactly(make):
    found = check_reversible(make(), time_steps=40)
    assert not found.invertible and not found.reversed
    assert found.error == 0
    assert found.largest > 0.5
    assert "no inverse" in str(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_mantissas_are_rebuilt_exactly(dtype: torch.dtype):
    currents = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = check_reversible(RevLIFNode(v_reset=None), currents)
    assert found.error == 0 < found.largest


def test_float64_is_as_much_better_as_its_mantissa_is_longer():
    single, double = (
        check_reversible(RevLeaky(beta=0.9)),
        check_reversible(RevLeaky(beta=0.9).double()),
    )
    assert 0 < double.error < 1e-8 * single.error


def test_more_anchors_leave_less_error():
    found = []
    for lost_bits in (1, 3, 5):
        with use_settings(lost_bits=lost_bits):
            found.append(check_reversible(RevLeaky(beta=0.9)))
    dense, medium, sparse = found
    assert dense.steps_between_anchors < medium.steps_between_anchors < sparse.steps_between_anchors
    assert 0 < dense.error < medium.error < sparse.error


def test_no_bit_to_lose_leaves_no_error():
    with use_settings(lost_bits=0):
        found = check_reversible(RevLeaky(beta=0.9))
    assert found.error == 0
    assert not found.reversed


@pytest.mark.parametrize(
    "make",
    [lambda: snntorch.Leaky(0.9), lambda: neuron.LIFNode()],
    ids=["snntorch", "spikingjelly"],
)
def test_a_neuron_of_the_host_is_checked_as_the_one_it_would_become(make):
    host = make()
    kind = type(host)
    check_reversible(host)
    assert type(host) is kind
    assert "_record" not in vars(host)


def test_a_wrong_inverse_is_found(monkeypatch: pytest.MonkeyPatch):
    right = LeakyEquations.invert_charge
    monkeypatch.setattr(
        LeakyEquations,
        "invert_charge",
        lambda self, h, x, reset_signal: right(self, h, x, reset_signal) + 0.01,
    )
    assert check_reversible(RevLeaky(beta=0.9)).error > 0.009


def test_the_neuron_is_left_alone_in_the_middle_of_a_sequence():
    lif, twin = RevLeaky(beta=0.9), snntorch.Leaky(beta=0.9)
    calls = []
    lif.register_forward_hook(lambda *_: calls.append(1))
    conv, x = nn.Conv1d(1, 3, 3), torch.rand(2, 1, 6)
    mem, twin_mem = lif.reset_mem(), twin.reset_mem()
    for step in range(4):
        spikes, mem = lif(conv(x), mem)
        twin_spikes, twin_mem = twin(conv(x), twin_mem)
        assert torch.equal(spikes, twin_spikes) and torch.equal(mem, twin_mem)
        if step == 1:
            assert check_reversible(lif).error < 1e-4
            assert lif.mem is mem
    assert len(calls) == 4
    assert lif.record.statistics.calls == 4


def test_a_state_of_spikingjelly_is_left_alone():
    lif = RevLIFNode()
    lif(torch.rand(2, 3).requires_grad_())
    v = lif.v
    check_reversible(lif)
    assert lif.v is v
    assert lif.step_mode == "s"


def test_gradients_of_the_parameters_are_left_alone():
    lif = RevLeaky(beta=0.9, learn_beta=True, learn_threshold=True)
    check_reversible(lif)
    assert lif.beta.grad is None and lif.threshold.grad is None


def test_currents_of_ones_own():
    currents = torch.full((7, 3, 2), 0.3)
    found = check_reversible(RevLeaky(beta=0.5), currents)
    assert found.time_steps == 7
    assert found.largest == pytest.approx(0.6, rel=0.02)  # where beta takes 0.3 to, without a spike


def test_it_works_without_gradients_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    with torch.no_grad():
        first = check_reversible(RevLeaky(beta=0.9))
    assert check_reversible(RevLeaky(beta=0.9)) == first
    assert check_reversible(RevLeaky(beta=0.9), seed=1) != first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "module", [nn.ReLU(), snntorch.Alpha(0.9, 0.8), "neuron"], ids=["ReLU", "Alpha", "str"]
)
def test_what_is_no_such_neuron_is_refused(module: object):
    with pytest.raises(TypeError, match=r"cannot be reversible|must be a torch.nn.Module"):
        check_reversible(module)


def test_a_neuron_that_runs_by_its_own_step_is_refused():
    with pytest.raises(TypeError, match="its own step, which is not reversed"):
        check_reversible(RevLeaky(beta=0.9, state_quant=lambda mem: mem.round()))


def test_a_neuron_on_the_path_of_the_host_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="the surrogate is no Heaviside step"):
        check_reversible(RevLeaky(beta=0.9, spike_grad=torch.sigmoid))
    with pytest.raises(ValueError, match="switched off"):
        check_reversible(RevLeaky(beta=0.9, reversible=False))


@pytest.mark.parametrize(
    "currents", [torch.ones(()), torch.ones(0, 3), torch.ones(3, 2, dtype=torch.int64)]
)
def test_bad_currents_are_refused(currents: torch.Tensor):
    with pytest.raises(ValueError, match="currents must be floating point"):
        check_reversible(RevLeaky(beta=0.9), currents)

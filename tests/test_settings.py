"""The settings: what they refuse, where they hold, and that each of them weighs memory against time
or rounding as it says."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn as nn
from compare import relative_error
from snntorch import Leaky

from snn_revplugin import Settings, get_settings, use_settings
from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.adapters.spikingjelly import RevIFNode

pytestmark = pytest.mark.usefixtures("recompute_everything")

BAD = [
    ({"lost_bits": -0.1}, "lost_bits"),
    ({"lost_bits": float("nan")}, "lost_bits"),
    ({"max_anchor_interval": 0}, "max_anchor_interval"),
    ({"max_anchor_interval": -3}, "max_anchor_interval"),
    ({"rebuild_interval": 0}, "rebuild_interval"),
]


@pytest.mark.parametrize(("changes", "name"), BAD, ids=str)
def test_bad_settings_are_refused_by_name(changes: dict, name: str) -> None:
    before = get_settings()
    with pytest.raises(ValueError, match=name):
        Settings(**changes)
    with pytest.raises(ValueError, match=name), use_settings(**changes):
        pass
    assert get_settings() == before


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(TypeError, match="lostbits"), use_settings(lostbits=3):
        pass


def test_settings_hold_in_their_block_alone() -> None:
    default = get_settings()
    # TRITON_INTERPRET=1 asks for kernels in every test, and conftest.py for everything to be
    # recomputed.
    assert default == Settings(
        backend=default.backend, recompute_min_bytes=default.recompute_min_bytes
    )
    with use_settings(lost_bits=2) as outer:
        assert get_settings() is outer
        with use_settings(max_anchor_interval=7):
            assert (get_settings().lost_bits, get_settings().max_anchor_interval) == (2, 7)
        assert get_settings() is outer
        with pytest.raises(KeyError), use_settings(reversible=False):
            raise KeyError
        assert get_settings() is outer
    assert get_settings() is default


def test_settings_cannot_be_changed_behind_everyones_back() -> None:
    with pytest.raises(AttributeError):
        get_settings().lost_bits = 3


def test_settings_are_a_threads_own() -> None:
    seen = []
    with use_settings(lost_bits=2):
        thread = threading.Thread(target=lambda: seen.append(get_settings().lost_bits))
        thread.start()
        thread.join()
    assert seen == [Settings().lost_bits]


def gradient(
    kind: type[nn.Module], T: int = 60, backward_bits: float | None = None, **options
) -> tuple[torch.Tensor, nn.Module]:
    """The gradient of a linear layer under a neuron, whose currents are recomputed from the
    spikes of another."""
    torch.manual_seed(0)
    below, weigh, lif = (
        Leaky(beta=0.9) if kind is Leaky else RevLeaky(beta=0.9),
        nn.Linear(8, 6),
        kind(**options),
    )
    nn.init.constant_(weigh.bias, 0.3)
    v1, v2, loss = torch.zeros(4, 8), torch.zeros(4, 6), 0.0
    for frame in torch.randn(T, 4, 8, requires_grad=True) + 0.5:
        s1, v1 = below(frame, v1)
        s2, v2 = lif(weigh(s1), v2)
        loss = loss + (s2 * torch.randn(s2.shape)).sum()
    with use_settings(
        lost_bits=get_settings().lost_bits if backward_bits is None else backward_bits
    ):
        loss.backward()
    return weigh.weight.grad, lif


def test_more_lost_bits_mean_fewer_anchors_and_larger_errors() -> None:
    """And each error stays below what the bits say: 2**bits roundings of a 24-bit mantissa, carried
    into the gradient."""
    options = {"beta": 0.8}
    exact, _ = gradient(Leaky, **options)
    errors, stretches = [], []
    for bits in (0, 1, 3, 5):
        with use_settings(lost_bits=bits):
            ours, lif = gradient(RevLeaky, **options)
        errors.append(relative_error(exact, ours))
        stretches.append(lif.record.statistics.anchor_interval)
        assert errors[-1] <= 2**bits * 1e-6
    assert stretches[1:] == sorted(set(stretches[1:]))
    assert errors[0] <= errors[-1]


@pytest.mark.parametrize("longest", [1, 2, 10, 64])
def test_longest_stretch_caps_the_distance_between_anchors(longest: int) -> None:
    with use_settings(max_anchor_interval=longest):
        _, lif = gradient(RevLeaky, beta=1.0)
    assert lif.record.statistics.anchor_interval == longest


@pytest.mark.parametrize("every", [1, 5, 12])
def test_rebuild_stretch_is_for_what_has_no_inverse(every: int) -> None:
    with use_settings(rebuild_interval=every):
        ours, lif = gradient(RevLeaky, beta=0.9, reset_mechanism="zero")
    exact, _ = gradient(Leaky, beta=0.9, reset_mechanism="zero")
    assert lif.record.statistics.anchor_interval == every
    assert relative_error(exact, ours) < 2e-6


def test_a_step_keeps_the_settings_that_it_was_taken_under() -> None:
    exact, _ = gradient(Leaky, beta=0.8)
    with use_settings(lost_bits=1):
        ours, _ = gradient(RevLeaky, beta=0.8, backward_bits=5)
    assert relative_error(exact, ours) <= 2e-6


def test_settings_may_change_in_mid_sequence() -> None:
    gradients = []
    for kind in (Leaky, RevLeaky):
        torch.manual_seed(0)
        lif, conv, v, loss = kind(beta=0.8), nn.Conv1d(2, 3, 3), torch.zeros(2, 3, 4), 0.0
        for t, frame in enumerate(torch.randn(24, 2, 2, 6)):
            with use_settings(
                max_anchor_interval=1 + t % 5, lost_bits=t % 4, reversible=t % 7 != 6
            ):
                s, v = lif(conv(frame) * 2, v)
            loss = loss + (s * torch.randn(s.shape)).sum()
        loss.backward()
        gradients.append(conv.weight.grad)
    assert relative_error(*gradients) < 2e-5


def test_reversible_false_switches_every_neuron_off() -> None:
    lif = RevIFNode()
    with use_settings(reversible=False):
        lif(torch.ones(2, requires_grad=True))
    assert lif.record.statistics.steps == 0
    lif.reset()
    lif(torch.ones(2, requires_grad=True))
    assert lif.record.statistics.steps == 1

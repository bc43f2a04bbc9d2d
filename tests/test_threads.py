"""Replicas, threads and settings: what is shared between them, and what must not be."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

from snn_revplugin import explain, use_settings
from snn_revplugin.adapters.snntorch import CoupledLeaky, RevLeaky
from snn_revplugin.packed.codec import TorchCodec
from snn_revplugin.packed.spikes import PackedSpikes
from snn_revplugin.torch_internals import backward_pass
from snn_revplugin.torch_internals.pass_cache import pass_cache

T = 8


def test_the_replicas_of_data_parallel_keep_chains_of_their_own() -> None:
    """Replicas share the module's ``__dict__``; they must not build each other's equations anew,
    which ends every chain of time steps."""
    lif = RevLeaky(beta=0.9, learn_beta=True)
    lif.record.statistics.clear()
    replicas = [lif._replicate_for_data_parallel() for _ in range(2)]
    weigh, mems = nn.Linear(40, 64), [torch.zeros(16, 64)] * 2
    for replica in replicas:  # as torch.nn.parallel.replicate gives each its own parameters
        replica.__dict__["beta"] = lif.beta * 1
        replica._parameters.pop("beta", None)
    for frame in torch.randn(T, 16, 40):
        for i, replica in enumerate(replicas):
            _, mems[i] = replica(weigh(frame), mems[i])
    sum(mem.sum() for mem in mems).backward()
    transitions = {id(each.record.latest_transition) for each in replicas}
    assert len(transitions) == 2
    (row,) = explain(lif).rows
    assert row.steps == 2 * T
    assert row.steps_between_anchors > 1
    assert lif.record.statistics.potential_bytes < 2 * 16 * 64 * 4 * 2


def test_two_threads_of_one_pass_have_caches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On two devices the nodes of one backward pass run in two threads at the same time."""
    kept = []
    monkeypatch.setattr(backward_pass, "current_pass", lambda: 7)
    monkeypatch.setattr(backward_pass, "at_end_of_pass", kept.append)
    here = pass_cache()
    with ThreadPoolExecutor(1) as thread:
        there = thread.submit(pass_cache).result()
    assert here is not there and here is pass_cache()


def test_bits_are_unpacked_by_the_codec_that_packed_them() -> None:
    """The settings of forward hold in autograd's threads too."""
    with FakeTensorMode(allow_non_fake_inputs=True), use_settings(backend="torch"):
        packed = PackedSpikes(torch.zeros(64, dtype=torch.bool, device="cuda"))
    assert isinstance(packed.block.codec, TorchCodec)


@pytest.mark.parametrize("kind", [RevLeaky, CoupledLeaky])
def test_backward_in_another_thread_keeps_the_settings_of_forward(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    options = {"reset_mechanism": "zero"}
    lif, weigh = kind(**({"beta": 0.9} if kind is RevLeaky else {}), **options), nn.Linear(40, 64)
    x, gradients = torch.randn(T, 16, 40), []
    for elsewhere in (False, True):
        weigh.zero_grad()
        with use_settings(rebuild_interval=3):
            mem, total = torch.zeros(16, 64), 0
            for frame in x:
                spikes, mem = lif(weigh(frame), mem)
                total = total + (spikes * mem).sum()
        if elsewhere:
            thread = threading.Thread(target=total.backward)
            thread.start()
            thread.join()
        else:
            total.backward()
        gradients.append(weigh.weight.grad.clone())
    assert torch.equal(*gradients)
    if kind is RevLeaky:
        assert lif.record.statistics.anchor_interval == 3


@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_an_immediate_reset_and_a_long_rebuild_interval(reset: str) -> None:
    """The reset reads the state before, which must not be found by recursion."""
    grads, steps = [], 1200
    for kind in (snn.Leaky, RevLeaky):
        torch.manual_seed(0)
        weigh = nn.Linear(4, 3)
        lif = kind(beta=0.9, reset_delay=False, reset_mechanism=reset)
        with use_settings(rebuild_interval=1000, recompute_min_bytes=0):
            mem = torch.zeros(2, 3)
            for frame in torch.randn(steps, 2, 4):
                _, mem = lif(weigh(frame), mem)
            (mem * torch.randn(2, 3)).sum().backward()
        grads.append(weigh.weight.grad)
    assert ((grads[0] - grads[1]).abs().max() / grads[0].abs().max()).item() < 2e-5

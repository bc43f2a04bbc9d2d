"""What the process holds: blocks of bits, the heap, and the Python objects that a neuron call
leaves behind."""

from __future__ import annotations

import gc
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch

from snn_revplugin.cli.comparison import Setup
from snn_revplugin.cli.workloads import OURS, WORKLOADS
from snn_revplugin.packed.spikes import Block, PackedSpikes
from snn_revplugin.torch_internals import heap

RESIDENT = Path(__file__).parents[1] / "benchmarks" / "resident.py"


def packed(count: int, before: PackedSpikes | None = None) -> PackedSpikes:
    return PackedSpikes(torch.rand(count) > 0.5, before=before)


def test_blocks_double_up_to_a_limit_and_rows_do_not_touch_one_another() -> None:
    fired = [torch.rand(3, 37) > 0.5 for _ in range(100)]
    chain: list[PackedSpikes] = []
    for each in fired:
        chain.append(PackedSpikes(each, before=chain[-1] if chain else None))
    assert all(torch.equal(p.fired(), each) for p, each in zip(chain, fired, strict=True))
    sizes = [p.allocated // p.nbytes for p in chain if p.allocated]
    assert sizes[:6] == [1, 2, 4, 8, Block.MOST_ROWS, Block.MOST_ROWS] and set(sizes[6:]) == {
        Block.MOST_ROWS
    }


def test_two_branches_of_a_chain_get_rows_of_their_own() -> None:
    trunk = packed(64)
    trunk = packed(64, trunk)
    left_fired, right_fired = (torch.rand(64) > 0.5 for _ in range(2))
    left, right = PackedSpikes(left_fired, before=trunk), PackedSpikes(right_fired, before=trunk)
    assert torch.equal(left.fired(), left_fired) and torch.equal(right.fired(), right_fired)


def test_spikes_of_another_size_start_a_block_of_their_own() -> None:
    before = packed(64, packed(64))
    assert packed(65, before).allocated == 9


def test_the_heap_is_trimmed_in_long_chains_only(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed, potential = [], torch.empty(heap.BYTES_BETWEEN // 4, dtype=torch.uint8)
    monkeypatch.setattr(heap, "_trim", lambda pad: trimmed.append(step))
    for step in (*range(1, 11), *range(10, 0, -1)):
        heap.chain_has_come_to(step, potential)
    assert trimmed == [4, 8, 8, 4]


def test_without_glibc_nothing_is_trimmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_trim", None)
    heap.chain_has_come_to(1, torch.empty(heap.BYTES_BETWEEN, dtype=torch.uint8))


def test_a_neuron_call_leaves_few_bytes_of_python_objects() -> None:
    setup = Setup.usual(WORKLOADS["csnn"], time_steps=60, batch=2)
    net, batch = setup.net(OURS), setup.data()
    setup.loss(net, batch).backward()
    gc.collect()
    tracemalloc.start()
    try:
        loss = setup.loss(net, batch)
        objects, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert loss.requires_grad and objects / (3 * 60) < 2900


def test_the_benchmark_of_the_resident_set_runs() -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the largest resident set is read from Linux's /proc")
    command = (sys.executable, str(RESIDENT), "--time-steps", "8")
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert table.count("MiB") == 2 and "times less" in table

"""Training by several processes: DistributedDataParallel and fully_shard (FSDP2) over two of them,
started by torchrun.

``tests/distributed_worker.py`` is what runs. Ours must see the host's spikes and gradients in the
same set-up, and those of one process that has the batches of both.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from compare import TOLERANCES, Observed, assert_agree, assert_alive
from distributed_worker import BFLOAT16, NETS, OWN_BUFFERS, PROCESSES, SETUPS, Net, nets_of
from hosts import OLDER_TORCH

from snn_revplugin.replay.walk import FREED

WORKER = Path(__file__).with_name("distributed_worker.py")
LIMIT = 200  # seconds; a run takes 15 alone
# A layer that is sharded by itself gets its weight back too late for the neuron above.
FREED_TOO_EARLY = {"layers", "layers, weights stay"}

pytestmark = pytest.mark.skipif(
    not dist.is_gloo_available(), reason="this build of torch has no gloo"
)


def launch(family: str, file: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """What the worker saw."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={PROCESSES}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(
        [*command, str(WORKER), family, str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,  # so that all of them can be ended together
    ) as process:
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"not done after {LIMIT} s:\n{output}") from None
    assert process.returncode == 0, output
    return torch.load(file)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", SETUPS)
def test_two_processes_train_as_the_hosts_and_as_one(family: str, tmp_path: Path) -> None:
    if OLDER_TORCH and family == "ddp":
        pytest.skip(
            "not looked into: with torch 2.11 autograd itself finds a buffer that DDP has written"
            " into, in these time loops"
        )
    seen = launch(family, tmp_path / "seen.pt")
    for setup in SETUPS[family]:
        for name in nets_of(family, setup):
            host, ours, alone = (
                seen[setup, name, whose] for whose in ("host", "ours", "one process")
            )
            with telling(f"{family}, {setup}, {name}"):
                if not name.startswith("Coupled"):  # whose outputs are real-valued
                    assert_alive(ours["spikes"])
                check(setup, host, ours, alone if as_one_process(setup, NETS[name]) else None)


def as_one_process(setup: str, net: Net) -> bool:
    """Whether several processes are meant to see what one does that has the batches of all.

    Not where a norm has statistics of its own batch, where numbers are cast, and where
    DistributedDataParallel makes every process go on with the first one's membrane: with each of
    its forwards, and so with each time step of a loop around it.
    """
    return net.norm is None and setup != BFLOAT16 and (setup == OWN_BUFFERS or not net.outside)


@contextmanager
def telling(where: str) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{where}: {error}") from error


def check(
    setup: str, host: dict[str, Any], ours: dict[str, Any], alone: dict[str, Any] | None
) -> None:
    """Hold ours against the host in the same set-up, and against one process.

    The first step's spikes bit for bit, its gradients to rounding, and the parameters after the
    last step. One process sums the same terms in another order.
    """
    tolerance = TOLERANCES[torch.bfloat16 if setup == BFLOAT16 else torch.float32]
    seen = [Observed({"spikes": each["spikes"]}, each["gradients"]) for each in (host, ours)]
    assert_agree(*seen, tolerance)
    assert_agree(Observed({}, host["parameters"]), Observed({}, ours["parameters"]), 10 * tolerance)
    if alone is not None:
        assert_agree(Observed({}, alone["gradients"]), Observed({}, ours["gradients"]), 5e-5)
    assert not any(ours["reasons"]), f"the host's path was taken: {ours['reasons']}"
    assert set().union(*ours["boundaries"]) == ({FREED} if setup in FREED_TOO_EARLY else set())

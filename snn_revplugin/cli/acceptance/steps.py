"""Part 3b: a training step as a whole: captured as a CUDA graph, without synchronisation, and with
backward in another thread under other settings."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from ...settings import use_settings
from ..comparison import largest_relative_difference
from ..workloads import HOST, OURS
from .case import ABSENT, FAILED, MEASURED, NO_CUDA, PASSED, Case, Cases, Findings, Sizes

WARM_UPS = 3
CLOSE = 1e-4  # of gradients
OTHER_SETTINGS = {"lost_bits": 2, "rebuild_interval": 3, "match_host_order": True}


def cases(sizes: Sizes, device: str) -> Cases:
    for work, time_steps, batch in sizes.small_works:
        for way in (HOST, OURS):
            yield Case("steps", work, way, device, time_steps, batch)


def examine(case: Case) -> Findings:
    checks: dict[str, Callable[[TrainingStep], float]] = {
        "capture": _captured,
        "synchronisation": _unsynchronised,
        "settings": _in_another_thread,
    }
    for name, check in checks.items():
        subject = f"{case.subject}, {name}"
        if not case.on_cuda and check is not _in_another_thread:
            yield case.found(ABSENT, subject, NO_CUDA)
            continue
        try:
            error = check(TrainingStep(case))
        except RuntimeError as problem:  # the host may not be able to, either
            outcome = FAILED if case.way == OURS else MEASURED
            yield case.found(outcome, subject, str(problem).partition("\n")[0])
        else:
            yield case.found(PASSED if error <= CLOSE else FAILED, subject, gradient_error=error)


class TrainingStep:
    """A net with its data, and forward and backward of it, without an optimiser."""

    def __init__(self, case: Case) -> None:
        self.case, self.setup = case, case.setup
        self.net, self.batch = self.setup.net(case.way), self.setup.data()

    def forward(self) -> Tensor:
        self.net.zero_grad(set_to_none=False)
        return self.setup.loss(self.net, self.batch)

    def __call__(self) -> list[Tensor]:
        self.forward().backward()
        return self.gradients()

    def gradients(self) -> list[Tensor]:
        return [each.grad.clone() for each in self.net.parameters() if each.grad is not None]


def _captured(step: TrainingStep) -> float:
    """A captured step, replayed on other data, against one that is not captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.forward().backward()
    step.batch.images.uniform_()
    graph.replay()
    captured = step.gradients()
    fresh = TrainingStep(step.case)
    fresh.batch.images.copy_(step.batch.images)
    return largest_relative_difference(fresh(), captured)


def _unsynchronised(step: TrainingStep) -> float:
    """A step that waits for the device raises an error."""
    for _ in range(WARM_UPS):
        expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.forward().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return largest_relative_difference(expected, step.gradients())


def _in_another_thread(step: TrainingStep) -> float:
    """Forward under settings of this thread, backward in a thread that has the usual ones."""
    expected = step()
    with use_settings(**OTHER_SETTINGS):
        loss = step.forward()
    problems: list[BaseException] = []

    def backward() -> None:
        try:
            loss.backward()
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    if problems:
        raise problems[0]
    return largest_relative_difference(expected, step.gradients())

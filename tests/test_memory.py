"""The memory report says what a training step holds, byte by byte.

``test_leaks.py`` tests that a step leaves nothing behind.
"""

from collections.abc import Callable

import pytest
import torch

from snn_revplugin.report.memory import LiveBytes, memory_report

KIB = 1024


def kib(count: float) -> torch.Tensor:
    """A tensor of so many KiB."""
    return torch.ones(int(256 * count))


def test_births_and_deaths_are_counted():
    with LiveBytes() as live:
        a = kib(3)
        b = a + 1
        assert live.now() == 6 * KIB
        del a
        assert live.now() == 3 * KIB
        b = b * 2  # for a moment there are two
    assert (live.now(), live.peak()) == (3 * KIB, 6 * KIB)
    del b
    assert live.now() == 0


def test_a_view_counts_nothing_and_holds_its_base():
    with LiveBytes() as live:
        base = kib(4)
        view = base[:1].view(1, 1).expand(2, 2).detach()
        assert live.now() == 4 * KIB
        del base
        assert live.now() == 4 * KIB
        del view
        assert live.now() == 0


def test_what_was_there_before_counts_nothing():
    old = kib(4)
    with LiveBytes() as live:
        old.add_(1)
        view = old.view(2, -1).t()
        assert live.now() == 0
        new = view.contiguous()
        assert live.now() == 4 * KIB
    del old, view, new
    assert live.now() == 0


def test_a_storage_that_grows_in_place_is_counted_anew():
    with LiveBytes() as live:
        x = kib(1)
        x.resize_(512)
        assert live.now() == 2 * KIB
        del x
    assert live.now() == 0


def test_tensors_of_a_list_and_of_an_empty_shape_are_counted():
    with LiveBytes() as live:
        parts = [each.clone() for each in kib(4).split(256)]
        empty = torch.empty(0)
        assert live.now() == 4 * KIB
    del parts, empty
    assert live.now() == 0


def test_a_sparse_tensor_does_no_harm():
    with LiveBytes() as live:
        sparse = torch.eye(4).to_sparse()
        dense = sparse.to_dense()
        assert live.now() >= dense.nbytes


def chain(weight: torch.Tensor) -> torch.Tensor:
    """A loss for which autograd keeps two tensors of the weight's size, and backward makes one more
    before it frees any."""
    return weight.exp().exp().sum()


def test_a_report_of_a_step_that_returns_its_loss():
    weight = kib(8).requires_grad_()
    report = memory_report(lambda: chain(weight))
    assert report.device == "cpu"
    assert report.retained == pytest.approx(16 * KIB, abs=16)  # and some scalars
    assert report.peak == pytest.approx(24 * KIB, abs=16)
    assert report.left == 8 * KIB  # the gradient
    assert weight.grad is not None
    assert report.peak_reserved is None


def test_a_report_of_a_step_with_a_backward_of_its_own():
    weight = kib(8).requires_grad_()
    of_loss = memory_report(lambda: chain(weight))
    weight.grad = None
    of_step = memory_report(lambda: chain(weight).backward())
    assert (of_step.retained, of_step.left) == (of_loss.retained, of_loss.left)
    assert of_step.peak == pytest.approx(of_loss.peak, abs=16)


def test_a_backward_is_not_run_twice():
    weight = torch.ones(2, requires_grad=True)

    def step() -> torch.Tensor:
        loss = (3 * weight).sum()
        loss.backward()
        return loss

    memory_report(step)
    assert torch.equal(weight.grad, torch.full((2,), 3.0))


def test_gradients_that_are_there_already_cost_nothing():
    weight = kib(8).requires_grad_()
    memory_report(lambda: chain(weight))
    assert memory_report(lambda: chain(weight)).left == 0


def test_retained_is_what_the_first_of_several_backwards_begins_with():
    weight = kib(8).requires_grad_()

    def step() -> None:
        chain(weight).backward()
        later = chain(weight) + chain(weight)
        later.backward()

    report = memory_report(step)
    assert report.retained == pytest.approx(16 * KIB, abs=16)
    assert report.peak >= 32 * KIB


def test_a_device_may_be_named():
    weight = kib(1).requires_grad_()
    report = memory_report(lambda: chain(weight), device=torch.device("cpu"))
    assert report.device == "cpu"
    assert report.peak > report.retained > 0


def test_a_report_can_be_read():
    weight = kib(KIB).requires_grad_()
    assert (
        str(memory_report(lambda: chain(weight)))
        == "retained 2.0 MiB, peak 3.0 MiB, left 1.0 MiB on cpu"
    )


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda: None, "ran no backward and returned NoneType"),
        (lambda: torch.ones(()), "without a graph"),
        (lambda: torch.ones((), requires_grad=True), "without a graph"),
        (lambda: torch.ones(3, requires_grad=True) * 2, r"shape \(3,\)"),
    ],
)
def test_a_step_without_a_backward_is_refused(step: Callable, message: str):
    with pytest.raises(ValueError, match=message):
        memory_report(step)


def test_an_exception_of_the_step_goes_through_and_stops_the_counting():
    def step() -> None:
        raise ArithmeticError("mine")

    with pytest.raises(ArithmeticError, match="mine"):
        memory_report(step)
    with LiveBytes() as live:
        kept = kib(1)
        assert live.now() == kept.nbytes


class Allocator:
    """The statistics that torch keeps of a CUDA device, of memory that is counted here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, peak: int) -> None:
        self.allocated, self.peak = 100, peak
        for name, read in {
            "is_initialized": lambda: True,
            "device_count": lambda: 1,
            "synchronize": lambda index: None,
            "empty_cache": lambda: None,
            "memory_allocated": lambda index: self.allocated,
            "memory_reserved": lambda index: self.allocated,
            "max_memory_allocated": lambda index: self.peak,
            "max_memory_reserved": lambda index: self.peak,
            "reset_peak_memory_stats": self.refuse,
        }.items():
            monkeypatch.setattr(torch.cuda, name, read)

    def refuse(self, *_: object) -> None:
        raise AssertionError("the user's peak was reset")

    def hold(self, size: int, scratch: int = 0) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated + scratch)


@pytest.mark.parametrize("by", [None, "layer"])
@pytest.mark.parametrize(("before", "peak"), [(100, 90), (1000, 80)])
def test_the_peak_of_the_users_statistics_stays(
    before: int, peak: int, by: str | None, monkeypatch: pytest.MonkeyPatch
):
    """Where a step is the most that the user ever held, scratch memory inside operations is seen;
    else what was held after each of them."""
    device, weight = Allocator(monkeypatch, before), torch.ones(3, requires_grad=True)

    def step() -> torch.Tensor:
        device.hold(50)
        loss = weight.sum()
        device.hold(30, scratch=10)
        loss = loss * 2
        device.hold(-40)
        return loss

    report = memory_report(step, device="cuda:0", by=by)
    assert (report.retained, report.peak, report.left) == (40, peak, 40)
    assert device.peak == max(before, 190)


@pytest.mark.gpu
def test_a_report_of_a_cuda_device():
    weight = torch.ones(2**20, device="cuda", requires_grad=True)
    chain(weight).backward()  # a first step, for workspaces
    weight.grad = None
    report = memory_report(lambda: chain(weight))
    assert report.device == "cuda:0"
    assert report.retained == pytest.approx(8 * 2**20, rel=0.01)
    assert report.peak == pytest.approx(12 * 2**20, rel=0.01)
    assert report.left == 4 * 2**20
    assert report.retained_reserved >= report.retained
    assert report.peak_reserved >= report.peak

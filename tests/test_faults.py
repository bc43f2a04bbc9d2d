"""Bad input and faults: the host's behaviour, or an error that says what was wrong; and the next
step is right."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from compare import MakeNeuron, Observed, agree
from either_host import potential_of, step_of
from nets import BATCH, TwoLayers
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor

from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.adapters.spikingjelly import RevIFNode, RevLIFNode, RevParametricLIFNode

T = 8
KINDS: dict[str, tuple[tuple[type, type], dict]] = {
    "Leaky": ((snn.Leaky, RevLeaky), {"beta": 0.8, "init_hidden": True}),
    "Leaky, learned": (
        (snn.Leaky, RevLeaky),
        {
            "beta": 0.8,
            "init_hidden": True,
            "learn_beta": True,
            "learn_threshold": True,
            "learn_graded_spikes_factor": True,
        },
    ),
    "Leaky, zero": (
        (snn.Leaky, RevLeaky),
        {"beta": 0.8, "init_hidden": True, "reset_mechanism": "zero"},
    ),
    "Leaky, at once": (
        (snn.Leaky, RevLeaky),
        {"beta": 0.8, "init_hidden": True, "reset_delay": False},
    ),
    "IF s": ((neuron.IFNode, RevIFNode), {"v_reset": None}),
    "LIF s": (
        (neuron.LIFNode, RevLIFNode),
        {"surrogate_function": surrogate.ATan(), "detach_reset": True},
    ),
    "LIF m": (
        (neuron.LIFNode, RevLIFNode),
        {"surrogate_function": surrogate.ATan(), "step_mode": "m"},
    ),
    "PLIF s": ((neuron.ParametricLIFNode, RevParametricLIFNode), {"v_reset": None}),
    "PLIF m": ((neuron.ParametricLIFNode, RevParametricLIFNode), {"step_mode": "m"}),
}
LEARNED = {
    "Leaky, learned": ("beta", "threshold", "graded_spikes_factor"),
    "PLIF s": ("w",),
    "PLIF m": ("w",),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


class Net(TwoLayers):
    """conv - neurons - linear - neurons; ``[T, N, 2, 5]`` to spikes ``[T, N, 4]``.

    Attributes:
        fault: called with the number of the step before each step of the second layer.
    """

    def __init__(self, make: MakeNeuron, options: dict) -> None:
        super().__init__(make, options)
        self.conv, self.fc = nn.Conv1d(2, 3, 3), nn.Linear(9, 4)
        nn.init.normal_(self.conv.weight)
        nn.init.normal_(self.fc.weight)
        nn.init.constant_(self.fc.bias, 0.4)
        self.fault: Callable[[int], Any] = lambda t: None

    def forward(self, x: Tensor) -> Tensor:
        if self.steps == "m":
            spikes = self.lif1(self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
            self.fault(3)
            return self.lif2(self.fc(spikes.flatten(2)))
        outputs = []
        for t, frame in enumerate(x):
            spikes = self.lif1(self.conv(frame))
            self.fault(t)
            outputs.append(self.lif2(self.fc(spikes.flatten(1))))
        return torch.stack(outputs)


def draw() -> Tensor:
    return (torch.randn(T, BATCH, 2, 5) + 0.3).requires_grad_()


def good_step(net: Net, name: str = "good") -> Observed:
    """A whole training step, its outputs and its gradients."""
    net.zero_grad()
    net.fault = lambda t: None
    x = draw()
    spikes = net(x)
    v1, v2 = net.potentials()
    sum((each * torch.randn(each.shape)).sum() for each in (spikes, v1, v2)).backward()
    exact = {f"{name} {i}": each for i, each in enumerate((spikes, v1, v2))}
    gradients = {
        f"{name} {key}": p.grad.clone() for key, p in net.named_parameters() if p.grad is not None
    }
    return Observed(exact, gradients | {f"{name} x": x.grad})


def together(*seen: Observed) -> Observed:
    whole = Observed()
    for each in seen:
        whole.exact |= each.exact
        whole.gradients |= each.gradients
    return whole


def check(kind: str, program: Callable[[Net], Observed], path: str = "reversible") -> None:
    kinds, options = KINDS[kind]
    agree(lambda make: program(Net(make, options)), *kinds, path=path)


class Fault(Exception):
    """Raised in the middle of something."""


# ----------------------------------------------------------------------------------------- backward


@EVERY_KIND
def test_second_backward_without_retain_graph_raises(kind: str) -> None:
    def program(net: Net) -> Observed:
        spikes = net(draw())
        spikes.sum().backward()
        with pytest.raises(
            RuntimeError,
            match=r"backward through (the graph|a reversible neuron's time step) a second time",
        ):
            spikes.sum().backward()
        net.clear()
        return good_step(net)

    check(kind, program)


@EVERY_KIND
def test_backward_through_a_sequence_already_walked_raises(kind: str) -> None:
    """The user forgot to detach the state: the host says so, and so do we."""

    def program(net: Net) -> Observed:
        net(draw()).sum().backward()
        more = net(draw())
        with pytest.raises(RuntimeError, match="retain_graph"):
            more.sum().backward()
        net.clear()
        return good_step(net)

    check(kind, program)


@EVERY_KIND
@pytest.mark.parametrize("which", ["conv.weight", "fc.weight", "learned"])
@pytest.mark.parametrize("how", ["no_grad", "optimizer", "load_state_dict"])
def test_a_parameter_changed_between_forward_and_backward_raises(
    how: str, which: str, kind: str
) -> None:
    ours, options = KINDS[kind][0][1], KINDS[kind][1]
    names = [which] if which != "learned" else [f"lif2.{name}" for name in LEARNED.get(kind, ())]
    for name in names:
        torch.manual_seed(0)
        net = Net(ours, options)
        parameter = dict(net.named_parameters())[name]
        loss = net(draw()).sum()
        if how == "no_grad":
            with torch.no_grad():
                parameter.mul_(1.01)
        elif how == "optimizer":
            parameter.grad = torch.ones_like(parameter)
            torch.optim.SGD([parameter], lr=0.1).step()
        else:
            net.load_state_dict(net.state_dict())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@EVERY_KIND
def test_a_parameter_changed_between_two_backwards_raises(kind: str) -> None:
    ours, options = KINDS[kind][0][1], KINDS[kind][1]
    net = Net(ours, options)
    loss = net(draw()).sum()
    loss.backward(retain_graph=True)
    with torch.no_grad():
        net.fc.weight.mul_(0.9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@EVERY_KIND
@pytest.mark.parametrize("error", [Fault, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["spikes", "current", "parameter"])
def test_an_exception_in_mid_backward(where: str, error: type, kind: str) -> None:
    def program(net: Net) -> Observed:
        before = good_step(net, "before")
        net.clear()

        def interrupt(*_: Any) -> None:
            raise error

        handles = []

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if len(handles) == (0 if net.steps == "m" else 3):
                handles.append(output.register_hook(interrupt))
            else:
                handles.append(None)

        if where == "parameter":
            hooked = net.conv.bias.register_hook(interrupt)
        else:
            hooked = (net.lif1 if where == "spikes" else net.fc).register_forward_hook(hook)
        spikes = net(draw())
        with pytest.raises(error):
            spikes.sum().backward()
        hooked.remove()
        del spikes
        net.clear()
        return together(before, good_step(net, "after"))

    check(kind, program)


@EVERY_KIND
def test_backward_again_after_an_exception_with_retained_graph(kind: str) -> None:
    def program(net: Net) -> Observed:
        x, faults = draw(), [Fault]

        def interrupt(grad: Tensor) -> None:
            if faults:
                raise faults.pop()

        hooked = net.lif1.register_forward_hook(
            lambda module, args, output: output.register_hook(interrupt) and None
        )
        spikes = net(x)
        hooked.remove()
        loss = (spikes * torch.randn(spikes.shape)).sum()
        with pytest.raises(Fault):
            loss.backward(retain_graph=True)
        net.zero_grad()
        x.grad = None
        loss.backward()
        return Observed({"spikes": spikes}).see_gradients(net, x=x)

    check(kind, program)


# ------------------------------------------------------------------------------------------ forward


@EVERY_KIND
@pytest.mark.parametrize("error", [Fault, KeyboardInterrupt])
@pytest.mark.parametrize("clear", [True, False])
def test_an_exception_in_mid_forward(clear: bool, error: type, kind: str) -> None:
    """Afterwards the state is where the host's would be, whether it is cleared or carried on."""

    def program(net: Net) -> Observed:
        def fault(t: int) -> None:
            if t == 3:
                raise error

        before = good_step(net, "before")
        net.clear()
        net.fault = fault
        with pytest.raises(error):
            net(draw())
        if clear:
            net.clear()
        return together(before, good_step(net, "after"))

    check(kind, program)


@EVERY_KIND
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode], ids=lambda off: off.__name__)
@pytest.mark.parametrize("clear", [True, False])
def test_a_neuron_called_without_gradients_and_then_with(
    clear: bool, off: Callable, kind: str
) -> None:
    def program(net: Net) -> Observed:
        with off():
            quiet = net(draw().detach())
        if clear:
            net.clear()
        return together(Observed({"quiet": quiet}), good_step(net))

    kinds, options = KINDS[kind]
    if off is torch.inference_mode and not clear:
        try:  # an inference tensor for a state: the host may not be able to go on from it
            program(Net(kinds[0], options))
        except RuntimeError as error:
            assert "nference tensors" in str(error)
            return
    check(kind, program, path="both")


@EVERY_KIND
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_numbers_that_are_not_finite_pass_through_as_in_the_host(value: float, kind: str) -> None:
    def program(net: Net) -> Observed:
        x = draw()
        with torch.no_grad():
            x[2, 1, 0, 2] = value
        spikes = net(x)
        v1, v2 = net.potentials()
        sum((each * torch.randn(each.shape)).sum() for each in (spikes, v2)).backward()
        observed = Observed({"spikes": spikes, "v1": v1, "v2": v2}).see_gradients(net, x=x)
        net.clear()
        return together(observed, good_step(net))

    check(kind, program)


@pytest.mark.parametrize("kind", ["LIF m", "PLIF m"])
@pytest.mark.parametrize("store_v_seq", [False, True])
def test_no_time_steps_at_all(store_v_seq: bool, kind: str) -> None:
    raised = []
    for each in KINDS[kind][0]:
        lif = each(step_mode="m", store_v_seq=store_v_seq)
        with pytest.raises(Exception) as caught:
            lif(torch.zeros(0, 2, 3, requires_grad=True))
        raised.append((caught.type, str(caught.value)))
        spikes = lif(torch.full((2, 2, 3), 3.0, requires_grad=True))
        assert spikes.all()
    assert raised[0] == raised[1]


BAD_CALLS: dict[str, Callable[[], tuple]] = {
    "integers": lambda: (torch.arange(6).view(2, 3), torch.zeros(2, 3)),
    "booleans": lambda: (torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3)),
    "complex numbers": lambda: (
        torch.ones(2, 3, dtype=torch.complex64, requires_grad=True),
        torch.zeros(2, 3),
    ),
    "a list": lambda: ([1.0, 2.0], torch.zeros(2)),
    "a number": lambda: (1.0, torch.zeros(1)),
    "None": lambda: (None, torch.zeros(1)),
    "a membrane of another batch": lambda: (torch.ones(2, 3, requires_grad=True), torch.ones(4, 3)),
    "a membrane of other features": lambda: (
        torch.ones(2, 3, requires_grad=True),
        torch.ones(2, 5),
    ),
    "a membrane to broadcast": lambda: (torch.ones(2, 3, requires_grad=True), torch.ones(3)),
    "a membrane of integers": lambda: (
        torch.ones(2, 3, requires_grad=True),
        torch.ones(2, 3, dtype=torch.int64),
    ),
    "a membrane of float64": lambda: (
        torch.ones(2, 3, requires_grad=True),
        torch.ones(2, 3, dtype=torch.float64),
    ),
    "a membrane that is a number": lambda: (torch.ones(2, 3, requires_grad=True), 0.5),
    "a membrane that is a list": lambda: (torch.ones(2, 3, requires_grad=True), [0.5]),
    "a membrane on another device": lambda: (
        torch.ones(2, 3, requires_grad=True),
        torch.ones(2, 3, device="meta"),
    ),
    "an input on another device": lambda: (
        torch.ones(2, 3, device="meta", requires_grad=True),
        torch.ones(2, 3),
    ),
    "an empty input": lambda: (torch.ones(0, 3, requires_grad=True), torch.ones(0, 3)),
    "a scalar input": lambda: (torch.tensor(2.0, requires_grad=True), torch.tensor(0.1)),
    "a sparse input": lambda: (torch.eye(3).to_sparse().requires_grad_(), torch.zeros(3, 3)),
}


def outcome(kind: type, options: dict, arguments: tuple) -> tuple[Any, nn.Module]:
    """What one call gives: its outputs or its error."""
    lif = kind(**options)
    try:
        return step_of(lif, *arguments), lif
    except Exception as error:
        return error, lif


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize(
    "kind", ["Leaky", "Leaky, learned", "Leaky, zero", "IF s", "LIF s", "PLIF s"]
)
def test_calls_that_the_host_would_not_expect(kind: str, name: str) -> None:
    kinds, options = KINDS[kind]
    options = {key: value for key, value in options.items() if key != "init_hidden"}
    (host, _), (ours, lif) = (outcome(each, options, BAD_CALLS[name]()) for each in kinds)
    if isinstance(host, Exception):
        assert type(ours) is type(host), f"{ours!r}, the host's {host!r}"
    else:
        assert not isinstance(ours, Exception), f"{ours!r}"
        for a, b in zip(ours, host, strict=True):
            assert (a.dtype, a.shape, a.device, a.requires_grad) == (
                b.dtype,
                b.shape,
                b.device,
                b.requires_grad,
            )
            assert a.is_meta or torch.equal(a, b)
    # The next call is right.
    x = torch.full((2, 3), 1.3, requires_grad=True)
    for each in (kinds[0](**options), lif):
        spikes, v = step_of(each, x, torch.zeros(2, 3))
        if each is not lif:
            expected = spikes, v
    assert torch.equal(spikes, expected[0])
    assert torch.equal(v, expected[1])


@pytest.mark.parametrize("name", ["beta", "threshold", "graded_spikes_factor"])
@pytest.mark.parametrize("size", [2, 7])
def test_parameters_that_do_not_fit_raise_as_in_the_host(size: int, name: str) -> None:
    errors = []
    for kind in (snn.Leaky, RevLeaky):
        lif = kind(**({"beta": 0.9} | {name: torch.ones(size)}))
        with pytest.raises(RuntimeError) as caught:
            lif(torch.ones(2, 3, requires_grad=True), lif.reset_mem())
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", ["beta", "threshold", "graded_spikes_factor"])
def test_a_parameter_on_another_device_raises_as_in_the_host(name: str, learned: bool) -> None:
    outcomes = []
    for kind in (snn.Leaky, RevLeaky):
        lif = kind(beta=0.9)
        on_meta = torch.full((3,), 0.5, device="meta")
        setattr(lif, name, on_meta) if not learned else None
        if learned:
            delattr(lif, name)
            setattr(lif, name, nn.Parameter(on_meta))
        try:
            lif(torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3))
        except Exception as error:
            outcomes.append(type(error))
        else:
            outcomes.append(None)
    assert outcomes[0] is not None
    assert outcomes[0] is outcomes[1]


# -------------------------------------------------------------------------------------- odd tensors


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a batch of one": lambda x: x[:1],
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
    "every other": lambda x: x[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "one channel expanded": lambda x: x[:, :1].expand_as(x),
    "flipped": lambda x: x.flip(2),
    "as_strided with overlap": lambda x: x.contiguous().as_strided((2, 3, 4, 4), (40, 10, 2, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_of_the_input(kind: str, layout: str) -> None:
    """Strides of spikes and membranes decide how a later convolution rounds, so they must be the
    host's too."""
    kinds, options = KINDS[kind]

    def program(make: MakeNeuron) -> Observed:
        lif, conv = make(**options), nn.Conv2d(3, 4, 3, padding=1)
        after = make(**options)
        x = torch.randn(2, 3, 5, 6, requires_grad=True)
        seen, mode = [], options.get("step_mode", "s")
        for _ in range(3):
            current = LAYOUTS[layout](2 * x)
            spikes = lif(current.unsqueeze(0) if mode == "m" else current)
            if spikes.shape[-3] == 3:
                above = conv(spikes.flatten(0, 1) if mode == "m" else spikes)
                seen.append(after(above.unsqueeze(0) if mode == "m" else above))
            seen += [spikes, potential_of(lif)]
        sum((each * torch.randn(each.shape)).sum() for each in seen).backward()
        return Observed({str(i): each for i, each in enumerate(seen)}).see_gradients(
            lif, conv, after, x=x
        )

    agree(program, *kinds, path="any")


@EVERY_KIND
@pytest.mark.parametrize(
    "frozen",
    ["conv", "conv and neurons", "all but the last bias", "x alone needs gradients", "everything"],
)
def test_frozen_parameters(frozen: str, kind: str) -> None:
    def program(net: Net) -> Observed:
        x = draw()
        if frozen != "x alone needs gradients":
            x = x.detach()
        for name, parameter in net.named_parameters():
            learns = {
                "conv": "conv" not in name,
                "conv and neurons": "conv" not in name and "lif1" not in name,
                "all but the last bias": name == "fc.bias",
            }.get(frozen, False)
            parameter.requires_grad_(learns)
        spikes = net(x)
        v1, v2 = net.potentials()
        loss = sum((each * torch.randn(each.shape)).sum() for each in (spikes, v1, v2))
        with (
            nullcontext()
            if frozen != "everything"
            else pytest.raises(RuntimeError, match="does not require grad")
        ):
            loss.backward()
        return Observed({"spikes": spikes, "v1": v1, "v2": v2}).see_gradients(
            net, **({"x": x} if x.requires_grad else {})
        )

    check(kind, program, path="any")


@EVERY_KIND
def test_a_parameter_frozen_and_freed_between_steps(kind: str) -> None:
    def program(net: Net) -> Observed:
        seen = []
        for frozen in (False, True, False):
            for parameter in (*net.lif1.parameters(), *net.conv.parameters()):
                parameter.requires_grad_(not frozen)
            seen.append(good_step(net, str(len(seen))))
            net.clear()
        return together(*seen)

    check(kind, program)


@EVERY_KIND
@pytest.mark.parametrize(
    "change", ["spikes in place", "spikes under no_grad", "a view of spikes under no_grad"]
)
def test_spikes_that_the_user_writes_into(change: str, kind: str) -> None:
    """A mask on the spikes of a layer: what is recomputed below the next layer must be the
    masked spikes."""

    def mask(module: nn.Module, args: Any, spikes: Tensor) -> None:
        if change == "spikes in place":
            spikes.mul_(0.5)
            return
        with torch.no_grad():
            (spikes if "view" not in change else spikes.flatten(1)).mul_(torch.tensor(0.5))

    def program(net: Net) -> Observed:
        net.lif1.register_forward_hook(mask)
        return good_step(net)

    check(kind, program)

"""PyTorch's own tools around our neurons: autocast, checkpoints, saved-tensor hooks, compile,
threads, copies, transforms."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from compare import Observed, assert_path
from hosts import PURE, only_pure
from nets import BATCH, EVERY_KIND, KINDS, Net, T, check, path_inside_hooks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from snn_revplugin.swap.module import HAS_COMPILER, OLDEST_COMPILER


def train(
    net: Net,
    forward: Callable[[Tensor], Tensor] | None = None,
    around: Callable[[], AbstractContextManager] = nullcontext,
    of_potentials: bool = True,
    time_steps: int = T,
) -> Observed:
    """One training step."""
    x = torch.randn(time_steps, BATCH, 5, requires_grad=True)
    with around():
        spikes = (net if forward is None else forward)(x)
        seen = {"spikes": spikes} | (
            dict(zip(("v1", "v2"), net.potentials(), strict=True)) if of_potentials else {}
        )
        loss = sum((each * torch.randn(each.shape)).float().sum() for each in seen.values())
    loss.backward()
    return Observed(seen).see_gradients(net, x=x)


# ---------------------------------------------------------------------------- how tensors are saved


SAVING: dict[str, Callable[[], AbstractContextManager]] = {
    "saved_tensors_hooks": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.clone(), lambda t: t
    ),
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "disable_saved_tensors_hooks": lambda: torch.autograd.graph.disable_saved_tensors_hooks(
        "not here"
    ),
}


@EVERY_KIND
@pytest.mark.parametrize("name", SAVING)
def test_hooks_around_a_whole_step(name: str, kind: str) -> None:
    path = path_inside_hooks(kind)
    reason = "how tensors are saved" if path == "host" else None
    check(kind, lambda net: train(net, around=SAVING[name]), path=path, reason=reason)


@EVERY_KIND
@pytest.mark.parametrize("name", SAVING)
@pytest.mark.parametrize("part", ["fc1", "fc2", "lif1"])
def test_hooks_around_a_part(part: str, name: str, kind: str) -> None:
    def program(net: Net) -> Observed:
        plain = getattr(net, part).forward

        def hooked(*args: Tensor) -> Tensor:
            with SAVING[name]():
                return plain(*args)

        getattr(net, part).forward = hooked
        return train(net)

    check(kind, program, path="any")


@EVERY_KIND
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_every_step(reentrant: bool, kind: str) -> None:
    if kind.endswith(" m") and not (PURE or reentrant):
        pytest.skip(
            "the scripted steps of SpikingJelly 0.0.0.0.14 do not let a checkpoint stop early: the"
            " host itself fails"
        )

    def program(net: Net) -> Observed:
        def afresh(frame: Tensor) -> Tensor:
            net.clear()
            return net.body(frame)

        def forward(x: Tensor) -> Tensor:
            outputs = [
                checkpoint(afresh, frame, use_reentrant=reentrant)
                for frame in ([x] if net.steps == "m" else x)
            ]
            return outputs[0] if net.steps == "m" else torch.stack(outputs)

        return train(net, forward, of_potentials=False)

    check(kind, program, path="both" if reentrant else path_inside_hooks(kind))


@EVERY_KIND
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("part", ["fc1", "fc2"])
def test_a_checkpointed_layer_between_neurons_is_computed_once_more_and_no_oftener(
    part: str, reentrant: bool, kind: str
) -> None:
    calls = []

    def program(net: Net) -> Observed:
        layer = getattr(net, part)
        plain, count = layer.forward, []

        def forward(x: Tensor) -> Tensor:
            count.append(1)
            return plain(x)

        layer.forward = lambda x: checkpoint(forward, x, use_reentrant=reentrant)
        observed = train(net)
        calls.append(len(count))
        return observed

    check(kind, program)
    assert calls[1] == calls[0]


# ----------------------------------------------------------------------------- precision and checks


@EVERY_KIND
@pytest.mark.parametrize("whole", [True, False])
def test_autocast_to_bfloat16(whole: bool, kind: str) -> None:
    def program(net: Net) -> Observed:
        if whole:
            return train(net, around=lambda: torch.autocast("cpu", torch.bfloat16))

        def forward(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return net(x)

        return train(net, forward)

    check(kind, program, path="any" if "PLIF" in kind else "reversible", tolerance=2e-2)


@EVERY_KIND
def test_under_autocast_the_backward_outside_of_it_replays_what_forward_did(kind: str) -> None:
    """Currents are recomputed in float32 as in forward, although autocast is on in backward. There
    the host itself rounds gradients to bfloat16, so a difference in float32's last place may grow.
    """

    def program(net: Net) -> Observed:
        x = torch.randn(T, BATCH, 5, requires_grad=True)
        spikes = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            (spikes * torch.randn(spikes.shape)).sum().backward()
        return Observed({"spikes": spikes}).see_gradients(net, x=x)

    check(kind, program, tolerance=1e-3)


@EVERY_KIND
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_detection(kind: str) -> None:
    check(kind, lambda net: train(net, around=torch.autograd.detect_anomaly))


@EVERY_KIND
def test_memory_that_is_not_written_before_it_is_read(kind: str) -> None:
    """In deterministic mode PyTorch fills what ``empty`` gives with NaN."""

    def program(net: Net) -> Observed:
        torch.use_deterministic_algorithms(True)
        try:
            observed = train(net)
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(
            each.isfinite().all() for each in observed.gradients.values() if each is not None
        )
        return observed

    check(kind, program)


# --------------------------------------------------------------------------------------- transforms


@pytest.mark.filterwarnings("ignore")  # those of the compiler
@pytest.mark.parametrize(
    "kind", ["Leaky", pytest.param("LIF m", marks=only_pure)]
)  # 0.0.0.0.14 itself does not compile
def test_torch_compile(kind: str) -> None:
    """Inside of a compiled function the host's path is taken; the numbers are right and training
    goes on outside of it."""

    def program(net: Net) -> Observed:
        torch.compiler.reset()
        compiled = torch.compile(net, backend="aot_eager", fullgraph=False)
        return train(net, compiled, time_steps=3)

    check(kind, program, path="any")


@only_pure
@pytest.mark.skipif(
    not HAS_COMPILER,
    reason=f"before torch {OLDEST_COMPILER} the host's own path is compiled, with its breaks",
)
@pytest.mark.filterwarnings("ignore")
def test_torch_compile_in_full() -> None:
    """SpikingJelly's neurons compile without a graph break, and so do ours."""

    def program(net: Net) -> Observed:
        torch.compiler.reset()
        return train(
            net, torch.compile(net, backend="aot_eager", fullgraph=True), of_potentials=False
        )

    check("LIF m", program, path="any")


@EVERY_KIND
def test_jit_trace(kind: str) -> None:
    kinds, options = KINDS[kind]
    outputs = []
    for each in kinds:
        torch.manual_seed(0)
        net, x = Net(each, options), torch.randn(T, BATCH, 5)
        try:
            outputs.append(torch.jit.trace(net, (x,), check_trace=False, strict=False)(x))
        except Exception as error:
            outputs.append(type(error))
        net.clear()
    assert torch.equal(*outputs) if isinstance(outputs[0], Tensor) else outputs[0] is outputs[1]


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
@pytest.mark.parametrize("kind", ["Leaky", "LIF s", "LIF m"])
def test_function_transforms(transform: str, kind: str) -> None:
    kinds, options = KINDS[kind]
    options = {key: value for key, value in options.items() if key != "init_hidden"}
    outcomes = []
    for each in kinds:
        torch.manual_seed(0)
        lif, x = each(**options), torch.randn(2, 3, 4)

        def function(x: Tensor, lif: nn.Module = lif) -> Tensor:
            if isinstance(lif, snn.SpikingNeuron):
                return lif(x, torch.zeros(x.shape))[0].sum(-1)
            v = torch.zeros(x.shape[1:] if lif.step_mode == "m" else x.shape)
            if not PURE:
                lif.v = v
                return lif(x).sum(-1)
            step = (
                lif.multi_step_functional_forward
                if lif.step_mode == "m"
                else lif.single_step_functional_forward
            )
            (spikes,), _ = step((x,), (v,))
            return spikes.sum(-1)

        try:
            if transform == "grad":
                outcomes.append(torch.func.grad(lambda x, f=function: f(x).sum())(x))
            elif transform == "vmap":
                outcomes.append(torch.func.vmap(function)(x))
            else:
                outcomes.append(torch.func.jvp(function, (x,), (torch.ones_like(x),))[1])
        except Exception as error:
            outcomes.append(type(error))
    if isinstance(outcomes[0], Tensor):
        assert torch.equal(*outcomes)
    else:
        assert outcomes[0] is outcomes[1]


@EVERY_KIND
@pytest.mark.parametrize("how", ["meta", "fake"])
def test_shapes_alone(how: str, kind: str) -> None:
    """Nets are run on tensors without data to learn shapes, memory or operations."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    shapes = []
    for each in KINDS[kind][0]:
        net = Net(
            each, KINDS[kind][1]
        )  # snnTorch's own constructor reads a buffer, which a meta tensor does not allow
        with FakeTensorMode(allow_non_fake_inputs=True) if how == "fake" else torch.device("meta"):
            net = net.to("meta") if how == "meta" else net
            spikes = net(torch.randn(T, BATCH, 5, requires_grad=True))
            spikes.sum().backward()
            shapes.append(
                (spikes.shape, spikes.device, spikes.requires_grad, net.fc1.weight.grad.shape)
            )
    assert shapes[0] == shapes[1]


# ------------------------------------------------------------------------------- threads and copies


@EVERY_KIND
def test_two_nets_in_two_threads(kind: str) -> None:
    kinds, options = KINDS[kind]
    torch.manual_seed(0)
    hosts = [Net(kinds[0], options) for _ in range(2)]
    nets = [Net(kinds[1], options) for _ in range(2)]
    inputs = [torch.randn(T, BATCH, 5) for _ in range(2)]
    for host, net in zip(hosts, nets, strict=True):
        net.load_state_dict(host.state_dict())
    failures = []

    def work(net: Net, x: Tensor) -> None:
        try:
            for _ in range(8):
                net.clear()
                net.zero_grad()
                spikes = net(x)
                barrier.wait(timeout=20)
                (spikes * torch.arange(4)).sum().backward()
        except Exception as error:  # a thread's exception would be lost
            failures.append(error)
            barrier.abort()

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=work, args=each) for each in zip(nets, inputs, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for host, net, x in zip(hosts, nets, inputs, strict=True):
        (host(x) * torch.arange(4)).sum().backward()
        for (name, p), q in zip(host.named_parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(
                q.grad, p.grad, rtol=2e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )
        assert_path([net.lif1, net.lif2], "reversible")


@EVERY_KIND
def test_forward_in_one_thread_and_backward_in_another(kind: str) -> None:
    def program(net: Net) -> Observed:
        x = torch.randn(T, BATCH, 5, requires_grad=True)
        spikes = net(x)
        loss = (spikes * torch.randn(spikes.shape)).sum()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        return Observed({"spikes": spikes}).see_gradients(net, x=x)

    check(kind, program)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": lambda net: torch.load(_saved(net), weights_only=False),
}


def _saved(net: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return file


@EVERY_KIND
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("used", [False, True])
def test_copies_train_alike_and_apart(used: bool, how: str, kind: str) -> None:
    """A copy carries the state on, has a ledger of its own, and shares nothing with what it was
    copied from."""

    def program(net: Net) -> Observed:
        if used:
            train(net)
            for lif in (net.lif1, net.lif2):
                for name in {"syn", "mem", "v"} & {*dir(lif)}:
                    setattr(lif, name, getattr(lif, name).detach())
        copied = COPIES[how](net)
        assert list(copied.state_dict()) == list(net.state_dict())
        if hasattr(copied.lif1, "record"):
            assert copied.lif1.record is not net.lif1.record
            assert copied.lif1.record.statistics.calls == 0
        copied.zero_grad()
        net.zero_grad()
        observed = train(copied)
        assert all(p.grad is None for p in net.parameters())
        return observed

    check(kind, program, path="any")


@EVERY_KIND
def test_a_copy_in_mid_sequence_raises_as_the_host_does(kind: str) -> None:
    """A state with a history cannot be copied by PyTorch; the default surrogate of snnTorch cannot
    be pickled."""
    for each in KINDS[kind][0]:
        net = Net(each, KINDS[kind][1])
        net(torch.randn(T, BATCH, 5, requires_grad=True))
        with pytest.raises(RuntimeError, match="deepcopy protocol"):
            copy.deepcopy(net)


@EVERY_KIND
def test_module_hooks_see_what_they_see_of_the_host(kind: str) -> None:
    def program(net: Net) -> Observed:
        seen, back = [], []
        for lif in (net.lif1, net.lif2):
            lif.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
            lif.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
            lif.register_full_backward_hook(
                lambda module, grads, outputs: back.append((*grads, *outputs))
            )
        observed = train(net)
        assert seen
        assert back
        observed.exact |= {f"hook {i}": each for i, each in enumerate(seen)}
        observed.gradients |= {
            f"hook {i}.{j}": each for i, grads in enumerate(back) for j, each in enumerate(grads)
        }
        return observed

    check(kind, program)


@EVERY_KIND
def test_training_and_evaluation_take_turns(kind: str) -> None:
    """Five epochs of a step and an evaluation, with gradients clipped, accumulated over two batches
    and scaled."""

    def program(net: Net) -> Observed:
        optimizer, losses = torch.optim.Adam(net.parameters(), lr=0.01), []
        for _ in range(5):
            net.train()
            for _ in range(2):
                net.clear()
                spikes = net(torch.randn(T, BATCH, 5))
                loss = (spikes.mean(0) - torch.tensor([0.8, 0.1, 0.5, 0.3])).square().sum() * 4
                loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            net.eval()
            net.clear()
            with torch.no_grad():
                losses += [loss.detach(), net(torch.randn(T, BATCH, 5)).mean()]
        return Observed({}, {"losses": torch.stack(losses), "w": net.fc1.weight.detach()})

    check(kind, program, path="both", tolerance=1e-3)

"""The set-ups that people train in, around nets of both hosts: each must give what it gives around
the host's own neurons.

Several processes are in ``test_distributed.py``; single tools, copies and threads in
``test_tools.py``.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
from compare import MakeNeuron, Observed, agree, assert_agree
from hosts import PURE
from nets import BATCH, EVERY_KIND, KINDS, OF_SNNTORCH, Net, T, check, path_inside_hooks
from spikingjelly.activation_based import functional, layer, memopt, neuron, surrogate
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from snn_revplugin import explain
from snn_revplugin.adapters.spikingjelly import RevIFNode, RevLIFNode, RevParametricLIFNode
from snn_revplugin.replay import HeldTensor
from snn_revplugin.replay.walk import FREED

ON_EVERY_DEVICE = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def batch(device: str = "cpu") -> tuple[Tensor, Tensor]:
    """An input and a target of the spikes' rates."""
    return torch.randn(T, BATCH, 5).to(device), torch.rand(BATCH, 4).to(device)


def loss_of(net: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    spikes = net(x)
    return (spikes.float().mean(0) - target).square().sum(), spikes


# ---------------------------------------------------------------------------------- mixed precision


@ON_EVERY_DEVICE
@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_scaled_loss(dtype: torch.dtype, kind: str, device: str) -> None:
    """Gradients are unscaled and clipped, and a step whose gradients overflow is left out."""

    def program(net: Net) -> Observed:
        net.to(device)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        observed, scales = Observed(), []
        for step in range(3):
            net.clear()
            optimizer.zero_grad()
            with torch.autocast(device, dtype):
                loss, spikes = loss_of(net, *batch(device))
                loss = loss * (torch.inf if step == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if step == 0:
                observed.exact["spikes"] = spikes
                observed.gradients |= {
                    name: each.grad.clone() for name, each in net.named_parameters()
                }
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        observed.exact["scales"] = torch.tensor(scales)
        observed.gradients |= {
            f"{name} after": each.detach() for name, each in net.named_parameters()
        }
        return observed

    # SpikingJelly 0.0.0.0.14 changes the dtype of PLIF's potential with the first reset.
    path = "any" if "PLIF" in kind and not PURE else "reversible"
    check(kind, program, path=path, tolerance=2e-2)


# ----------------------------------------------------------------- accumulating, clipping, stepping


CLIPPINGS: dict[str, Callable[[list[Tensor]], Any]] = {
    "norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.5),
    "value": lambda parameters: nn.utils.clip_grad_value_(parameters, 0.01),
}


@EVERY_KIND
@pytest.mark.parametrize("how", CLIPPINGS)
def test_gradients_summed_over_batches_and_clipped(how: str, kind: str) -> None:
    def program(net: Net) -> Observed:
        observed = Observed()
        for part in range(3):
            net.clear()
            loss, observed.exact[f"spikes {part}"] = loss_of(net, *batch())
            (loss / 3).backward()
        observed.gradients["norm"] = nn.utils.get_total_norm(
            [each.grad for each in net.parameters()]
        )
        CLIPPINGS[how](list(net.parameters()))
        return observed.see_gradients(net)

    check(kind, program)


@EVERY_KIND
def test_the_optimiser_steps_in_backward(kind: str) -> None:
    """A weight changes as soon as its gradient is there, in mid-backward; by then no recomputation
    reads it."""

    def program(net: Net) -> Observed:
        optimizers = {each: torch.optim.SGD([each], lr=0.05) for each in net.parameters()}
        gradients: dict[str, Tensor] = {}
        names = {each: name for name, each in net.named_parameters()}

        def step(parameter: Tensor) -> None:
            gradients.setdefault(names[parameter], parameter.grad.clone())
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for each in net.parameters():
            each.register_post_accumulate_grad_hook(step)
        observed = Observed()
        for _ in range(2):
            net.clear()
            loss, spikes = loss_of(net, *batch())
            observed.exact.setdefault("spikes", spikes)
            loss.backward()
        assert all(each.grad is None for each in net.parameters())
        observed.gradients = gradients | {
            f"{name} after": each.detach() for name, each in net.named_parameters()
        }
        return observed

    check(kind, program)


@pytest.mark.parametrize("v_reset", [None, 0.0])
@pytest.mark.parametrize("mode", ["s", "m"])
def test_the_optimiser_steps_in_backward_of_convolutions_and_norms(
    mode: str, v_reset: float | None
) -> None:
    """The weights of a norm change before the convolution below it has its gradient; so do those
    above a pooling layer."""

    def program(make: MakeNeuron) -> Observed:
        def block(channels: int) -> list[nn.Module]:
            lif = make(surrogate_function=surrogate.ATan(), step_mode=mode, v_reset=v_reset)
            parts = (
                layer.Conv2d(channels, 6, 3, padding=1, bias=False),
                layer.BatchNorm2d(6),
                layer.MaxPool2d(2),
            )
            return [*parts, lif]

        net = nn.Sequential(*block(2), *block(6))
        functional.set_step_mode(net, mode)
        for name, each in net.named_parameters():
            nn.init.normal_(each, 1.0 if name.endswith("1.weight") else 0.0, 0.5)
        gradients: dict[str, Tensor] = {}

        def step(name: str, parameter: Tensor) -> None:
            gradients[name] = parameter.grad
            with torch.no_grad():
                parameter.sub_(parameter.grad, alpha=0.1)

        for name, each in net.named_parameters():
            each.register_post_accumulate_grad_hook(
                lambda parameter, name=name: step(name, parameter)
            )
        x = torch.randn(T, 2, 2, 8, 8)
        spikes = net(x) if mode == "m" else torch.stack([net(frame) for frame in x])
        (spikes * torch.randn(spikes.shape)).sum().backward()
        return Observed({"spikes": spikes}, gradients)

    agree(program, neuron.LIFNode, RevLIFNode)


# ------------------------------------------------------ hooks of another tool that save tensors


RESETS: dict[str, dict[str, Any]] = {
    "hard": {},
    "detached": {"detach_reset": True},
    "soft": {"v_reset": None},
}


@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize(
    "kinds",
    [
        (neuron.IFNode, RevIFNode),
        (neuron.LIFNode, RevLIFNode),
        (neuron.ParametricLIFNode, RevParametricLIFNode),
    ],
    ids=lambda kinds: kinds[0].__name__,
)
def test_what_a_neuron_hands_to_hooks(kinds: tuple[type, type], reset: str, mode: str) -> None:
    """The charged potentials: never more than the host hands over, and the whole gradient follows
    from them."""
    handed: list[int] = []

    def program(make: MakeNeuron) -> Observed:
        lif, x = make(step_mode=mode, **RESETS[reset]), torch.randn(T, 4, 16, requires_grad=True)
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            spikes = lif(2 * x) if mode == "m" else torch.stack([lif(frame) for frame in 2 * x])
        handed.append(sum(sizes))
        (
            (spikes * torch.randn(spikes.shape)).sum() + (lif.v * torch.randn(lif.v.shape)).sum()
        ).backward()
        return Observed({"spikes": spikes, "v": lif.v}).see_gradients(lif, x=x)

    [lif] = agree(program, *kinds, path="hooked")
    charged = T * 4 * 16 * 4
    assert lif.record.statistics.hooked_bytes == charged
    assert f"saves {charged} bytes of charged potentials" in str(explain(lif))
    assert handed[1] <= handed[0]
    if (
        kinds[0] is not neuron.ParametricLIFNode
    ):  # whose derivative reads the potential before the first step too
        assert handed == [charged * {"hard": 3, "detached": 2, "soft": 1}[reset], charged]


@EVERY_KIND
def test_a_net_goes_in_and_out_of_hooks_in_mid_sequence(kind: str) -> None:
    """A state that was reached inside of hooks is gone on from outside of them, and the other way
    round."""

    def program(net: Net) -> Observed:
        x, spikes = torch.randn(T, BATCH, 5, requires_grad=True), []
        for start in range(0, T, 2):
            with torch.autograd.graph.save_on_cpu() if start == 2 else nullcontext():
                spikes.append(net(x[start : start + 2]))
        (torch.cat(spikes) * torch.randn(T, BATCH, 4)).sum().backward()
        return Observed({"spikes": torch.cat(spikes)}).see_gradients(net, x=x)

    check(kind, program, path="any")


@ON_EVERY_DEVICE
@EVERY_KIND
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_a_net(reentrant: bool, kind: str, device: str) -> None:
    def program(net: Net) -> Observed:
        net.to(device)

        def forward(x: Tensor) -> Tensor:
            net.clear()
            return net(x)

        x = torch.randn(T, BATCH, 5).to(device).requires_grad_()
        spikes = checkpoint(forward, x, use_reentrant=reentrant)
        (spikes * torch.randn(spikes.shape).to(device)).sum().backward()
        return Observed({"spikes": spikes}).see_gradients(net, x=x)

    check(kind, program, path="both" if reentrant else path_inside_hooks(kind))


class Block(nn.Sequential):
    """convolution - batch norm - neuron: what memopt looks for."""

    def __init__(self, channels: int, lif: nn.Module) -> None:
        super().__init__(layer.Conv2d(channels, 6, 3, padding=1), layer.BatchNorm2d(6), lif)
        functional.set_step_mode(self, "m")
        nn.init.normal_(self[0].weight)


def optimised(**options: Any) -> Callable[[nn.Module, Callable[[nn.Module], Tensor]], nn.Module]:
    return lambda net, forward: memopt.optimize_memory(
        net, Block, forward, checkpoint_budget="memory", **options
    )


def in_chunks(net: nn.Sequential, forward: Callable[[nn.Module], Tensor]) -> nn.Module:
    """Every block checkpointed by stretches of time; from the second on what it is given are
    spikes, and are kept as bits."""
    compressors = None, memopt.BitSpikeCompressor(), memopt.BitSpikeCompressor()
    return nn.Sequential(
        *(
            memopt.checkpoint_module(each, compressor=by, chunks=3)
            for each, by in zip(net, compressors, strict=True)
        )
    )


MEMOPT = {
    "level 1": optimised(level=1),
    "level 1, floats": optimised(level=1, compress=False),
    "chunks of time": in_chunks,
    "level 4": optimised(level=4),
}


@pytest.mark.filterwarnings("ignore")
@ON_EVERY_DEVICE
@pytest.mark.parametrize("how", MEMOPT)
def test_spikingjellys_memopt(how: str, device: str) -> None:
    """Blocks checkpointed by SpikingJelly, with the spikes between them compressed."""
    if how == "level 4" and device == "cpu":
        pytest.skip("memopt itself asks for CUDA from level 2 on")

    def program(make: MakeNeuron) -> Observed:
        x = torch.randn(T, 2, 2, 5, 5).to(device)
        net = nn.Sequential(
            *(
                Block(channels, make(surrogate_function=surrogate.ATan(), step_mode="m"))
                for channels in (2, 6, 6)
            )
        )
        net = MEMOPT[how](net.to(device), lambda net: net(x))
        functional.reset_net(net)
        net.zero_grad()
        spikes = net(x)
        (spikes * torch.randn(6, 1, 1).to(device)).sum().backward()
        buffers = {name: each for name, each in net.named_buffers() if each.is_floating_point()}
        return Observed({"spikes": spikes} | buffers).see_gradients(net)

    for lif in agree(program, neuron.LIFNode, RevLIFNode, path="any"):
        assert lif.record.statistics.hooked_calls > 0


# ---------------------------------------------------------------------- functions of the parameters


@EVERY_KIND
def test_functional_call(kind: str) -> None:
    def program(net: Net) -> Observed:
        others = {
            name: (each.detach() * 0.9).requires_grad_() for name, each in net.named_parameters()
        }
        x = torch.randn(T, BATCH, 5)
        spikes = torch.func.functional_call(net, others, (x,))
        (spikes * torch.randn(spikes.shape)).sum().backward()
        assert all(each.grad is None for each in net.parameters())
        return Observed({"spikes": spikes}, {name: each.grad for name, each in others.items()})

    check(kind, program)


@EVERY_KIND
def test_the_gradient_as_a_function(kind: str) -> None:
    """``torch.func.grad`` of a functional call takes the host's path. SpikingJelly's surrogates do
    not allow it."""

    def program(net: Net) -> Observed:
        x, target = batch()

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            net.clear()
            spikes = torch.func.functional_call(net, parameters, (x,))
            return (spikes.mean(0) - target).square().sum()

        parameters = {name: each.detach() for name, each in net.named_parameters()}
        if kind not in OF_SNNTORCH:
            with pytest.raises(RuntimeError, match="setup_context"):
                torch.func.grad_and_value(loss)(parameters)
            return Observed(parameters)
        gradients, value = torch.func.grad_and_value(loss)(parameters)
        return Observed({"loss": value}, gradients)

    reason = "function transform" if kind in OF_SNNTORCH else None
    check(kind, program, path="any", reason=reason)


# -------------------------------------------------------------- weights that FSDP frees and gathers


class Freed:
    """A parameter whose memory is freed and allocated later, as FSDP does: no version tells."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter, self.values = parameter, parameter.detach().clone()

    def free(self, *_: object) -> None:
        self.parameter.untyped_storage().resize_(0)

    def gather(self, *_: object) -> None:
        self.parameter.untyped_storage().resize_(self.values.nbytes)
        self.parameter.data.copy_(self.values)


@EVERY_KIND
def test_a_weight_that_is_freed_until_its_own_backward_is_a_boundary(kind: str) -> None:
    """When the neuron above recomputes its current, FSDP has not gathered the weight yet."""

    def program(net: Net) -> Observed:
        weight = Freed(net.fc2.weight)

        def after(module: nn.Module, args: tuple, output: Tensor) -> None:
            weight.free()
            output.register_hook(weight.gather)

        net.fc2.register_forward_pre_hook(weight.gather)
        net.fc2.register_forward_hook(after)
        x = torch.randn(T, BATCH, 5, requires_grad=True)
        spikes = net(x)
        (spikes * torch.randn(spikes.shape)).sum().backward()
        return Observed({"spikes": spikes}).see_gradients(net, x=x)

    kinds, options = KINDS[kind]
    below, above = agree(lambda make: program(Net(make, options)), *kinds)
    assert not below.record.statistics.boundaries
    assert set(above.record.statistics.boundaries) == {FREED}
    assert FREED in str(explain(above))


@EVERY_KIND
def test_a_weight_that_is_gone_in_backward_raises(kind: str) -> None:
    """To read it would end the process."""
    kinds, options = KINDS[kind]
    net = Net(kinds[1], options)
    spikes = net(torch.randn(T, BATCH, 5))
    Freed(net.fc2.weight).free()
    with pytest.raises(RuntimeError, match="has been freed"):
        spikes.sum().backward()


def test_two_tensors_at_one_address_are_two() -> None:
    """The memory of a freed weight may be given to the next; a recipe of the one must not serve for
    the other."""
    memory = np.zeros(4, dtype=np.float32)
    one, other = torch.from_numpy(memory), torch.from_numpy(memory)
    assert one.data_ptr() == other.data_ptr()
    assert HeldTensor(one).identity != HeldTensor(other).identity
    assert HeldTensor(one).identity == HeldTensor(one.detach()).identity
    assert HeldTensor(one).identity != HeldTensor(one[:2]).identity


# ---------------------------------------------------------------------- hooks of modules in the way


@EVERY_KIND
@pytest.mark.parametrize("part", ["fc1", "lif1", "fc2", "lif2"])
def test_a_backward_hook_of_a_module_is_no_boundary(part: str, kind: str) -> None:
    """It gives a node of its own to what goes in and what comes out, which hands on what it is
    given."""

    def program(net: Net) -> Observed:
        seen: list[tuple] = []
        getattr(net, part).register_full_backward_hook(
            lambda module, grads, outputs: seen.append((*grads, *outputs))
        )
        x = torch.randn(T, BATCH, 5, requires_grad=True)
        spikes = net(x)
        (spikes * torch.randn(spikes.shape)).sum().backward()
        gradients = {
            f"hook {i}.{j}": each for i, grads in enumerate(seen) for j, each in enumerate(grads)
        }
        return Observed({"spikes": spikes}, gradients).see_gradients(net, x=x)

    kinds, options = KINDS[kind]
    for lif in agree(lambda make: program(Net(make, options)), *kinds):
        assert not lif.record.statistics.boundaries


# ------------------------------------------------------------------------------- saving and loading


@EVERY_KIND
@pytest.mark.parametrize("ours_first", [False, True])
def test_training_goes_on_from_a_checkpoint_of_the_other(ours_first: bool, kind: str) -> None:
    """Two steps with one kind of neuron, net and optimiser saved, and two with the other: as four
    of the host's."""
    (host, ours), options = KINDS[kind]
    batches = [batch() for _ in range(4)]

    def trained(first: type, second: type) -> Observed:
        torch.manual_seed(0)
        net = Net(first, options)
        optimizer, observed = torch.optim.Adam(net.parameters(), lr=0.01), Observed()
        for i, each in enumerate(batches):
            if i == 2:
                file = io.BytesIO()
                net.clear()
                torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
                file.seek(0)
                state, net = torch.load(file, weights_only=True), Net(second, options)
                net.load_state_dict(state["net"])
                optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
                optimizer.load_state_dict(state["optimizer"])
            net.clear()
            optimizer.zero_grad()
            loss, observed.exact[f"spikes {i}"] = loss_of(net, *each)
            loss.backward()
            optimizer.step()
        return observed.see_gradients(net)

    seen = [trained(host, host), trained(*((ours, host) if ours_first else (host, ours)))]
    assert_agree(*seen)


# ----------------------------------------------------------------------------------------- trainers


@pytest.mark.filterwarnings("ignore")
@EVERY_KIND
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(precision: str, kind: str, tmp_path: Path) -> None:
    """PyTorch Lightning's trainer: batches accumulated, gradients clipped, a checkpoint saved and
    gone on from."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, net: Net) -> None:
            super().__init__()
            self.net, self.seen = net, Observed()

        def training_step(self, batch: tuple[Tensor, Tensor], i: int) -> Tensor:
            self.net.clear()
            x, target = batch
            loss, spikes = loss_of(self.net, x.transpose(0, 1), target)
            self.seen.exact.setdefault("spikes", spikes.detach())
            self.seen.gradients[f"loss {len(self.seen.gradients)}"] = loss.detach()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    def program(net: Net) -> Observed:
        module = Module(net)
        data = torch.utils.data.TensorDataset(
            torch.randn(4 * BATCH, T, 5), torch.rand(4 * BATCH, 4)
        )
        loader = torch.utils.data.DataLoader(data, batch_size=BATCH)
        for epochs in (1, 2):
            trainer = lightning.Trainer(
                max_epochs=epochs,
                accelerator="cpu",
                precision=precision,
                accumulate_grad_batches=2,
                gradient_clip_val=0.5,
                default_root_dir=tmp_path,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, loader, ckpt_path=tmp_path / "checkpoint" if epochs == 2 else None)
            trainer.save_checkpoint(tmp_path / "checkpoint")
            net.clear()
        observed = module.seen
        observed.gradients |= {name: each.detach() for name, each in net.named_parameters()}
        return observed

    check(
        kind,
        program,
        path="any" if "PLIF" in kind else "reversible",
        tolerance=1e-3 if precision == "32-true" else 5e-2,
    )

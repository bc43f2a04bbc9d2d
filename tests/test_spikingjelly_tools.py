"""SpikingJelly's own tools on a convolutional net with our neurons: what they give is what they
give with the host's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from compare import MakeNeuron, Observed, agree, assert_agree, assert_path, nir_content
from spikingjelly.activation_based import (
    ann2snn,
    base,
    functional,
    lava_exchange,
    layer,
    learning,
    lynxi_exchange,
    neuron,
    op_counter,
    precision,
    profiler,
    surrogate,
)
from spikingjelly.activation_based.ann2snn.recipes.rate_coding import RateCodingRecipe
from spikingjelly.activation_based.distributed import vision
from spikingjelly.activation_based.functional import conv_bn_fusion
from spikingjelly.activation_based.learning.online_learning import (
    fptt_online_training,
    fptt_online_training_init_w_ra,
)
from spikingjelly.activation_based.model.spikformer import SpikformerCIFAR10Config
from spikingjelly.activation_based.nir_exchange import export_to_nir, import_from_nir
from test_spikingjelly import EVERY_MODE, EVERY_NODE, NODES
from torch import Tensor

from snn_revplugin import convert, restore
from snn_revplugin.adapters.spikingjelly import CoupledLIFNode, RevLIFNode
from snn_revplugin.swap.module import ReversibleNeuron

T = 4
BATCH = 4


class Net(nn.Module):
    """conv - batch norm - neurons - pool - flatten - linear - neurons; ``[T, N, 2, 6, 6]`` to ``[T,
    N, 4]``."""

    def __init__(self, make: MakeNeuron, mode: str, norm: bool = True) -> None:
        super().__init__()
        self.conv = layer.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = layer.BatchNorm2d(4) if norm else None
        self.lif1 = make(surrogate_function=surrogate.ATan())
        self.pool, self.flatten, self.fc = layer.AvgPool2d(2), layer.Flatten(), layer.Linear(36, 4)
        self.lif2 = make(v_threshold=0.25)
        functional.set_step_mode(self, mode)
        for each in (self.conv, self.fc):
            nn.init.normal_(
                each.weight,
                mean=0.1,
                std=2 / each.weight[0].numel() ** 0.5,
            )

    @property
    def neurons(self) -> tuple[nn.Module, nn.Module]:
        return self.lif1, self.lif2

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x if self.norm is None else self.norm(x)
        return self.lif2(self.fc(self.flatten(self.pool(self.lif1(x)))))

    def run(self, x: Tensor) -> Tensor:
        return self(x) if self.lif1.step_mode == "m" else functional.multi_step_forward(x, self)

    def observe(self, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> Observed:
        """A training step."""
        spikes = (run or self.run)(x)
        (spikes * torch.randn(spikes.shape)).float().sum().backward()
        return Observed({"spikes": spikes}).see_gradients(self)


def draw() -> Tensor:
    return torch.rand(T, BATCH, 2, 6, 6) * 4


def of_both(
    tool: Callable[[Net], Any], mode: str, node: str = "LIF", norm: bool = True
) -> list[Any]:
    """What a tool gives of a host's net and of ours, made and drawn from the same seed."""
    given = []
    for kind in NODES[node]:
        torch.manual_seed(0)
        given.append(tool(Net(kind, mode, norm)))
    return given


def without_names(text: object, node: str = "LIF") -> str:
    host, ours = (kind.__name__ for kind in NODES[node])
    return str(text).replace(ours, host)


# ---------------------------------------------------------------------------------------------- NIR


@EVERY_NODE
@EVERY_MODE
def test_nir_export(mode: str, node: str) -> None:
    """Of a net that is in the middle of a sequence, and stays there."""

    def exported(net: Net) -> tuple:
        x = draw()
        net.run(x)
        v = [each.v.clone() for each in net.neurons]
        graph = export_to_nir(net, x if mode == "m" else x[0], dt=1e-3)
        assert all(torch.equal(each.v, before) for each, before in zip(net.neurons, v, strict=True))
        return nir_content(graph)

    host, ours = of_both(exported, mode, node, norm=False)  # NIR knows no batch norm
    assert ours == host
    assert {kind for kind, _ in ours[0].values()} >= {
        "Conv2d",
        "Affine",
        "IF" if node == "IF" else "LIF",
    }


@EVERY_MODE
def test_nir_there_and_back(mode: str, tmp_path: Path) -> None:
    """A net exported to a file with our neurons, imported with the host's, converted, and
    trained."""
    torch.manual_seed(0)
    export_to_nir(Net(RevLIFNode, "m", norm=False), draw(), tmp_path / "net.nir")
    observed, imported = [], None
    for change in (restore, convert):
        imported = import_from_nir(tmp_path / "net.nir", step_mode=mode)
        change(imported)
        torch.manual_seed(1)
        x, state, outputs = draw(), None, []
        for part in x.unsqueeze(1) if mode == "m" else x:
            output, state = imported(part, state)
            outputs.append(output)
        spikes = torch.stack(outputs)
        spikes.sum().backward()
        observed.append(Observed({"spikes": spikes}).see_gradients(imported))
    assert observed[0].exact["spikes"].any()
    assert_agree(*observed)
    assert_path([each for each in imported.modules() if isinstance(each, RevLIFNode)], "reversible")


@EVERY_MODE
def test_nir_refuses_the_coupled_node(mode: str) -> None:
    net = nn.Sequential(layer.Linear(5, 4, step_mode=mode), CoupledLIFNode(step_mode=mode))
    with pytest.raises(TypeError, match="NIR has no node for CoupledLIFNode"):
        export_to_nir(net, torch.rand(*((3,) if mode == "m" else ()), 2, 5))


# --------------------------------------------------------------------------------------- op_counter


COUNTERS = (
    op_counter.FlopCounter,
    op_counter.ACCounter,
    op_counter.MACCounter,
    op_counter.SynOpCounter,
    op_counter.MemoryAccessCounter,
    op_counter.NeuronStateCounter,
)


def counts_of(counter: op_counter.BaseCounter) -> dict[str, dict[str, int]]:
    counts = {
        scope: {str(func): n for func, n in each.items()}
        for scope, each in counter.get_counts().items()
    }
    if isinstance(counter, op_counter.NeuronStateCounter):
        counts |= {f"{scope}, metrics": each for scope, each in counter.get_metric_counts().items()}
    return counts


@EVERY_MODE
@EVERY_NODE
@pytest.mark.parametrize("what", ["evaluation", "forward", "training step"])
def test_operations_are_counted_as_the_hosts(what: str, node: str, mode: str) -> None:
    """And the next step, which no counter watches, is reversible again."""

    def counted(net: Net) -> list:
        x, counters = draw(), [each() for each in COUNTERS]
        with op_counter.DispatchCounterMode(counters), torch.set_grad_enabled(what != "evaluation"):
            spikes = net.run(x)
            if what == "training step":
                spikes.sum().backward()
        if isinstance(net.lif1, ReversibleNeuron):
            assert_path(
                net.neurons, "host", "no gradient" if what == "evaluation" else "op_counter"
            )
            functional.reset_net(net)
            net.run(x).sum().backward()
            assert_path(net.neurons, "both")
        return [counts_of(each) for each in counters]

    host, ours = of_both(counted, mode, node)
    assert ours == host
    assert all(each["Global"] for each in host)


@EVERY_MODE
def test_operations_of_the_coupled_node_are_those_of_its_equations(mode: str) -> None:
    counts = []
    for reversible in (True, False):
        torch.manual_seed(0)
        node, counter = (
            CoupledLIFNode(step_mode=mode, reversible=reversible),
            op_counter.FlopCounter(),
        )
        with op_counter.DispatchCounterMode([counter]):
            node(torch.rand(3, 2, 4, requires_grad=True)).sum().backward()
        counts.append(counts_of(counter))
    assert counts[0] == counts[1]
    assert counts[0]["Global"]


ENERGIES = {
    "simple": op_counter.estimate_simple_energy,
    "Lemaire": op_counter.estimate_lemaire_energy,
    "NeuroMC": op_counter.neuromc.estimate_neuromc_runtime_energy,
    "SpikeSim": op_counter.spikesim.estimate_spikesim_energy,
}


@EVERY_MODE
@pytest.mark.parametrize("name", ENERGIES)
@pytest.mark.parametrize("records", [False, True])
def test_energy(records: bool, name: str, mode: str) -> None:
    """Of a forward, with and without gradients being recorded; of a whole training step where the
    estimate knows of such."""

    def estimated(net: Net) -> str:
        net.lif1.surrogate_function = (
            surrogate.Sigmoid()
        )  # NeuroMC does not know ATan's derivative, nor that of a reset
        net = nn.Sequential(
            net.conv, net.lif1, layer.Conv2d(4, 3, 3, step_mode=mode), net.lif2
        ).eval()
        x = (draw() if mode == "m" else draw()[0]).requires_grad_(records)
        more = (
            {"target": torch.zeros(()), "loss_fn": lambda y, _: y.sum()}
            if records and name == "NeuroMC" and mode == "s"
            else {}
        )
        with torch.set_grad_enabled(records):
            return without_names(ENERGIES[name](net, x, **more))

    host, ours = of_both(estimated, mode)
    assert ours == host


# ---------------------------------------------------------------------------------------- profilers


class CallOrder(profiler.HookProfiler):
    """What SpikingJelly's layer-wise profilers are without a GPU: their hooks, on the modules that
    they select."""

    def _register_hooks(self) -> None:
        self.calls: list[str] = []
        for name, module in self._selected_modules():
            self.hooks += [
                module.register_forward_hook(
                    lambda *_, name=name: self.calls.append(f"forward {name}")
                ),
                module.register_full_backward_hook(
                    lambda *_, name=name: self.calls.append(f"backward {name}")
                ),
            ]

    def export(self, output: bool = True) -> list[str]:
        return self.calls


@EVERY_MODE
@pytest.mark.parametrize(
    "instances", [(nn.Module,), (neuron.LIFNode,), (neuron.BaseNode,)], ids=str
)
def test_profilers_find_and_follow_the_neurons(
    instances: tuple[type, ...], mode: str, tmp_path: Path
) -> None:
    def profiled(net: Net) -> list[str]:
        with CallOrder(
            (net,), search_mode=("submodules",), instances=instances, log_path=tmp_path / "log"
        ) as profile:
            net.observe(draw().requires_grad_())
        return profile.export()

    host, ours = of_both(profiled, mode)
    assert ours == host
    assert len({call for call in ours if call.endswith((" lif1", " lif2"))}) == 4


@pytest.mark.gpu
@EVERY_MODE
def test_layerwise_profilers_on_a_gpu(mode: str, tmp_path: Path) -> None:
    def profiled(net: Net) -> list[list[str]]:
        net, x, names = net.cuda(), draw().cuda().requires_grad_(), []
        for kind in (
            profiler.LayerWiseMemoryProfiler,
            profiler.LayerWiseFPCUDATimeProfiler,
            profiler.LayerWiseBPCUDATimeProfiler,
        ):
            with kind((net,), log_path=tmp_path / "log") as profile:
                net.run(x).sum().backward()
                functional.reset_net(net)
            profile.export(output=False)
            names.append(list(profile.module_obj))
        return names

    host, ours = of_both(profiled, mode)
    assert ours == host


# ---------------------------------------------------------------------------------------- precision


@EVERY_MODE
@pytest.mark.parametrize("config", ["fp32", "bf16"])
def test_precision(config: str, mode: str) -> None:
    described = []

    def program(make: MakeNeuron) -> Observed:
        net = Net(make, mode)
        artifacts = precision.prepare_model_for_precision(net, "cpu", config)
        described.append(artifacts.describe())

        def run(x: Tensor) -> Tensor:
            with artifacts.autocast_context():
                return net.run(x)

        return artifacts.model.observe(draw(), run)

    agree(program, *NODES["LIF"], tolerance=2e-5 if config == "fp32" else 2e-2)
    assert described[0] == described[1]


@pytest.mark.parametrize("coupled", [False, True])
def test_precision_of_the_hosts_own_kernels_is_refused(coupled: bool) -> None:
    """The host would leave our neurons out of it without a word; after ``restore`` it says itself
    that it needs a GPU."""
    net, config = Net(neuron.LIFNode, "m"), {"mode": "bf16", "neuron_storage": "bf16"}
    net.lif2 = CoupledLIFNode(step_mode="m") if coupled else RevLIFNode(step_mode="m")
    with pytest.raises(
        TypeError, match=r"neuron_storage='bf16'.*: lif2; call snn_revplugin.restore\(model\) first"
    ):
        precision.prepare_model_for_precision(net, "cpu", config)
    restore(net)
    if not coupled and not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            precision.prepare_model_for_precision(net, "cpu", config)


# --------------------------------------------------------------------------------------- functional


FORWARDS: dict[str, tuple[str, Callable[[Net, Tensor], Tensor]]] = {
    "multi_step_forward": ("s", lambda net, x: functional.multi_step_forward(x, net)),
    "multi_step_forward, a list": (
        "s",
        lambda net, x: functional.multi_step_forward(x, list(net.children())),
    ),
    "t_last_multi_step_forward": (
        "s",
        lambda net, x: functional.t_last_multi_step_forward(x.movedim(0, -1), net).movedim(-1, 0),
    ),
    "chunk_multi_step_forward": (
        "m",
        lambda net, x: functional.chunk_multi_step_forward(3, x, net),
    ),
    "seq_to_ann_forward": (
        "m",
        lambda net, x: net.lif2(
            functional.seq_to_ann_forward(
                net.lif1(functional.seq_to_ann_forward(x, [net.conv, net.norm])),
                [net.pool, net.flatten, net.fc],
            )
        ),
    ),
}


@EVERY_NODE
@pytest.mark.parametrize("name", FORWARDS)
def test_forwards(name: str, node: str) -> None:
    mode, forward = FORWARDS[name]

    def program(make: MakeNeuron) -> Observed:
        net = Net(make, mode)
        if name == "seq_to_ann_forward":
            functional.set_step_mode(net, "s")  # it folds time into the batch itself
            for each in net.neurons:
                each.step_mode = "m"
        return net.observe(draw(), lambda x: forward(net, x))

    agree(program, *NODES[node])


@EVERY_NODE
@EVERY_MODE
@pytest.mark.parametrize(
    "between", [functional.reset_net, functional.detach_net], ids=lambda each: each.__name__
)
def test_between_two_sequences(between: Callable[[nn.Module], None], mode: str, node: str) -> None:
    """And between forward and backward."""

    def program(make: MakeNeuron) -> Observed:
        net = Net(make, mode)
        first = net.run(draw())
        between(net)
        first.sum().backward()
        return net.observe(draw())

    agree(program, *NODES[node])


@EVERY_NODE
def test_memories_taken_out_and_put_back(node: str) -> None:
    """One sequence in two parts, with another batch between them."""

    def program(make: MakeNeuron) -> Observed:
        net, x = Net(make, "m"), draw()
        first = net(x[:2])
        held = base.extract_memories(net)
        assert [name for name, _ in base.named_memories(net)] == ["lif1.v", "lif2.v"]
        functional.reset_net(net)
        net(draw())
        base.load_memories(net, held)
        second = net(x[2:])
        (torch.cat([first, second]) * torch.randn(T, BATCH, 4)).sum().backward()
        return Observed({"first": first, "second": second}).see_gradients(net)

    agree(program, *NODES[node])


@EVERY_MODE
@pytest.mark.parametrize("training", [False, True])
def test_threshold_margin(training: bool, mode: str) -> None:
    """It makes the threshold a number in evaluation, and in training a tensor, for which the host
    has no operator on a CPU."""
    options = {"eval_threshold": 0.4, "threshold0": 0.2, "threshold1": 0.6}

    def program(make: MakeNeuron) -> Observed:
        net = Net(make, mode).train(training)
        functional.set_threshold_margin(
            net.lif2, nn.functional.one_hot(torch.tensor([1, 3]), 4), **options
        )
        if not training:
            return net.observe(draw())
        with pytest.raises(RuntimeError, match=r"sj_lif::forward.*'threshold'"):
            net.observe(draw())
        return Observed({"threshold": net.lif2.v_threshold})

    first, last = agree(program, *NODES["LIF"], path="any")
    assert_path([first], "reversible")
    assert_path(
        [last],
        *(
            ("host", "a threshold, reset or time constant is a tensor")
            if training
            else ("reversible",)
        ),
    )


@EVERY_MODE
def test_weights_drawn_by_kaiming(mode: str) -> None:
    def program(make: MakeNeuron) -> Observed:
        net = Net(make, mode)
        functional.kaiming_normal_conv_linear_weight(net)
        return net.observe(draw())

    agree(program, *NODES["LIF"])


@EVERY_MODE
@pytest.mark.parametrize("training", [False, True])
def test_convolution_fused_with_batch_norm(training: bool, mode: str) -> None:
    fuse = (
        conv_bn_fusion.pack_conv_bn_train_modules
        if training
        else conv_bn_fusion.fuse_conv_bn_eval_modules
    )

    def program(make: MakeNeuron) -> Observed:
        net = Net(make, mode).train(training)
        fused = fuse(net)
        run = fused if mode == "m" else lambda x: functional.multi_step_forward(x, fused)
        observed = net.observe(draw(), run)
        return Observed(observed.exact).see_gradients(fused)

    agree(program, *NODES["LIF"])


# ----------------------------------------------------------------------------- learning, ANN to SNN


LEARNERS: dict[
    str, tuple[type, tuple[int, ...], dict, tuple]
] = {  # shape of the input, further arguments, those of step
    "STDPLearner s": (learning.STDPLearner, (2, 6), {}, ()),
    "STDPLearner m": (learning.STDPLearner, (T, 2, 6), {}, ()),
    "MSTDPLearner s": (learning.MSTDPLearner, (2, 6), {}, (torch.ones(2),)),
    "MSTDPETLearner s": (learning.MSTDPETLearner, (6,), {"tau_trace": 2.0}, (1.0,)),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_plasticity(name: str) -> None:
    kind, shape, more, reward = LEARNERS[name]
    mode = name[-1]

    def program(make: MakeNeuron) -> Observed:
        fc, node = (
            layer.Linear(6, 4, bias=False, step_mode=mode),
            make(step_mode=mode, v_threshold=0.1),
        )
        learner, spikes = kind(mode, fc, node, tau_pre=2.0, tau_post=2.0, **more), []
        for _ in range(5):
            spikes.append(node(fc((torch.rand(shape) > 0.5).float())).detach())
            learner.step(*reward)
        assert fc.weight.grad.any()
        return Observed({"spikes": torch.stack(spikes), "dw": fc.weight.grad.clone()})

    agree(program, *NODES["LIF"], path="small")


def test_online_learning() -> None:
    """FPTT updates the weights at each time step and detaches the state."""

    def program(make: MakeNeuron) -> Observed:
        net = Net(make, "s")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        average = fptt_online_training_init_w_ra(optimizer)
        loss = nn.functional.mse_loss
        fptt_online_training(net, optimizer, draw(), torch.rand(T, BATCH, 4), loss, 0.5, average)
        return Observed({}, {name: each.detach() for name, each in net.named_parameters()})

    agree(program, *NODES["LIF"])


@pytest.mark.parametrize("how", ["converted", "made by us"])
def test_a_converted_ann(how: str) -> None:
    """SpikingJelly's ann2snn gives a graph module with IFNodes; it is fine-tuned in a time loop."""
    nets: list[nn.Module] = []

    def program(make: MakeNeuron) -> Observed:
        layers = (
            nn.Conv2d(1, 3, 3),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(27, 4),
            nn.ReLU(),
        )
        data = [(torch.rand(4, 1, 8, 8), torch.zeros(4)) for _ in range(2)]
        factory = (
            (lambda threshold: make(v_threshold=threshold, v_reset=None))
            if how == "made by us"
            else None
        )
        net = ann2snn.FXConverter(RateCodingRecipe(data, neuron_factory=factory)).convert(
            nn.Sequential(*layers).eval()
        )
        if how == "converted" and nets:
            assert len(convert(net).swapped) == 2
        nets.append(net)
        spikes = torch.stack([net(torch.rand(4, 1, 8, 8)) for _ in range(8)])
        assert spikes.any()
        (spikes * torch.randn(spikes.shape)).sum().backward()
        return Observed({"spikes": spikes}).see_gradients(net)

    agree(program, *NODES["IF"])
    assert_path(
        [each for each in nets[1].modules() if isinstance(each, neuron.IFNode)], "reversible"
    )


# ------------------------------------------------------------------------- configurations, exchange


CLASS_PATHS = "snn_revplugin.adapters.spikingjelly.{}", "spikingjelly.activation_based.neuron.{}"


@pytest.mark.parametrize("path", CLASS_PATHS)
@pytest.mark.parametrize("name", ["RevIFNode", "RevLIFNode", "RevParametricLIFNode"])
def test_a_vision_configuration_names_our_neurons(name: str, path: str) -> None:
    """A configuration is written, read, and makes the host's model with our neurons."""

    def link_of(class_path: str) -> tuple[dict[str, Tensor], Iterable[nn.Module]]:
        atan = "spikingjelly.activation_based.surrogate.ATan"
        spiking = vision.NeuronConfig(class_path, {"detach_reset": True}, atan, {"alpha": 3.0})
        config = SpikformerCIFAR10Config(neuron_config=spiking, time_steps=2)
        config = vision.ModelConfig.from_dict(config.as_dict())
        torch.manual_seed(0)
        with torch.device("meta"):  # the model is large
            net = config.get_builder_cls()(config)._build_canonical_model()
        return net.state_dict(), [
            each for each in net.modules() if isinstance(each, neuron.BaseNode)
        ]

    host, ours = (
        link_of(f"spikingjelly.activation_based.neuron.{name[3:]}"),
        link_of(path.format(name)),
    )
    assert list(host[0]) == list(ours[0])
    assert len(host[1]) == len(ours[1]) > 0
    for each in ours[1]:
        assert type(each) is getattr(neuron, name)
        assert each.detach_reset
        assert each.surrogate_function.alpha == 3.0


def test_a_vision_configuration_names_the_coupled_node() -> None:
    from spikingjelly.activation_based.distributed.vision import config

    for path in CLASS_PATHS:
        kind, options = config._resolve_neuron_config(
            vision.NeuronConfig(path.format("CoupledLIFNode"), {"alpha": 0.5})
        )
        assert kind is CoupledLIFNode
        assert options == {"alpha": 0.5}


@pytest.mark.parametrize("node", ["IF", "LIF"])
def test_lynxi_exchange(node: str) -> None:
    """Layers for the Lynxi chip, which know neither ours nor the host's neurons any more."""

    def translated(net: Net) -> tuple[str, Tensor]:
        chip = nn.Sequential(*lynxi_exchange.to_lynxi_supported_modules(list(net.children()), T))
        return str(chip), chip(draw().flatten(0, 1))

    host, ours = of_both(translated, "m", node)
    assert ours[0] == host[0]
    assert torch.equal(ours[1], host[1])
    assert ours[1].any()


def test_lavas_neuron_goes_by_its_own_step() -> None:
    """SpikingJelly has it without lava itself, which does not install on the Pythons that we
    support."""
    net = nn.Sequential(lava_exchange.CubaLIFNode(0.5, 0.5), neuron.LIFNode())
    report = convert(net)
    assert report.by_own_step == ["0"]


# ---------------------------------------------------------------------------------- modules as such


@EVERY_NODE
@EVERY_MODE
def test_what_a_net_shows_of_itself(mode: str, node: str) -> None:
    def shown(net: Net) -> tuple:
        visited: list[str] = []
        net.apply(lambda module: visited.append(type(module).__name__))
        net.run(draw())
        memories = [(name, v.shape) for name, v in base.named_memories(net)]
        state = {name: (each.shape, each.dtype) for name, each in net.double().state_dict().items()}
        return (
            repr(net),
            visited,
            memories,
            net.neurons[0].v.dtype,
            state,
            net.neurons[0].extra_repr(),
        )

    host, ours = of_both(shown, mode, node)
    assert without_names(ours, node) == str(host)
    assert "tau" in ours[-1] or node == "IF"


def test_restore_names_what_has_no_equal_in_the_host() -> None:
    report = restore(nn.Sequential(RevLIFNode(), CoupledLIFNode()))
    assert report.swapped == {"0": ("RevLIFNode", "LIFNode")}
    assert report.left == {"1": "the host has no neuron with the equations of CoupledLIFNode"}

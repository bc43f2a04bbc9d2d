"""Every surrogate of both hosts and the user's own: the spikes and the derivative that the host
gives, point by point."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from compare import MakeNeuron, Observed, agree
from hosts import PURE, only_pure
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import neuron
from spikingjelly.activation_based import surrogate as sj_surrogate
from torch import Tensor

from snn_revplugin.adapters.snntorch import RevLeaky
from snn_revplugin.adapters.snntorch import surrogate_from as from_snntorch
from snn_revplugin.adapters.spikingjelly import RevIFNode
from snn_revplugin.adapters.spikingjelly import surrogate_from as from_spikingjelly
from snn_revplugin.neurons.surrogate import Surrogate

RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
SMALLEST = {torch.float64: 1e-40, torch.float32: 1e-10, torch.float16: 1e-4, torch.bfloat16: 1e-10}


class _UsersStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, strict: bool) -> Tensor:
        ctx.save_for_backward(z)
        return (z > 0 if strict else z >= 0).to(z.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return grad / (1 + 3 * z.abs()), None


class _WholeLayer(torch.autograd.Function):
    """A derivative that looks at every neuron of the layer."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return grad * torch.exp(-z.abs() / z.abs().mean())


class LearnedSlope(nn.Module):
    """The forward is the plain step; the slope of the derivative has a gradient of its own."""

    class _Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z: Tensor, slope: Tensor) -> Tensor:
            ctx.save_for_backward(z, slope)
            return (z >= 0).to(z.dtype)

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
            z, slope = ctx.saved_tensors
            return grad / (1 + slope * z.abs()), (grad * z).sum()

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(2.0))

    def forward(self, z: Tensor) -> Tensor:
        return self._Step.apply(z, self.slope)


def _straight_through_of_a_sigmoid(z: Tensor) -> Tensor:
    smooth = torch.sigmoid(4 * z)
    return (z > 0).to(z.dtype) + (smooth - smooth.detach())


SNNTORCH: dict[str, Callable[[], Callable]] = {
    "straight_through_estimator": snn_surrogate.straight_through_estimator,
    "triangular": snn_surrogate.triangular,
    "triangular 0.3": lambda: snn_surrogate.triangular(0.3),
    "fast_sigmoid": snn_surrogate.fast_sigmoid,
    "fast_sigmoid 0.7": lambda: snn_surrogate.fast_sigmoid(0.7),
    "atan": snn_surrogate.atan,
    "atan 1.7": lambda: snn_surrogate.atan(1.7),
    "heaviside": snn_surrogate.heaviside,
    "sigmoid": snn_surrogate.sigmoid,
    "sigmoid 1.3": lambda: snn_surrogate.sigmoid(1.3),
    "spike_rate_escape": snn_surrogate.spike_rate_escape,
    "spike_rate_escape 0.3 1.7": lambda: snn_surrogate.spike_rate_escape(0.3, 1.7),
    "SFS": snn_surrogate.SFS,
    "SFS 3.3 -0.5": lambda: snn_surrogate.SFS(3.3, -0.5),
}
SNNTORCH_DIFFERENTIATED: dict[str, Callable[[], Callable]] = {
    "SSO": snn_surrogate.SSO,
    "custom_surrogate": lambda: snn_surrogate.custom_surrogate(
        lambda z, grad, spikes: grad * (0.2 + spikes) / (1 + z * z)
    ),
    "a slope that is a tensor": lambda: snn_surrogate.fast_sigmoid(torch.tensor(3.0)),
    "user's function": lambda: _straight_through_of_a_sigmoid,
    "user's autograd Function": lambda: lambda z: _UsersStep.apply(z, True),
    "user's that fires on the threshold": lambda: lambda z: _UsersStep.apply(z, False),
    "user's of a whole layer": lambda: _WholeLayer.apply,
}
SPIKINGJELLY: dict[str, Callable[[], Callable]] = {
    "PiecewiseQuadratic": lambda: sj_surrogate.PiecewiseQuadratic(1.0),
    "PiecewiseQuadratic 0.7": lambda: sj_surrogate.PiecewiseQuadratic(0.7),
    "PiecewiseExp": lambda: sj_surrogate.PiecewiseExp(1.3),
    "Sigmoid": sj_surrogate.Sigmoid,
    "Sigmoid 0.7": lambda: sj_surrogate.Sigmoid(0.7),
    "SoftSign": lambda: sj_surrogate.SoftSign(1.7),
    "SuperSpike": lambda: sj_surrogate.SuperSpike(1.7),
    "ATan": sj_surrogate.ATan,
    "ATan 0.7": lambda: sj_surrogate.ATan(0.7),
    "NonzeroSignLogAbs": lambda: sj_surrogate.NonzeroSignLogAbs(1.7),
    "Erf": lambda: sj_surrogate.Erf(0.7),
    "PiecewiseLeakyReLU": lambda: sj_surrogate.PiecewiseLeakyReLU(0.5, 0.03),
    "SquarewaveFourierSeries": lambda: sj_surrogate.SquarewaveFourierSeries(3, 7.0),
    "SquarewaveFourierSeries 1": lambda: sj_surrogate.SquarewaveFourierSeries(2, 8),
    "S2NN": lambda: sj_surrogate.S2NN(3.0, 0.7),
    "QPseudoSpike": lambda: sj_surrogate.QPseudoSpike(1.7),
    "LeakyKReLU": lambda: sj_surrogate.LeakyKReLU(0.1, 1.7),
    "FakeNumericalGradient": lambda: sj_surrogate.FakeNumericalGradient(0.3),
    "LogTailedReLU": lambda: sj_surrogate.LogTailedReLU(0.1),
    "DeterministicPass": lambda: sj_surrogate.DeterministicPass(),
    "Rect": lambda: sj_surrogate.Rect(0.7),
}
SPIKINGJELLY = {
    name: make for name, make in SPIKINGJELLY.items() if hasattr(sj_surrogate, name.split()[0])
}
SPIKINGJELLY_DIFFERENTIATED: dict[str, Callable[[], Callable]] = {
    "sigmoid.apply": lambda: lambda z: sj_surrogate.sigmoid.apply(z, 3.0),
    "an alpha that is a tensor": lambda: sj_surrogate.ATan(torch.tensor(1.5)),
    "user's function": lambda: _straight_through_of_a_sigmoid,
    "user's autograd Function": lambda: lambda z: _UsersStep.apply(z, False),
    "user's that is silent on the threshold": lambda: lambda z: _UsersStep.apply(z, True),
    "user's of a whole layer": lambda: _WholeLayer.apply,
}
if not PURE:
    SPIKINGJELLY.pop("NonzeroSignLogAbs")  # 0.0.0.0.14 itself fails in its backward
    for each in (
        "PiecewiseLeakyReLU",
        "LogTailedReLU",
    ):  # whose derivatives are others there, without a closed form here
        SPIKINGJELLY_DIFFERENTIATED[each] = SPIKINGJELLY.pop(each)


def points(dtype: torch.dtype) -> Tensor:
    """Distances from a threshold of 1, exact in ``dtype``: every eighth, the threshold, one ulp
    beside it, far away."""
    one = torch.ones((), dtype=dtype)
    neighbours = torch.stack([torch.nextafter(one, one * side) - one for side in (0, 2)])
    far = torch.tensor([-1e3, -50, 50, 1e3] if dtype != torch.bfloat16 else [-64.0, 64.0])
    return torch.cat([torch.arange(-24, 25) / 8, neighbours.float(), far]).to(dtype)


def one_step(make: MakeNeuron, host: str, spike: Callable, dtype: torch.dtype) -> Observed:
    """One step from zero: the potential is the current, so the distance from the threshold is known
    exactly."""
    if host == "snntorch":
        lif = make(beta=0.9, spike_grad=spike).to(dtype)
    else:
        lif = make(v_threshold=1.0, surrogate_function=spike, detach_reset=True)
    x = (1 + points(dtype)).requires_grad_()
    spikes = lif(x, torch.zeros_like(x))[0] if host == "snntorch" else lif(x)
    grad = torch.randn(x.shape).to(spikes.dtype)
    torch.manual_seed(1)  # for a derivative that is drawn in backward
    spikes.backward(grad)
    observed = Observed({"spikes": spikes}, {"x": x.grad})
    if isinstance(spike, nn.Module):
        observed.see_gradients(spike)
    return observed


def assert_same_derivative(
    host: str, make: Callable[[], Callable], dtype: torch.dtype, path: str = "reversible"
) -> None:
    kinds = (snn.Leaky, RevLeaky) if host == "snntorch" else (neuron.IFNode, RevIFNode)
    seen = []

    def program(make_neuron: MakeNeuron) -> Observed:
        seen.append(one_step(make_neuron, host, make(), dtype))
        return Observed(seen[-1].exact)

    agree(program, *kinds, path=path)
    theirs, ours = seen
    for name, gradient in theirs.gradients.items():
        rtol, atol = RELATIVE[gradient.dtype], SMALLEST[gradient.dtype]
        torch.testing.assert_close(
            ours.gradients[name],
            gradient,
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            msg=f"{name}: {{}}".format,
        )
        assert gradient.count_nonzero() > 0


SNNTORCH_DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str
)
SPIKINGJELLY_DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)


@SNNTORCH_DTYPES
@pytest.mark.parametrize("name", SNNTORCH)
def test_closed_forms_of_snntorch(name: str, dtype: torch.dtype) -> None:
    assert isinstance(from_snntorch(SNNTORCH[name]()), Surrogate)
    assert_same_derivative("snntorch", SNNTORCH[name], dtype)


@SNNTORCH_DTYPES
@pytest.mark.parametrize("name", SNNTORCH_DIFFERENTIATED)
def test_snntorch_surrogates_differentiated_through_autograd(name: str, dtype: torch.dtype) -> None:
    assert not isinstance(from_snntorch(SNNTORCH_DIFFERENTIATED[name]()), Surrogate)
    assert_same_derivative("snntorch", SNNTORCH_DIFFERENTIATED[name], dtype)


@SPIKINGJELLY_DTYPES
@pytest.mark.parametrize("name", SPIKINGJELLY)
def test_closed_forms_of_spikingjelly(name: str, dtype: torch.dtype) -> None:
    assert isinstance(from_spikingjelly(SPIKINGJELLY[name]()), Surrogate)
    assert_same_derivative("spikingjelly", SPIKINGJELLY[name], dtype)


@SPIKINGJELLY_DTYPES
@pytest.mark.parametrize("name", SPIKINGJELLY_DIFFERENTIATED)
def test_spikingjelly_surrogates_differentiated_through_autograd(
    name: str, dtype: torch.dtype
) -> None:
    assert not isinstance(from_spikingjelly(SPIKINGJELLY_DIFFERENTIATED[name]()), Surrogate)
    assert_same_derivative("spikingjelly", SPIKINGJELLY_DIFFERENTIATED[name], dtype)


def test_no_surrogate_of_snntorch_is_missing_here() -> None:
    offered = {
        name
        for name, each in vars(snn_surrogate).items()
        if inspect.isfunction(each) and each.__module__ == snn_surrogate.__name__
    }
    assert offered - {"LSO"} == {name.split()[0] for name in SNNTORCH} | {"SSO", "custom_surrogate"}


def test_no_surrogate_of_spikingjelly_is_missing_here() -> None:
    graded = {"MultiLevelSpikeCount", "PoissonPass"} | (set() if PURE else {"NonzeroSignLogAbs"})
    bases = (
        sj_surrogate.SurrogateFunctionBase,
        getattr(sj_surrogate, "MultiArgsSurrogateFunctionBase", nn.Identity),
    )
    offered = {
        each.__name__
        for base in bases
        for each in base.__subclasses__()
        if each.__module__ == sj_surrogate.__name__
    }
    ours = {name.split()[0] for name in (*SPIKINGJELLY, *SPIKINGJELLY_DIFFERENTIATED)}
    assert offered - graded == {
        name for name in ours if hasattr(sj_surrogate, name) and name[0].isupper()
    }


def test_lso_raises_as_it_does_in_the_host() -> None:
    """snntorch 1.0's LSO hands its operator one argument too few."""
    for kind in (snn.Leaky, RevLeaky):
        lif = kind(beta=0.9, spike_grad=snn_surrogate.LSO())
        with pytest.raises(TypeError, match="variance"):
            lif(torch.ones(2, 3, requires_grad=True), lif.reset_mem())


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in SPIKINGJELLY
        if name.split()[0] not in ("FakeNumericalGradient", "SuperSpike")
    ],
)
def test_smooth_outputs_take_the_hosts_path(name: str) -> None:
    def make() -> Callable:
        spike = SPIKINGJELLY[name]()
        spike.set_spiking_mode(False)
        return spike

    def program(make_neuron: MakeNeuron) -> Observed:
        return one_step(make_neuron, "spikingjelly", make(), torch.float32)

    agree(program, neuron.IFNode, RevIFNode, path="host", reason="Heaviside")


@only_pure
@pytest.mark.parametrize("count", [2, 4])
def test_graded_spike_counts_take_the_hosts_path(count: int) -> None:
    def program(make: MakeNeuron) -> Observed:
        return one_step(
            make, "spikingjelly", sj_surrogate.MultiLevelSpikeCount(count), torch.float32
        )

    agree(program, neuron.IFNode, RevIFNode, path="host", reason="Heaviside")


@only_pure
def test_random_spikes_of_spikingjelly_take_the_hosts_path() -> None:
    def program(make: MakeNeuron) -> Observed:
        lif = make(v_threshold=1.0, surrogate_function=sj_surrogate.PoissonPass())
        x = (torch.rand(50) + 1).requires_grad_()
        spikes = lif(x)
        spikes.sum().backward()
        return Observed({"spikes": spikes}, {"x": x.grad})

    agree(program, neuron.IFNode, RevIFNode, path="host", reason="Heaviside")


@pytest.mark.parametrize("seed", range(24))
def test_random_spikes_of_the_users_take_the_hosts_path(seed: int) -> None:
    """Noise on the threshold: however a function is found to be the plain step, chance must not
    make it one."""

    def noisy(z: Tensor) -> Tensor:
        return _UsersStep.apply(z + 0.1 * torch.randn_like(z), True)

    def program(make: MakeNeuron) -> Observed:
        return one_step(make, "snntorch", noisy, torch.float32)

    agree(program, snn.Leaky, RevLeaky, path="host", reason="Heaviside", seed=seed)


@pytest.mark.parametrize(
    "spike",
    [
        lambda z: z.relu(),
        lambda z: 2 * (z > 0).to(z.dtype),
        lambda z: (z > 0.25).to(z.dtype),
        lambda z: (z > 0).to(z.dtype) - (z < -1).to(z.dtype),
        lambda z: (z > torch.arange(z.shape[-1]) / 100).to(z.dtype),
    ],
    ids=["graded", "doubled", "shifted", "ternary", "of a shape of its own"],
)
@pytest.mark.parametrize("host", ["snntorch", "spikingjelly"])
def test_functions_that_are_not_the_plain_step_take_the_hosts_path(
    host: str, spike: Callable
) -> None:
    kinds = (snn.Leaky, RevLeaky) if host == "snntorch" else (neuron.IFNode, RevIFNode)

    def program(make: MakeNeuron) -> Observed:
        values = [torch.randn(4, requires_grad=True)]
        lif = (
            make(beta=0.9, spike_grad=spike)
            if host == "snntorch"
            else make(v_threshold=1.0, surrogate_function=spike)
        )
        mem, record = torch.zeros(4), []
        for _ in range(4):
            out = lif(values[0] * 2, mem) if host == "snntorch" else (lif(values[0] * 2), lif.v)
            record, mem = [*record, *out], out[1]
        seen = torch.stack(record)
        (seen * torch.randn(seen.shape)).sum().backward()
        return Observed({"seen": seen}, {"x": values[0].grad})

    agree(program, *kinds, path="host", reason="Heaviside")


@pytest.mark.parametrize("holder", ["module", "closure"])
@pytest.mark.parametrize("host", ["snntorch", "spikingjelly"])
def test_a_surrogate_that_learns_gets_its_gradient(host: str, holder: str) -> None:
    kinds = (snn.Leaky, RevLeaky) if host == "snntorch" else (neuron.IFNode, RevIFNode)

    def program(make: MakeNeuron) -> Observed:
        module = LearnedSlope()
        spike = module if holder == "module" else lambda z: module(z)
        observed = one_step(make, host, spike, torch.float32)
        return observed.see_gradients(module)

    agree(program, *kinds, path="host")


@pytest.mark.parametrize("host", ["snntorch", "spikingjelly"])
def test_a_user_function_is_not_called_more_often_than_it_must(host: str) -> None:
    """It is judged once, not at every step; forward then decides by comparison, and backward calls
    it once a step."""
    calls = []

    def spike(z: Tensor) -> Tensor:
        calls.append(tuple(z.shape))
        return _straight_through_of_a_sigmoid(z)

    lif = (
        RevLeaky(beta=0.9, spike_grad=spike)
        if host == "snntorch"
        else RevIFNode(surrogate_function=spike)
    )
    x, mem, total = torch.randn(3, requires_grad=True), torch.zeros(3), 0.0
    for _ in range(6):
        spikes = lif(x, mem)[0] if host == "snntorch" else lif(x)
        total = total + spikes.sum()
    assert calls.count((3,)) == 0
    total.backward()
    assert calls.count((3,)) == 6


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown surrogate 'gauss'"):
        Surrogate("gauss", (1.0,))

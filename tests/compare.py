"""The one way in which these tests judge a neuron: run a program with the host's neuron, run it
with ours, and compare.

A *program* takes a function that makes neurons, builds a net, trains it for a step or does whatever
else a user would, and returns what it :class:`Observed`. The host's own neuron is the
specification, so nothing here knows an equation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

# Largest error of a gradient, relative to its largest element.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# The gradient of a number shared by a whole layer is a sum over every neuron and step. Where it
# happens to cancel it is known no better than its terms, so it is measured against this share of
# the largest gradient in the net if that is more. (One decay in test_snntorch's table has a
# gradient of 82 whose parts, neuron by neuron, add up to 1106 in absolute value.)
CANCELLED = 2e-1
PATHS = "reversible", "small", "host", "both", "hooked", "any"


@dataclass
class Observed:
    """What a program saw of a net.

    Attributes:
        exact: spikes, membrane potentials, buffers: host and ours must agree bit for bit, in dtype,
            shape and strides too.
        gradients: they must agree to rounding, and be None in the same places.
    """

    exact: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)

    def see_gradients(self, *nets: nn.Module, **tensors: Tensor) -> Observed:
        """Add ``.grad`` of every parameter of ``nets`` and of every tensor named."""
        for i, net in enumerate(nets):
            self.gradients |= {
                f"{i}.{name}" if i else name: p.grad for name, p in net.named_parameters()
            }
        self.gradients |= {name: each.grad for name, each in tensors.items()}
        return self


MakeNeuron = Callable[..., nn.Module]
Program = Callable[[MakeNeuron], Observed]


def agree(
    program: Program,
    host: type[nn.Module],
    ours: type[nn.Module],
    *,
    tolerance: float | None = None,
    path: str = "reversible",
    reason: str | None = None,
    seed: int = 0,
) -> list[nn.Module]:
    """Run a program with the host's neuron and with ours, from the same seed, and assert that they
    saw the same.

    Args:
        program: makes its neurons by the function it is given, with the arguments of the host's
            constructor.
        tolerance: of gradients; by default that of each gradient's dtype.
        path: "reversible" asserts that every step of ours was reversible and no layer was so small
            that it was kept instead of recomputed, "small" the first alone; "host" that every call
            fell back to the host's code, "both" that some did and some did not; "hooked" that all
            calls were inside of saved-tensor hooks that the program set; "any" asserts nothing.
        reason: a part of the reason that the statistics must give for falling back.

    Returns:
        Our neurons.
    """
    seen, neurons = [], []
    for kind in (host, ours):
        torch.manual_seed(seed)
        neurons.append([])

        def make(*args: Any, kind=kind, made=neurons[-1], **kwargs: Any) -> nn.Module:
            made.append(kind(*args, **kwargs))
            return made[-1]

        seen.append(program(make))
    assert seen[0].exact or seen[0].gradients, "the program observed nothing"
    assert_agree(*seen, tolerance=tolerance)
    assert_path(neurons[1], path, reason)
    return neurons[1]


def assert_path(neurons: Iterable[nn.Module], path: str, reason: str | None = None) -> None:
    """Assert from their statistics which code neurons ran, see :func:`agree`."""
    if path not in PATHS:
        raise ValueError(f"path must be one of {PATHS}, got {path!r}")
    for neuron in neurons:
        statistics = neuron.record.statistics
        reasons = dict(statistics.reasons)
        if path in ("reversible", "small", "both"):
            assert statistics.steps > 0, f"no step was reversible: {reasons}"
        if path in ("reversible", "small", "hooked"):
            assert statistics.fallback_calls == 0, f"calls fell back to the host's code: {reasons}"
        if path in ("reversible", "small"):
            assert statistics.hooked_calls == 0, "calls were inside of saved-tensor hooks"
        if path == "reversible":
            assert statistics.small_calls == 0, "layers were too small to be recomputed"
        if path in ("host", "both"):
            assert statistics.fallback_calls > 0, "no call fell back to the host's code"
        if path in ("host", "hooked"):
            assert statistics.steps == 0, "steps were reversible"
        if path == "hooked":
            assert statistics.hooked_calls > 0, f"no call was handed to hooks: {reasons}"
        if reason is not None:
            assert any(reason in each for each in statistics.reasons), (
                f"{reason!r} is not among {dict(statistics.reasons)}"
            )


def assert_agree(host: Observed, ours: Observed, tolerance: float | None = None) -> None:
    assert host.exact.keys() == ours.exact.keys()
    assert host.gradients.keys() == ours.gradients.keys()
    for name, value in host.exact.items():
        assert_exact(name, value, ours.exact[name])
    finite = (each[each.isfinite()] for each in host.gradients.values() if each is not None)
    largest = max((each.abs().max().item() for each in finite if each.numel()), default=0)
    for name, gradient in host.gradients.items():
        assert_close(name, gradient, ours.gradients[name], tolerance, CANCELLED * largest)


def assert_exact(name: str, host: Tensor, ours: Tensor) -> None:
    """Equal in dtype, shape, strides and every bit; NaN equals NaN."""
    assert ours.dtype == host.dtype, f"{name}: dtype {ours.dtype}, the host's {host.dtype}"
    assert ours.shape == host.shape, (
        f"{name}: shape {tuple(ours.shape)}, the host's {tuple(host.shape)}"
    )
    assert ours.requires_grad == host.requires_grad, f"{name}: requires_grad {ours.requires_grad}"
    assert _strides(ours) == _strides(host), (
        f"{name}: strides {ours.stride()}, the host's {host.stride()}"
    )
    differ = (ours != host) & ~((ours != ours) & (host != host))
    assert not differ.any(), f"{name}: {int(differ.sum())} of {differ.numel()} elements differ"


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tuple(
        stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    )


def assert_close(
    name: str,
    host: Tensor | None,
    ours: Tensor | None,
    tolerance: float | None = None,
    floor: float = 0.0,
) -> None:
    """Two gradients equal to rounding: the largest difference, relative to the largest element of
    the host's.

    Args:
        floor: the least that a gradient of one element is measured against.
    """
    assert (ours is None) == (host is None), (
        f"gradient of {name}: ours is {ours}, the host's {host}"
    )
    if host is None:
        return
    assert ours.dtype == host.dtype, (
        f"gradient of {name}: dtype {ours.dtype}, the host's {host.dtype}"
    )
    assert ours.shape == host.shape, (
        f"gradient of {name}: shape {tuple(ours.shape)}, the host's {tuple(host.shape)}"
    )
    rounding = (
        host.numel() > 0 and host.abs().max() < torch.finfo(host.dtype).eps * floor
    )  # next to the largest gradient
    error = relative_error(host, ours, floor if host.numel() == 1 or rounding else 0.0)
    allowed = TOLERANCES[host.dtype] if tolerance is None else tolerance
    assert error <= allowed, (
        f"gradient of {name}: relative error {error:.3g}, allowed {allowed:.3g}"
    )


def relative_error(host: Tensor, ours: Tensor, floor: float = 0.0) -> float:
    """The largest difference over the largest element; infinite where NaN and infinities stand in
    other places."""
    host, ours = host.detach().double(), ours.detach().double()
    finite = host.isfinite()
    if not torch.equal(finite, ours.isfinite()) or not torch.equal(
        host[~finite].nan_to_num(), ours[~finite].nan_to_num()
    ):
        return math.inf
    if not finite.any():
        return 0.0
    difference, scale = (
        (ours - host)[finite].abs().max().item(),
        max(host[finite].abs().max().item(), floor),
    )
    return difference / scale if scale else (0.0 if difference == 0 else math.inf)


def assert_alive(spikes: Tensor) -> None:
    """A comparison of silent neurons, or of ones that always fire, would show nothing."""
    share = (spikes != 0).double().mean().item()
    assert 0.02 < share < 0.98, f"{share:.0%} of the neurons fired"


def nir_content(graph: Any) -> tuple[dict[str, tuple[str, dict[str, Any]]], list[tuple[str, str]]]:
    """A NIR graph, to be compared: its nodes by name, each as its kind and the values of its
    fields, and its edges."""
    nodes = {}
    for name, node in graph.nodes.items():
        fields = {
            key: np.asarray(value).tolist()
            for key, value in vars(node).items()
            if not isinstance(value, dict)
        }
        nodes[name] = type(node).__name__, fields
    return nodes, sorted(graph.edges)

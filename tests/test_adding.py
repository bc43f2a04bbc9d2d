"""docs/adding.md adds a neuron with three states: its code runs here, and is the host's neuron."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import snntorch as snn
import torch
import torch.nn as nn
from compare import Observed, agree, assert_alive

import snn_revplugin
from snn_revplugin.swap import table

PAGE = Path(__file__).parents[1] / "docs" / "adding.md"
FILES = re.findall(
    r"^```python\n# (\S+\.py)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE
)
T = 30


@pytest.fixture(scope="module")
def added() -> Iterator[dict[str, object]]:
    """The names that the page's code defines."""
    swaps, before = dict(table._swaps), set(sys.modules)
    names: dict[str, object] = {}
    for path, code in FILES:
        name = path.removesuffix(".py").replace("/", ".")
        module = sys.modules[name] = ModuleType(name)
        exec(compile(code, path, "exec"), module.__dict__)
        names |= vars(module)
    yield names
    table._swaps.clear()
    table._swaps.update(swaps)
    for name in set(sys.modules) - before:
        if name.endswith(("neurons.alpha", "snntorch_alpha")):
            del sys.modules[name]


def net(make, **options: object):
    torch.manual_seed(0)
    first = make(0.85, 0.7, 0.5, reset_mechanism="none", **options)
    second = make(0.9, 0.6, 0.5, reset_mechanism="none")
    return nn.Linear(30, 64), first, nn.Linear(64, 20), second


@pytest.mark.parametrize("learn", [False, True])
def test_the_page_adds_a_neuron(added: dict[str, object], learn: bool) -> None:
    def program(make) -> Observed:
        weigh, first, readout, second = net(make, learn_threshold=learn)
        states = [[torch.zeros(16, n)] * 3 for n in (64, 20)]
        exact, total = {}, 0
        for t, frame in enumerate(torch.randn(T, 16, 30)):
            s1, *states[0] = first(weigh(frame), *states[0])
            s2, *states[1] = second(readout(s1), *states[1])
            exact |= {f"first {t}": s1.detach(), f"second {t}": s2.detach()}
            total = total + (s2 * (t + 1)).sum() + states[1][0].sum()
        assert_alive(torch.stack([exact[f"first {t}"] for t in range(T)]))
        total.backward()
        exact |= {"syn_exc": states[1][0].detach(), "mem": states[1][2].detach()}
        return Observed(exact).see_gradients(weigh, first, readout)

    agree(program, snn.Alpha, added["RevAlpha"], path="small")


def test_it_saves_memory_and_convert_knows_it(added: dict[str, object]) -> None:
    retained = []
    for swap in (False, True):
        weigh, first, readout, second = net(snn.Alpha)
        layers = nn.ModuleList([weigh, first, readout, second])
        if swap:
            assert len(snn_revplugin.convert(layers).swapped) == 2
        frames = torch.randn(T, 64, 30)

        def step(layers=layers, frames=frames) -> torch.Tensor:
            states, total = [[torch.zeros(64, n)] * 3 for n in (64, 20)], 0
            for frame in frames:
                s, *states[0] = layers[1](layers[0](frame), *states[0])
                _, *states[1] = layers[3](layers[2](s), *states[1])
                total = total + states[1][1].sum()
            return total

        retained.append(snn_revplugin.memory_report(step).retained)
    assert retained[0] > 4 * retained[1], retained


def test_gradients_of_the_equations_can_be_differentiated_again(added: dict[str, object]) -> None:
    seen = []
    for kind in (snn.Alpha, added["RevAlpha"]):
        weigh, lif, *_ = net(kind, spike_grad=snn.surrogate.atan())
        x = torch.randn(5, 4, 30, requires_grad=True)
        states = [torch.zeros(4, 64)] * 3
        total = 0
        for frame in x:
            spikes, *states = lif(weigh(frame), *states)
            total = total + (spikes * states[-1]).sum()
        (grad,) = torch.autograd.grad(total, x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), weigh.weight)
        seen.append(second)
    assert ((seen[0] - seen[1]).abs().max() / seen[0].abs().max()).item() < 2e-5

"""What every reversible neuron of a net keeps, what is recomputed for it, and what is not: in
words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch.nn as nn

from ..bptt.statistics import CallStatistics
from ..replay import ReaderStatistics
from ..replay.walk import PACKED
from ..swap.module import CompiledCalls, ReversibleNeuron
from ..swap.table import swap_for
from ..swap.watch import watches_of
from .kept import kept_in_one_step, kept_in_words, size_in_words
from .memory import MemoryReport

BITS = 8
BITS_OF = PACKED.format("")

# Where the name of an autograd node tells a user little.
OPERATION_NAMES = {
    "AddmmBackward0": "linear",
    "MmBackward0": "matrix product",
    "MvBackward0": "matrix-vector product",
    "BmmBackward0": "batched matrix product",
    "BaddbmmBackward0": "batched matrix product with bias",
    "MaxPool2DWithIndicesBackward0": "max pool 2d",
    "MaxPool3DWithIndicesBackward0": "max pool 3d",
    "ToCopyBackward0": "cast",
    "PreluKernelBackward0": "prelu",
    "Im2ColBackward0": "columns of an image (unfold)",
    "FftC2CBackward0": "fft",
    "FftR2CBackward0": "fft of real numbers",
    "FftC2RBackward0": "fft to real numbers",
    "TBackward0": "transpose",
    "UnsafeViewBackward0": "view",
    "ReshapeAliasBackward0": "reshape",
    "RsubBackward0": "sub",
    "RsubBackward1": "sub",
    "reversal of AddBackward0": "a residual sum, reversed in depth",
    "CopySlices": "write into a slice",
    "AsStridedBackward0": "as_strided (or a view of what was written into)",
}
_WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[a-z])(?=\d)")


def operation_name(node: str) -> str:
    """The name of an autograd node in words.

    >>> operation_name("ConvolutionBackward0"), operation_name("CudnnBatchNormBackward0")
    ('convolution', 'batch norm')
    >>> operation_name("MyOpBackward")
    'MyOp (an autograd Function)'
    """
    if node in OPERATION_NAMES:
        return OPERATION_NAMES[node]
    if node.startswith(BITS_OF):
        return f"{operation_name(node.removeprefix(BITS_OF))} (kept as bits)"
    name, backward, number = node.partition("Backward")
    if backward and not number:
        return f"{name} (an autograd Function)"
    name = re.sub("^(Native|Cudnn|Miopen|Mkldnn|Mps)(?=[A-Z])", "", name)
    return _WORDS.sub(" ", name).lower()


@dataclass(frozen=True)
class Account:
    """What one neuron did since it was made.

    Attributes:
        name: of the module in its net, empty for the net itself.
        kind: name of its class.
        calls: reversible calls; ``steps`` time steps in all.
        fallback_calls: calls that took the host's own path, for ``reasons``.
        small_calls: reversible calls whose tensors are too small to recompute
            (``recompute_min_bytes`` of the settings), so that all of them are kept.
        hooked_calls: calls inside a checkpoint, ``save_on_cpu`` or other saved-tensor hooks, which
            save the charged potentials, ``hooked_bytes`` in all, and nothing else.
        bits_per_spike: bits kept for one spike.
        steps_between_anchors: time steps between two anchors of the potential; None where backward
            scans whole sequences forward, and where there was no call.
        bytes_per_neuron_step: bytes kept for one neuron in one time step, without outputs.
        keeps_outputs: whether the neuron reconstructs from its own outputs.
        recomputed: operations that are recomputed in backward, each with its number of calls.
        boundaries: operations that are not, so that their activations are kept, likewise.
        kept_bytes: bytes of activations that the calls keep, by the operation or the other cause
            for which they are not released.
        reasons: for the host's own path, each with its number of calls.
        backend: what computed the last call's time steps, and why.
        compiled: what the backward of its last call under ``torch.compile`` reads; empty where
            there was none.
        compiled_fallback: why that call took the host's own path; empty where it did not.
        left: why a neuron of the host's is none of ours; empty for ours.
    """

    name: str
    kind: str
    calls: int = 0
    steps: int = 0
    fallback_calls: int = 0
    small_calls: int = 0
    hooked_calls: int = 0
    hooked_bytes: int = 0
    bits_per_spike: float = 0.0
    steps_between_anchors: int | None = None
    bytes_per_neuron_step: float = 0.0
    recomputed: Mapping[str, int] = field(default_factory=dict)
    boundaries: Mapping[str, int] = field(default_factory=dict)
    kept_bytes: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, int] = field(default_factory=dict)
    backend: str = ""
    left: str = ""
    compiled: str = ""
    compiled_fallback: str = ""
    keeps_outputs: bool = False

    @property
    def is_reversible(self) -> bool:
        """Whether any call was reversible."""
        return bool(self.calls or self.hooked_calls or self.compiled)

    @property
    def was_called(self) -> bool:
        """Whether there was any call."""
        return bool(self.is_reversible or self.fallback_calls or self.compiled_fallback)

    @property
    def kept(self) -> str:
        """What is kept between forward and backward."""
        spikes = f"{self.bits_per_spike:.3g} bit{'s' * (self.bits_per_spike > 1)} per spike"
        if self.steps_between_anchors is None:
            potentials = "the first potential of a sequence"
        elif self.steps_between_anchors == 1:
            potentials = "an anchor every step"
        else:
            potentials = f"an anchor every {self.steps_between_anchors} steps"
        outputs = "its outputs, " * self.keeps_outputs
        return (
            f"{outputs}{spikes}, {potentials}:"
            f" {self.bytes_per_neuron_step:.3g} bytes per neuron and step"
        )

    def __str__(self) -> str:
        head = f"{self.name or '(the module itself)'}: {self.kind}"
        if self.left:
            return f"{head}\n  not reversible: {self.left}"
        if not self.was_called:
            return f"{head}\n  never called"
        lines = [head, *self._eager_lines(), *self._compiled_lines()]
        if self.backend:
            lines.append(f"  arithmetic: {self.backend}")
        if self.recomputed:
            lines.append(f"  recomputed: {', '.join(self.recomputed)}")
        if self.boundaries:
            lines.append(f"  not recomputed, activations kept: {', '.join(self.boundaries)}")
        if self.kept_bytes:
            lines.append(f"  activations kept: {kept_in_words(self.kept_bytes)}")
        if self.hooked_calls:
            lines.append(
                f"  inside saved-tensor hooks (a checkpoint, save_on_cpu),"
                f" {_times(self.hooked_calls, 'call')}: saves {self.hooked_bytes} bytes of charged"
                " potentials, and nothing else"
            )
        for reason, times in self.reasons.items():
            lines.append(f"  the host's own path, {_times(times, 'call')}: {reason}")
        return "\n".join(lines)

    def _eager_lines(self) -> list[str]:
        lines = []
        if self.calls:
            calls, steps = _times(self.calls, "call"), _times(self.steps, "time step")
            lines += [f"  reversible: {calls}, {steps}", f"  keeps: {self.kept}"]
        if self.small_calls:
            lines.append(
                f"  all activations kept, {_times(self.small_calls, 'call')}: too small to"
                " recompute (the setting recompute_min_bytes)"
            )
        return lines

    def _compiled_lines(self) -> list[str]:
        if self.compiled:
            return [f"  compiled, as an operator whose backward reads {self.compiled}"]
        if self.compiled_fallback:
            return [f"  compiled, on the host's own path: {self.compiled_fallback}"]
        return []


@dataclass(frozen=True)
class ReaderAccount:
    """What was recomputed for what reads the spikes of a module's last neurons.

    Attributes:
        name: of the module in its net, empty for the net itself.
        replaced_bytes: of the saved tensors that are recomputed in backward.
        recomputed: the operations that had saved them, or are recomputed for them, each with its
            number of calls.
        kept_bytes: bytes of the saved tensors that are not, by the operation or the other cause for
            which they are not.
    """

    name: str
    replaced_bytes: int
    recomputed: Mapping[str, int]
    kept_bytes: Mapping[str, int]

    def __str__(self) -> str:
        lines = [f"{self.name or '(the module itself)'}: readers behind its last neurons"]
        if self.recomputed:
            lines += [
                f"  recomputed: {', '.join(self.recomputed)}",
                f"  released: {size_in_words(self.replaced_bytes)} of saved tensors",
            ]
        if self.kept_bytes:
            lines.append(f"  activations kept: {kept_in_words(self.kept_bytes)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """The accounts of a net's neurons, one per row; ``str`` of it is for reading.

    Attributes:
        rows: of the neurons.
        kept: bytes that one training step keeps for backward, by cause; empty where no step was
            given.
        report: the memory that the step held; None where no step was given.
        readers: of the modules in it that are watched (by ``convert`` or ``watch``), as far as
            there are readers behind their last neurons.
        budget: what the plans of the memory budget say, a line each.
    """

    rows: tuple[Account, ...]
    kept: Mapping[str, int] = field(default_factory=dict)
    report: MemoryReport | None = None
    readers: tuple[ReaderAccount, ...] = ()
    budget: tuple[str, ...] = ()

    @property
    def not_attributed(self) -> int:
        """Bytes that the step retained for none of the causes in ``kept``."""
        return self.report.retained - sum(self.kept.values()) if self.report else 0

    def __str__(self) -> str:
        if not self.rows and not self.readers:
            return "no spiking neuron of a known host"
        lines = [*map(str, (*self.rows, *self.readers)), *self.budget]
        if self.report is not None:
            causes = kept_in_words(self.kept | {"not attributed": self.not_attributed})
            total = kept_in_words({"one training step retains": self.report.retained})
            lines.append(f"{total}: {causes}")
        return "\n".join(lines)


def explain(net: nn.Module, step_fn: Callable[[], object] | None = None) -> Explanation:
    """What each neuron of ``net`` keeps for backward, what is recomputed, and what is not and why.

    Args:
        net: holds the neurons.
        step_fn: a training step, as :func:`snn_revplugin.memory_report` takes it. If it is given,
            the statistics of the neurons are cleared, the step runs once, and the last line adds up
            the bytes that it retains, by cause. What no cause explains is "not attributed": batch
            statistics, for example, or what other layers save that no neuron feeds.

    Raises:
        TypeError: ``net`` is no module.
        ValueError: as of :func:`snn_revplugin.memory_report`.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    kept, report = ({}, None) if step_fn is None else kept_in_one_step(net, step_fn)
    rows = []
    for name, module in net.named_modules():
        kind = type(module).__name__
        if isinstance(module, ReversibleNeuron):
            statistics = module.record.statistics
            rows.append(account_of(name, kind, statistics, module._compiled_calls))
            continue
        swap, reason = swap_for(module)
        if swap is not None:
            rows.append(Account(name, kind, left="it is the host's own; convert(net) swaps it"))
        elif reason:
            rows.append(Account(name, kind, left=reason))
    readers = (
        account_of_readers(name, watch.record.statistics) for name, watch in watches_of(net).items()
    )
    accounts = tuple(each for each in readers if each is not None)
    budget = tuple(_budget_lines(net))
    return Explanation(tuple(rows), _in_words(kept), report, accounts, budget)


def account_of_readers(name: str, statistics: ReaderStatistics) -> ReaderAccount | None:
    """What the walks for a module's readers did, in words; None if there were none."""
    kept = +statistics.kept_bytes
    if not statistics.replaced_bytes and not kept:
        return None
    recomputed = _in_words(statistics.operations) if statistics.replaced_bytes else {}
    return ReaderAccount(name, statistics.replaced_bytes, recomputed, _in_words(kept))


def _budget_lines(net: nn.Module) -> Iterator[str]:
    """What the plans of training steps keep that begin with a neuron of the net."""
    for module in net.modules():
        plans = module.record.cache.planned_steps if isinstance(module, ReversibleNeuron) else {}
        for (budget, shape, *_), step in plans.items():
            plan, head = step.plan, f"memory budget {budget!r}, a step that begins with"
            least = kept_in_words({"it takes about": plan.least})
            if step.limit is not None and step.limit < plan.least:
                outcome = f"the budget is too small, so nothing more is kept; {least}"
            else:
                keeps = kept_in_words({"keeps": plan.kept_bytes})
                outcome = f"{keeps} of values that could be recomputed; without them {least}"
            yield f"{head} {tuple(shape)}: {outcome}"


def account_of(
    name: str, kind: str, statistics: CallStatistics, compiled: CompiledCalls
) -> Account:
    """A neuron's statistics in words."""
    each = 1 / statistics.neuron_steps if statistics.neuron_steps else 0.0
    return Account(
        name,
        kind,
        calls=statistics.calls,
        steps=statistics.steps,
        fallback_calls=statistics.fallback_calls,
        small_calls=statistics.small_calls,
        hooked_calls=statistics.hooked_calls,
        hooked_bytes=statistics.hooked_bytes,
        bits_per_spike=BITS * statistics.spike_bytes * each,
        steps_between_anchors=statistics.anchor_interval,
        bytes_per_neuron_step=(statistics.block_bytes + statistics.potential_bytes) * each,
        recomputed=_in_words(statistics.operations),
        boundaries=_in_words(statistics.boundaries),
        kept_bytes=_in_words(+statistics.kept_bytes),
        reasons=dict(statistics.reasons),
        backend=statistics.backend,
        compiled=compiled.keeps,
        compiled_fallback=compiled.fallback,
        keeps_outputs=statistics.keeps_outputs,
    )


def _in_words(nodes: Mapping[str, int]) -> dict[str, int]:
    named: Counter[str] = Counter()
    for node, times in nodes.items():
        named[operation_name(node)] += times
    return dict(named)


def _times(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"

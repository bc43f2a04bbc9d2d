"""The picture of a report by layer: what is held, and how much more for a moment, while each layer
runs forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .figures import MIB
from .timeline import BACKWARD, FORWARD, Layer, LayerReport, Visit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"host": "#c44e52", "ours": "#1f77b4"}
MOST_NAMES = 32  # below the axis; of more layers only some are named
MOST_LETTERS = 22  # of a name


def check_matplotlib() -> None:
    """Whether the picture can be drawn.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra that brings it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'snn-revplugin[cli]'") from error


def draw(report: LayerReport) -> Figure:
    """Bytes held (solid) and transient (light on top) while each layer runs: its stretch in which
    most was held. Forward goes to the right through the layers, backward back again."""
    from matplotlib.figure import Figure

    sides = {"ours": report} if report.host is None else {"host": report.host, "ours": report}
    names = list(dict.fromkeys(each.name for side in sides.values() for each in side.layers))
    stops = [(each, FORWARD) for each in names] + [(each, BACKWARD) for each in reversed(names)]
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    for whose, side in sides.items():
        _draw_side(axes, whose, side, stops)
    axes.axvline(len(names) - 0.5, color="#5b636d", linewidth=0.8, linestyle=":")
    every = -(-len(stops) // (2 * MOST_NAMES))
    axes.set_xticks(range(0, len(stops), every), [_short(name) for name, _ in stops[::every]])
    axes.tick_params("x", labelrotation=90, labelsize=7)
    axes.set_xlabel("layers, forward (left) and backward (right)")
    axes.set_ylabel("held while the layer runs (MiB)")
    axes.set_xlim(-0.5, len(stops) - 0.5)
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2 * len(sides), frameon=False)
    return figure


def _short(name: str) -> str:
    """The end of a long name."""
    return name if len(name) <= MOST_LETTERS else f"\N{HORIZONTAL ELLIPSIS}{name[-MOST_LETTERS:]}"


def _draw_side(axes: Axes, whose: str, report: LayerReport, stops: list[tuple[str, str]]) -> None:
    layers = {each.name: each for each in report.layers}
    visits = [_visit(layers.get(name), phase) for name, phase in stops]
    # A layer that did nothing in a phase leaves what the one before it held.
    held, peaks, last = [], [], 0.0
    for each in visits:
        held.append(last if each is None else each.held / MIB)
        peaks.append(held[-1] if each is None else each.peak / MIB)
        last = held[-1]
    x, colour = range(len(stops)), COLOURS[whose]
    axes.fill_between(x, held, step="mid", color=colour, alpha=0.55, label=f"{whose}, held")
    axes.fill_between(
        x, held, peaks, step="mid", color=colour, alpha=0.25, label=f"{whose}, for a moment"
    )
    peak = report.peak_at
    if peak is None or (peak.layer, peak.phase) not in stops:
        return
    at, top = stops.index((peak.layer, peak.phase)), peak.peak / MIB
    axes.plot([at], [top], "v", color=colour)
    calls = layers[peak.layer].calls
    call = f", call {peak.call} of {calls}" * (calls > 1)
    axes.annotate(
        f"{whose}: {top:.1f} MiB, {peak.phase} of {peak.layer}{call}",
        (at, top),
        xytext=(0, 8),
        textcoords="offset points",
        ha="left" if at < len(stops) / 2 else "right",
        fontsize=8,
    )


def _visit(layer: Layer | None, phase: str) -> Visit | None:
    if layer is None:
        return None
    return layer.forward if phase == FORWARD else layer.backward

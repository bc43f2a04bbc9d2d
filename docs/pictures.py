"""Draws the pictures of the documentation: ``python docs/pictures.py`` writes
``docs/pictures/*.svg`` and ``docs/layers.png``.

``layers.png`` is measured, with SpikingJelly. The others are plain SVG, 520 units wide so that they
can be read on a telephone. Their background is transparent, and their colours follow the reader's
preference for light or dark. A solid outline marks what is stored from forward to backward, a
dashed one what is released and recomputed.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from snn_revplugin import memory_report, use_settings
from snn_revplugin.cli.comparison import Setup
from snn_revplugin.cli.workloads import HOST, OURS, WORKLOADS

FOLDER = Path(__file__).parent / "pictures"
WIDTH = 520
STYLE = """
  text { font: 15px system-ui, sans-serif; fill: #1b1f24; text-anchor: middle; }
  .start { text-anchor: start; } .end { text-anchor: end; }
  .small { font-size: 13px; } .head { font-weight: 600; }
  .plain { fill: #f3f4f6; stroke: #8a929c; } .kept { fill: #cfe5fb; stroke: #1f6fb5; }
  .host { fill: #f9d9d6; stroke: #b5453a; }
  .again { fill: none; stroke: #1f6fb5; stroke-dasharray: 4 3; }
  .line { fill: none; stroke: #5b636d; } .back { fill: none; stroke: #b5453a; }
  .forth { fill: none; stroke: #1f6fb5; }
  .tip { fill: #5b636d; } .back-tip { fill: #b5453a; } .forth-tip { fill: #1f6fb5; }
  rect, circle, path { stroke-width: 1.5; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e3e7eb; }
    .plain { fill: #2a2f36; stroke: #7d8691; } .kept { fill: #123c5f; stroke: #6db3f2; }
    .host { fill: #5a2622; stroke: #f08a7f; } .again { stroke: #6db3f2; }
    .line { stroke: #a6aeb8; } .back { stroke: #f08a7f; } .forth { stroke: #6db3f2; }
    .tip { fill: #a6aeb8; } .back-tip { fill: #f08a7f; } .forth-tip { fill: #6db3f2; }
  }
"""


class Picture:
    """An SVG drawing; ``str`` of it is the content of the file."""

    def __init__(self, title: str, height: int) -> None:
        self.title, self.height, self.parts = title, height, []

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(text)}</text>')

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        kind: str,
        *lines: str,
        size: str = "",
    ) -> None:
        """A rectangle with centred lines of text."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"'
            f' class="{kind}"/>'
        )
        for i, line in enumerate(lines):
            self.text(
                x + width / 2, y + height / 2 + 5 + 17 * (i - (len(lines) - 1) / 2), line, size
            )

    def dot(self, x: float, y: float, kind: str, radius: float = 11) -> None:
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" class="{kind}"/>')

    def arrow(
        self, x0: float, y0: float, x1: float, y1: float, kind: str = "line", bend: float = 0
    ) -> None:
        """An arrow from one point to another, straight or bent upwards by ``bend``."""
        x, y = (x0 + x1) / 2, (y0 + y1) / 2 - 2 * bend
        self.parts.append(f'<path d="M{x0:g} {y0:g} Q{x:g} {y:g} {x1:g} {y1:g}" class="{kind}"/>')
        dx, dy = (x1 - x, y1 - y) if bend else (x1 - x0, y1 - y0)
        length = (dx * dx + dy * dy) ** 0.5
        dx, dy = 8 * dx / length, 8 * dy / length
        corners = (
            (x1, y1),
            (x1 - dx - dy / 2, y1 - dy + dx / 2),
            (x1 - dx + dy / 2, y1 - dy - dx / 2),
        )
        tip = "tip" if kind == "line" else f"{kind}-tip"
        self.parts.append(
            f'<polygon points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in corners)}" class="{tip}"/>'
        )

    def __str__(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}"'
            ' role="img">'
        )
        return "\n".join(
            (
                head,
                f"<title>{escape(self.title)}</title>",
                f"<style>{STYLE}</style>",
                *self.parts,
                "</svg>\n",
            )
        )


def kept() -> Picture:
    """What training stores per neuron and time step in one block, host and ours."""
    picture = Picture(
        "What training stores between two neurons in one time step, host and ours", 412
    )
    picture.text(80, 24, "one time step", "head")
    picture.text(278, 24, "the host stores", "head")
    picture.text(442, 24, "we store", "head")
    stages = (
        ("neuron", "potential: 4 B and more", "kept", "an anchor", "every few steps"),
        ("spikes", "spikes as floats: 4 B", "kept", "1 bit per spike"),
        ("convolution", "its output: 4 B", "again", "a recipe"),
        ("batch norm", "its output: 4 B", "again", "a recipe"),
        ("max pooling", "indices: 8 B", "again", "a recipe"),
        ("next neuron", "potential: 4 B and more", "kept", "an anchor", "every few steps"),
    )
    for i, (name, host, kind, *ours) in enumerate(stages):
        y = 42 + 64 * i
        picture.box(10, y, 140, 40, "plain", name)
        picture.box(186, y, 184, 40, "host", host, size="small")
        picture.box(384, y, 128, 40, kind, *ours, size="small")
        if i + 1 < len(stages):
            picture.arrow(80, y + 40, 80, y + 63)
    return picture


def replayed() -> Picture:
    """The walk in forward, and the recomputation in backward."""
    picture = Picture(
        "Forward: the neuron walks down the graph and attaches recipes. Backward: the saved tensors"
        " are recomputed",
        446,
    )
    names = ("spikes", "conv", "norm", "pool", "neuron")
    lefts = [6 + 104 * i for i in range(5)]

    picture.text(6, 22, "Forward: a walk down the graph attaches recipes", "head start")
    for i, (x, name) in enumerate(zip(lefts, names, strict=True)):
        picture.box(x, 74, 92, 38, "kept" if i == 0 else "plain", name)
        if i:
            picture.arrow(x - 12, 93, x, 93)
    for i in (3, 2, 1, 0):
        picture.arrow(lefts[i + 1] + 40, 72, lefts[i] + 52, 72, "forth", bend=13)
    picture.text(30, 52, "the walk", "small start")
    for i, lines in (
        (1, ("input:", "spike bits")),
        (2, ("input:", "rerun conv")),
        (3, ("indices:", "rerun pool")),
    ):
        picture.arrow(lefts[i] + 46, 112, lefts[i] + 46, 130)
        picture.box(lefts[i], 132, 92, 46, "again", *lines, size="small")
    picture.box(lefts[0], 132, 92, 46, "kept", "1 bit", "per spike", size="small")
    picture.text(260, 204, "a recipe takes the place of each saved tensor", "small")

    picture.text(6, 252, "Backward: recomputed once, then released", "head start")
    for i, (x, name) in enumerate(zip(lefts, names, strict=True)):
        picture.box(x, 272, 92, 38, "kept" if i == 0 else "plain", name)
        if i:
            picture.arrow(x, 291, x - 12, 291, "back")
    picture.box(lefts[0], 352, 92, 46, "kept", "bits,", "unpacked", size="small")
    for i, lines in (
        (1, ("conv's", "output")),
        (2, ("norm's", "output")),
        (3, ("indices", "and x[t]")),
    ):
        picture.arrow(lefts[i] - 12, 375, lefts[i], 375, "forth")
        picture.box(lefts[i], 352, 92, 46, "again", *lines, size="small")
    for source, reader in ((0, 1), (1, 2), (3, 3), (3, 4)):
        picture.arrow(lefts[source] + 46, 350, lefts[reader] + 46, 312, "forth")
    picture.text(
        260,
        428,
        "red: autograd's own backward, in its own order.  blue: tensors that it reads",
        "small",
    )
    return picture


def reversed_time() -> Picture:
    """Three ways to reconstruct the potentials."""
    picture = Picture(
        "Three ways to reconstruct the membrane potentials: reversed, rebuilt from an anchor,"
        " scanned",
        462,
    )
    rows = (
        (
            "Reversed: a soft reset, one call per time step",
            "each potential from the one after it, the current and the spike bit",
            {0, 4, 8},
            [(t, t - 1) for t in range(8, 0, -1)],
        ),
        (
            "Rebuilt: a hard reset, one call per time step",
            "a reset to a constant has no inverse: forward from the anchor below",
            {0, 4, 8},
            [(t, t + 1) for t in range(8) if t not in (3, 7)],
        ),
        (
            "Scanned: T steps in one call (step mode 'm')",
            "forward a second time from the first potential",
            {0, 8},
            [(t, t + 1) for t in range(7)],
        ),
    )
    bits = " 10010010"
    for row, (title, words, anchors, steps) in enumerate(rows):
        top = 142 * row
        picture.text(6, top + 22, title, "head start")
        picture.text(6, top + 42, words, "small start")
        y = top + 82
        for t in range(9):
            x = 40 + 55 * t
            picture.dot(x, y, "kept" if t in anchors else "again", 13)
            picture.text(x, y + 5, "v" if t in anchors else "", "small")
            picture.text(x, y + 38, bits[t], "small")
        for start, end in steps:
            towards, kind = (15, "forth") if end > start else (-15, "back")
            picture.arrow(40 + 55 * start + towards, y, 40 + 55 * end - towards, y, kind)
    picture.dot(22, 444, "kept", 9)
    picture.text(38, 449, "stored", "small start")
    picture.dot(100, 444, "again", 9)
    picture.text(116, 449, "released, reconstructed", "small start")
    picture.text(514, 449, "0 and 1: spike bits, always stored", "small end")
    return picture


def rooms() -> Picture:
    """The rooms of the package, and what a training step does in each."""
    picture = Picture("The rooms of the package, and what a training step does in each", 522)
    picture.text(6, 24, "the room", "head start")
    picture.text(236, 24, "in forward", "head")
    picture.text(426, 24, "in backward", "head")
    watch = ("watch the memory",)
    floors = (
        ("adapters", ("translate the host's call",), ()),
        ("cli, report", watch, watch),
        ("swap", ("decides: reversible,", "or the host's own path"), ()),
        ("compile", ("operators instead,", "under torch.compile"), ("their backward",)),
        ("bptt", ("builds the graph nodes,", "stores anchors"), ("reconstructs", "the potentials")),
        (
            "kernels",
            ("on a GPU: the equations", "in fused kernels"),
            ("the same", "in fused kernels"),
        ),
        ("replay", ("walks down the graph,", "attaches recipes"), ("recomputes", "saved tensors")),
        ("neurons", ("charge, fire, reset",), ("their inverse", "and derivative")),
        ("packed", ("packs the spikes",), ("unpacks the spikes",)),
        (
            "torch_internals",
            ("sets hooks on", "saved tensors"),
            ("shares values", "within one pass"),
        ),
        ("settings", ("are read",), ()),
    )
    for i, (name, forward, backward) in enumerate(floors):
        y = 36 + 44 * i
        picture.box(6, y, 130, 38, "kept", name)
        for x, lines in ((142, forward), (332, backward)):
            if lines:
                picture.box(x, y, 184, 38, "plain", *lines, size="small")
    return picture


PICTURES = {"kept": kept, "replayed": replayed, "reversed": reversed_time, "rooms": rooms}


def layers(file: Path) -> None:
    """The memory of a training step of workload 2 by layer, host and ours; written to a file."""
    setup = Setup.usual(WORKLOADS["vgg"])
    batch, host = setup.data(), None
    with use_settings(memory_budget="least"):
        for whose, plot in ((HOST, None), (OURS, file)):
            net = setup.net(whose)
            host = memory_report(
                lambda net=net: setup.loss(net, batch), by="layer", host=host, plot=plot
            )


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    layers(FOLDER.parent / "layers.png")
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(str(draw()))


if __name__ == "__main__":
    main()

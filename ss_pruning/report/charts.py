"""What the figures of the HTML pages show: one row per layer, with positions as shares of the width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ss_pruning.report.formatting import count, percent
from ss_pruning.report.records import QUANTILES
from ss_pruning.report.violin import LogScale, Violin, violin

if TYPE_CHECKING:
    from ss_pruning.report.comparison import LayerPair
    from ss_pruning.report.records import LayerReport

_SPOKEN = {
    0.0: "weakest",
    0.05: "5 %",
    0.25: "25 %",
    0.5: "median",
    0.75: "75 %",
    0.95: "95 %",
    1.0: "strongest",
}


class Bar(NamedTuple):
    """A horizontal bar from the left: class of the style sheet, share of the width, and where in the row."""

    kind: str
    share: float
    top: int
    height: int


class Row(NamedTuple):
    """One layer: its path, its class, its numbers as text, what is read aloud, and the picture."""

    path: str
    kind: str
    numbers: str
    spoken: str
    bars: Sequence[Bar] = ()
    violin: Violin | None = None

    @property
    def overflows(self) -> bool:
        """Whether a bar is longer than the axis."""
        return any(bar.share > 1 for bar in self.bars)


class Chart(NamedTuple):
    """Rows below one axis; `ticks` are (position, label), and `grid` positions of lines behind the rows."""

    rows: list[Row]
    ticks: list[tuple[float, str]]
    grid: Sequence[float] = ()

    @property
    def overflows(self) -> bool:
        """Whether a bar of any row is."""
        return any(row.overflows for row in self.rows)


def widths(layers: Sequence[LayerReport]) -> Chart:
    """Output channels of the dense and the pruned model."""
    # A classifier of a thousand classes, never narrowed, would squeeze the other bars: it is cut short.
    narrowed = [layer.outputs_before for layer in layers if layer.outputs_after < layer.outputs_before]
    widest = _widest(narrowed, [layer.outputs_before for layer in layers])

    def row(layer: LayerReport) -> Row:
        before, after = layer.outputs_before, layer.outputs_after
        bars = [Bar("dense", before / widest, 3, 7), Bar("pruned", after / widest, 12, 7)]
        numbers = f"{before}" if before == after else f"{before} → {after}"
        spoken = f"{layer.path}: {before} output channels before, {after} after"
        return Row(layer.path, layer.kind, numbers, spoken, bars)

    return Chart([row(layer) for layer in layers], _linear(widest))


def compared_widths(layers: Sequence[LayerPair]) -> Chart:
    """Output channels of two pruned models, on the dense one's."""
    cut = [pair.dense for pair in layers if {pair.a, pair.b} != {pair.dense}]
    widest = _widest(cut, [pair.dense for pair in layers])

    def row(pair: LayerPair) -> Row:
        a, b = ("-" if width is None else f"{width}" for width in (pair.a, pair.b))
        bars = [
            Bar("track", pair.dense / widest, 2, 18),
            Bar("pruned", (pair.a or 0) / widest, 4, 6),
            Bar("cut", (pair.b or 0) / widest, 12, 6),
        ]
        spoken = f"{pair.path}: {pair.dense} output channels, {a} in A, {b} in B"
        return Row(pair.path, pair.kind, f"{a} | {b}", spoken, bars)

    return Chart([row(pair) for pair in layers], _linear(widest))


def costs(layers: Sequence[LayerReport]) -> Chart | None:
    """What each layer has of all layers' multiply-accumulates and parameters; None where that was not recorded."""
    macs = [(layer.macs_before or 0, layer.macs_after or 0) for layer in layers]
    params = [(layer.params_before or 0, layer.params_after or 0) for layer in layers]
    all_macs, all_params = (sum(before for before, _ in each) for each in (macs, params))
    if not all_macs or not all_params:
        return None
    largest = max(*(before / all_macs for before, _ in macs), *(before / all_params for before, _ in params))

    def row(layer: LayerReport, macs: tuple[int, int], params: tuple[int, int]) -> Row:
        bars, shares, told = [], [], []
        for top, name, (before, after), whole in (
            (2, "multiply-accumulates", macs, all_macs),
            (12, "parameters", params, all_params),
        ):
            bars.append(Bar("track", before / whole / largest, top, 8))
            bars.append(Bar("pruned" if top == 2 else "cut", after / whole / largest, top, 8))
            shares.append(percent(after / whole))
            told.append(f"{count(after)} of {count(before)} {name}, {shares[-1]} of the dense model's")
        return Row(layer.path, layer.kind, " | ".join(shares), f"{layer.path}: {'; '.join(told)}", bars)

    ticks = [(share, percent(share * largest)) for share in (0.0, 0.5, 1.0)]
    return Chart([row(*each) for each in zip(layers, macs, params, strict=True)], ticks)


def synapses_cut(layers: Sequence[LayerReport]) -> Chart:
    """The share of each layer's synapses that was cut."""

    def row(layer: LayerReport) -> Row:
        share = percent(layer.share_cut)
        bars = [Bar("track", 1.0, 6, 10), Bar("cut", layer.share_cut, 6, 10)]
        return Row(
            layer.path,
            layer.kind,
            share,
            f"{layer.path}: {share} of {layer.synapses_before} synapses cut",
            bars,
        )

    return Chart([row(layer) for layer in layers], [(n / 4, f"{25 * n} %") for n in range(5)])


def strengths(layers: Sequence[LayerReport]) -> Chart | None:
    """The strengths of the layers for which they were recorded; None if there are none."""
    known = [layer for layer in layers if len(layer.strength) == len(QUANTILES)]
    # The weakest are left out: a few that are all but zero would squeeze the rest; their dots go to the edge.
    positive = [value for layer in known for value in layer.strength[1:] if 0 < value < math.inf]
    if not positive:
        return None
    scale = LogScale(positive)

    def row(layer: LayerReport) -> Row:
        at = dict(zip(QUANTILES, layer.strength, strict=True))
        spoken = ", ".join(f"{name} {at[level]:.2g}" for level, name in _SPOKEN.items())
        picture = violin([scale.at(value) for value in layer.strength])
        return Row(layer.path, layer.kind, f"{at[0.5]:.2g}", f"{layer.path}: {spoken}", violin=picture)

    return Chart([row(layer) for layer in known], scale.ticks(), scale.decades())


def at(share: float) -> str:
    """Write a share of the width as SVG does; what lies outside is drawn at the edge."""
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"


def _widest(narrowed: Sequence[int], every: Sequence[int]) -> int:
    return max(narrowed or every, default=0) or 1


def _linear(widest: int) -> list[tuple[float, str]]:
    return [(0.0, "0"), (0.5, f"{widest / 2:g}"), (1.0, f"{widest}")]

"""The report's figure of strengths by depth: one violin per layer on a shared logarithmic axis.

A report keeps quantiles, not strengths. Between two neighbouring quantiles lies a known share of the synapses; spread
evenly over that stretch of the axis and smoothed a little, it gives the outline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from ss_pruning.report import parts
from ss_pruning.report.records import QUANTILES

if TYPE_CHECKING:
    from ss_pruning.report.records import LayerReport

_MOST_DECADES = 8
"""Strengths further than this below the largest are drawn at the left edge."""

_BINS, _HEIGHT = 60, 22
_SPOKEN = {
    0.0: "weakest",
    0.05: "5 %",
    0.25: "25 %",
    0.5: "median",
    0.75: "75 %",
    0.95: "95 %",
    1.0: "strongest",
}
_NOTE = (
    "Strength of the dense model's synapses, on a logarithmic scale: a shape is high where many synapses are. The bar "
    "in it holds the middle half, the line is the median (the number beside the name), the dots are the weakest and "
    "the strongest. A dot at the left edge stands for that or anything weaker."
)


def strengths(layers: Sequence[LayerReport]) -> str:
    """Return the figure as HTML; layers without recorded strengths are left out."""
    known = [layer for layer in layers if len(layer.strength) == len(QUANTILES)]
    # The weakest are left out: a few that are all but zero would squeeze the rest; their dots go to the edge.
    positive = [value for layer in known for value in layer.strength[1:] if 0 < value < math.inf]
    if not positive:
        return "<p>The strengths of this model were not recorded.</p>"
    scale = LogScale(positive)
    return parts.chart(_NOTE, [_row(layer, scale) for layer in known], parts.axis(scale.ticks()))


def _row(layer: LayerReport, scale: LogScale) -> parts.Row:
    at = dict(zip(QUANTILES, layer.strength, strict=True))
    spoken = ", ".join(f"{name} {parts.short(at[level])}" for level, name in _SPOKEN.items())
    shapes = scale.grid() + _violin([scale.at(value) for value in layer.strength])
    picture = parts.svg(f"{layer.path}: {spoken}", shapes)
    return parts.Row(layer.path, layer.kind, parts.short(at[0.5]), picture)


def _violin(positions: Sequence[float]) -> str:
    """Draw the quantiles, given as positions in [0, 1]."""
    at = dict(zip(QUANTILES, positions, strict=True))
    heights = density(positions)
    middle = _HEIGHT / 2
    outline = [(100 * (n + 0.5) / _BINS, (middle - 1) * height) for n, height in enumerate(heights) if height]
    upper = [f"{x:.1f},{middle - y:.1f}" for x, y in outline]
    lower = [f"{x:.1f},{middle + y:.1f}" for x, y in reversed(outline)]
    shape = (
        f'<svg width="100%" height="{_HEIGHT}" viewBox="0 0 100 {_HEIGHT}" preserveAspectRatio="none">'
        f'<polygon class="violin" points="{" ".join(upper + lower)}"/></svg>'
    )
    dots = "".join(
        f'<circle class="dot" cx="{parts.at(at[level])}" cy="{middle:g}" r="2"/>' for level in (0.0, 1.0)
    )
    half = parts.line("whisker", at[0.25], at[0.75], middle, middle)
    return shape + half + parts.line("median", at[0.5], at[0.5], 5, _HEIGHT - 5) + dots


def density(positions: Sequence[float]) -> list[float]:
    """Return the height in each of `_BINS` bins of [0, 1], the highest 1, of what has these `QUANTILES`."""
    mass = [0.0] * _BINS
    for (low, high), (start, end) in zip(pairwise(QUANTILES), pairwise(positions), strict=True):
        first, last = _bin(start), _bin(end)
        for n in range(first, last + 1):
            if end > start:
                overlap = min(end, (n + 1) / _BINS) - max(start, n / _BINS)
                mass[n] += (high - low) * max(overlap, 0.0) / (end - start)
            else:
                mass[n] += high - low
    padded = [mass[0], *mass, mass[-1]]
    smooth = [(padded[n] + 2 * padded[n + 1] + padded[n + 2]) / 4 for n in range(_BINS)]
    highest = max(smooth)
    return [height / highest for height in smooth] if highest > 0 else smooth


def _bin(position: float) -> int:
    return min(int(position * _BINS), _BINS - 1)


class LogScale:
    """Positions on a logarithmic axis of whole decades.

    Args:
        values: the positive values to cover.
    """

    def __init__(self, values: Sequence[float]) -> None:
        self.high = math.ceil(math.log10(max(values)) - 1e-9)
        low = math.floor(math.log10(min(values)) + 1e-9)
        self.low = min(max(low, self.high - _MOST_DECADES), self.high - 1)

    def at(self, value: float) -> float:
        """Return the position in [0, 1]; zero and whatever is below the axis sit at its start."""
        if value <= 0:
            return 0.0
        if value == math.inf:
            return 1.0
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return min(max(share, 0.0), 1.0)

    def ticks(self) -> list[tuple[float, str]]:
        """Return (position, label) of each decade, of every second where they are many."""
        step = 1 if self.high - self.low <= 5 else 2
        return [
            (self.at(10.0**power), f"10{parts.superscript(power)}")
            for power in range(self.high, self.low - 1, -step)
        ]

    def grid(self) -> str:
        """Return the decades as lines."""
        return "".join(
            parts.line("grid", self.at(10.0**p), self.at(10.0**p), 0, _HEIGHT)
            for p in range(self.low, self.high + 1)
        )

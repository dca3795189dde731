"""Outlines of distributions on a logarithmic axis: one violin per layer.

A report keeps quantiles, not strengths. Between two neighbouring quantiles lies a known share of the synapses; spread
evenly over that stretch of the axis and smoothed a little, it gives the outline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ss_pruning._utils.arrays import Floats
from ss_pruning.report.records import QUANTILES

_MOST_DECADES = 8
"""Strengths further than this below the largest are drawn at the left edge."""

_BINS, _HEIGHT = 60, 22
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Violin(NamedTuple):
    """A polygon in a box of 100 by 22, and positions in [0, 1]: the ends, the middle half, the median."""

    points: str
    ends: tuple[float, float]
    half: tuple[float, float]
    median: float


def violin(positions: Sequence[float]) -> Violin:
    """Draw `QUANTILES`, given as positions in [0, 1]."""
    at = dict(zip(QUANTILES, positions, strict=True))
    middle = _HEIGHT / 2
    outline = [
        (100 * (n + 0.5) / _BINS, (middle - 1) * height)
        for n, height in enumerate(density(positions))
        if height
    ]
    upper = [f"{x:.1f},{middle - y:.1f}" for x, y in outline]
    lower = [f"{x:.1f},{middle + y:.1f}" for x, y in reversed(outline)]
    return Violin(" ".join(upper + lower), (at[0.0], at[1.0]), (at[0.25], at[0.75]), at[0.5])


def density(positions: Sequence[float]) -> Floats:
    """Return the height in each of `_BINS` bins of [0, 1], the highest 1, of what has these `QUANTILES`."""
    below = np.interp(np.linspace(0, 1, _BINS + 1), positions, QUANTILES)
    below[0], below[-1] = 0, 1  # what lies on the ends of the axis is inside
    smooth = np.convolve(np.pad(np.diff(below), 1, mode="edge"), (0.25, 0.5, 0.25), mode="valid")
    heights: Floats = smooth / smooth.max()
    return heights


class LogScale:
    """Positions on a logarithmic axis of whole decades that covers positive values."""

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

    def decades(self) -> list[float]:
        """Return the position of each decade."""
        return [self.at(10.0**power) for power in range(self.low, self.high + 1)]

    def ticks(self) -> list[tuple[float, str]]:
        """Return (position, label) of each decade, of every second where they are many."""
        step = 1 if self.high - self.low <= 5 else 2
        return [
            (self.at(10.0**power), f"10{str(power).translate(_SUPERSCRIPTS)}")
            for power in range(self.high, self.low - 1, -step)
        ]

"""Two reports side by side: what `ss-prune compare` shows, as records, a table and JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ss_pruning.errors import InputError, require
from ss_pruning.report.formatting import (
    aligned,
    count,
    in_words,
    jsonable,
    milliseconds,
    percent,
    plain,
    printable,
    rich_table,
)
from ss_pruning.report.records import TOO_NOISY, Report

if TYPE_CHECKING:
    from rich.table import Table

ABSENT = "-"
_COLUMNS = ("dense", "A", "B", "A to B")
# Dense times that differ by more than this are not from like conditions.
_SAME_TIME = 0.1


@dataclass(frozen=True)
class Figure:
    """One number of the headline: of the dense model, of both pruned ones, and how far B is from A."""

    name: str
    dense: str
    a: str
    b: str
    difference: str


@dataclass(frozen=True)
class LayerPair:
    """Output channels of one layer: dense, and after each pruning; None where a model lacks the layer."""

    path: str
    kind: str
    dense: int
    a: int | None
    b: int | None


@dataclass(frozen=True, repr=False)
class Comparison:
    """What differs between two reports.

    Attributes:
        name_a: what the user calls the first.
        name_b: what the user calls the second.
        figures: the headline, the same numbers of both.
        layers: by path, in the order of the first report, then what only the second has.
        settings: (name, of A, of B) where they differ; None where one does not have it.
        notes: what a consumer must know before trusting the comparison.
    """

    name_a: str
    name_b: str
    figures: list[Figure]
    layers: list[LayerPair]
    settings: list[tuple[str, Any, Any]]
    notes: list[str]

    def __repr__(self) -> str:
        """Return one line: what is compared."""
        return f"Comparison({printable(self.name_a)!r}, {printable(self.name_b)!r}: {self.widths()})"

    def __str__(self) -> str:
        """Return the headline as a table of plain text, with the settings that differ and the notes below."""
        settings = (f"{name}: {a} in A, {b} in B" for name, a, b in self.told_settings())
        lines = [
            *self.titles(),
            *aligned([("", *_COLUMNS), *self.rows()]),
            *settings,
            *self.notes,
            self.widths(),
        ]
        return "\n".join(map(printable, lines))

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        from ss_pruning.report.html import render_fragment

        return render_fragment("; ".join(self.titles()), _COLUMNS, self.rows(), [*self.notes, self.widths()])

    def titles(self) -> tuple[str, str]:
        """Return what A and B stand for."""
        return f"A: {self.name_a}", f"B: {self.name_b}"

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Return the rows (name, dense, A, B, A to B) of the headline table."""
        return [(row.name, row.dense, row.a, row.b, row.difference) for row in self.figures]

    def told_settings(self) -> list[tuple[str, str, str]]:
        """Return the settings that differ, in words."""
        return [(name, _told(a), _told(b)) for name, a, b in self.settings]

    def widths(self) -> str:
        """Return how many layers differ, in words."""
        return f"{sum(pair.a != pair.b for pair in self.layers)} of {len(self.layers)} layers differ in width"

    def table(self) -> Table:
        """Return the headline as a `rich` table, with the number of layers that differ below.

        Raises:
            InputError: `rich` is not installed; `str` does without.
        """
        require("a table for the terminal", "cli", "rich")
        from rich.box import SIMPLE_HEAD

        title, columns = plain("\n".join(self.titles())), ("", *_COLUMNS)
        table = rich_table(title, columns, self.rows(), self.widths(), box=SIMPLE_HEAD, pad_edge=False)
        table.columns[0].no_wrap = True  # the figures fold before the names do
        for name, a, b in self.told_settings():
            table.add_row(*(plain(cell) for cell in (name, "", a, b, "")), style="dim")
        return table

    def to_html(self, a: Report, b: Report) -> str:
        """Return one self-contained HTML page of the two reports that were compared."""
        from ss_pruning.report.html import render_comparison

        return render_comparison(self, a, b)

    def to_json(self) -> str:
        """Return everything as JSON text."""
        return json.dumps({"format": "ss-pruning comparison 1", **jsonable(self)}, indent=2) + "\n"


def compare(a: Report, b: Report, name_a: str = "A", name_b: str = "B") -> Comparison:
    """Put two reports side by side.

    Raises:
        InputError: the dense models have different numbers of parameters, so that they are different networks.
    """
    if a.params_before != b.params_before:
        raise InputError(
            f"the reports are of different networks: {a.model!r} with {a.params_before:,} parameters and {b.model!r} "
            f"with {b.params_before:,}. Compare two prunings of one network."
        )
    return Comparison(name_a, name_b, _figures(a, b), _layers(a, b), _settings(a, b), _notes(a, b))


def _figures(a: Report, b: Report) -> list[Figure]:
    rows = []
    if a.accuracy_after is not None and b.accuracy_after is not None:
        whole = ABSENT if a.accuracy_before is None else percent(a.accuracy_before, 2)
        first, second = percent(a.accuracy_after, 2), percent(b.accuracy_after, 2)
        points = f"{100 * (b.accuracy_after - a.accuracy_after):+.2f} points"
        rows.append(Figure("top-1", whole, first, second, points))
    for name, unit, dense, ours, theirs in (
        ("multiply-accumulates", "", a.macs_before, a.macs_after, b.macs_after),
        ("parameters", "", a.params_before, a.params_after, b.params_after),
        ("weights", "B", a.bytes_before, a.bytes_after, b.bytes_after),
    ):
        if dense and ours and theirs:
            first, second = (f"{count(value, unit)} ({percent(value / dense)})" for value in (ours, theirs))
            rows.append(
                Figure(name, count(dense, unit), first, second, f"{100 * (theirs / ours - 1):+.1f} %")
            )
    return rows + _times(a, b)


def _times(a: Report, b: Report) -> list[Figure]:
    """The shares compare: each was measured in turns with the dense model."""
    if not a.latency_ratio or not b.latency_ratio:
        return []
    dense = dict.fromkeys(milliseconds(report.latency_before) for report in (a, b))
    first, second = (
        f"{milliseconds(report.latency_after)} "
        f"({TOO_NOISY if report.too_noisy else percent(report.latency_ratio or 0.0)})"
        for report in (a, b)
    )
    difference = f"{100 * (b.latency_ratio / a.latency_ratio - 1):+.1f} %"
    return [Figure("latency", " / ".join(dense), first, second, TOO_NOISY if _overlap(a, b) else difference)]


def _overlap(a: Report, b: Report) -> bool:
    """Whether the quartiles of the two shares have something in common: either may be the smaller one."""
    if a.latency_spread is None or b.latency_spread is None:
        return False
    return max(a.latency_spread[0], b.latency_spread[0]) < min(a.latency_spread[1], b.latency_spread[1])


def _layers(a: Report, b: Report) -> list[LayerPair]:
    first, second = ({layer.path: layer for layer in report.layers} for report in (a, b))
    pairs = []
    for path in dict.fromkeys([*first, *second]):
        one, other = first.get(path), second.get(path)
        known = one or other
        assert known is not None  # the path comes from one of them
        widths = (None if layer is None else layer.outputs_after for layer in (one, other))
        pairs.append(LayerPair(path, known.kind, known.outputs_before, *widths))
    return pairs


def _settings(a: Report, b: Report) -> list[tuple[str, Any, Any]]:
    names = dict.fromkeys([*a.settings, *b.settings])
    values = [(name, *(jsonable(report.settings.get(name)) for report in (a, b))) for name in names]
    return [entry for entry in values if entry[1] != entry[2]]


def _notes(a: Report, b: Report) -> list[str]:
    notes = [
        f"{name} has random weights: only sizes and times mean anything."
        for name, report in (("A", a), ("B", b))
        if report.random_weights
    ]
    if a.model != b.model:
        notes.append(f"The models are called differently: {a.model} and {b.model}.")
    if a.macs_before != b.macs_before:
        notes.append("The multiply-accumulates are those of inputs of different sizes: they do not compare.")
    if (a.accuracy_before is None) != (b.accuracy_before is None):
        notes.append(f"Accuracy was measured of {'B' if a.accuracy_before is None else 'A'} only (--data).")
    elif a.images != b.images:
        notes.append(f"The accuracies were measured on {a.images} and {b.images} images.")
    elif a.accuracy_before != b.accuracy_before:
        notes.append("The dense accuracies differ: other weights, or other images.")
    if a.latency_before and b.latency_before and abs(b.latency_before / a.latency_before - 1) > _SAME_TIME:
        notes.append(
            f"The dense model took {milliseconds(a.latency_before)} and {milliseconds(b.latency_before)}: another "
            "batch, machine or load. Compare the shares of it, with care."
        )
    return notes


def _told(value: Any) -> str:
    return ABSENT if value is None else in_words(value)

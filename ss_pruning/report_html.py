"""The report as one self-contained HTML page: no script, no network, figures as inline SVG.

Every figure is a list with one row per layer: the name and numbers as text, the picture as a small SVG whose
coordinates are percentages. So rows reflow on a phone, break between pages in print, read aloud in order, and
two hundred layers are two hundred rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from ss_pruning.report import jsonable, percent, printable
from ss_pruning.report_style import STYLE

if TYPE_CHECKING:
    from ss_pruning.coupling import LeftWhole
    from ss_pruning.report import LayerReport, Report

_MOST_DECADES = 8
"""Strengths further than this below the largest are drawn at the left edge."""

_META = """<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
"""

_MOST_PATHS = 6
"""Modules listed before the rest folds away."""


def render(report: Report) -> str:
    """Return the whole page."""
    title = f"Pruning report: {report.model}"
    sections = [
        _section("before-after", "Before and after", _before_after(report)),
        _section("widths", "Width of each layer", _widths(report.layers)),
        _section("strength", "Strength by depth", _strengths(report.layers)),
        _section("synapses", "Synapses cut in each layer", _shares_cut(report.layers)),
        _section("whole", "What was left whole", _left_whole(report.left_whole)),
        _section("run", "How this was made", _run(report)),
    ]
    links = "".join(f'<li><a href="#{name}">{_text(heading)}</a></li>' for name, heading, _ in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-h">'
        f'<h2 id="{name}-h">{_text(heading)}</h2>{html}</section>\n'
        for name, heading, html in sections
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{_META}'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header><p class="kind">Pruning report</p><h1>{_breakable(report.model)}</h1>'
        f'<p class="lead">{_text(_lead(report))}</p></header>\n'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>\n{body}\n</main>\n</body>\n</html>\n'
    )


def _section(name: str, heading: str, html: str) -> tuple[str, str, str]:
    return name, heading, html


def _lead(report: Report) -> str:
    """Say the outcome in one sentence."""
    parts = []
    if report.macs_before:
        parts.append(f"{percent(report.macs_after / report.macs_before)} of the multiply-accumulates")
    if report.params_before:
        parts.append(f"{percent(report.params_after / report.params_before)} of the parameters")
    text = f"The pruned model keeps {' and '.join(parts)}." if parts else ""
    if report.accuracy_before is not None and report.accuracy_after is not None:
        before, after = percent(report.accuracy_before, 2), percent(report.accuracy_after, 2)
        images = f" on {report.images:,} images" if report.images is not None else ""
        text += f" Top-1{images} goes from {before} to {after}, with no training in between."
    return text.strip()


def _before_after(report: Report) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_text(name)}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in report.headline()
    )
    known = math.isfinite(report.max_error)
    mark = '<span class="mark" aria-hidden="true">✓</span> ' if known else ""
    return (
        '<table class="headline"><thead><tr><td></td><th scope="col">dense</th><th scope="col">pruned</th>'
        f'<th scope="col">kept</th></tr></thead><tbody>{rows}</tbody></table>'
        f'<p class="verdict">{mark}{_unbroken_numbers(report.verification())}</p>'
    )


def _widths(layers: Sequence[LayerReport]) -> str:
    # A classifier of a thousand classes, never narrowed, would squeeze the other bars: it is cut short.
    narrowed = [layer.outputs_before for layer in layers if layer.outputs_after < layer.outputs_before]
    widest = max(narrowed or [layer.outputs_before for layer in layers], default=0)

    def figure(layer: LayerReport) -> tuple[str, str]:
        label = f"{layer.path}: {layer.outputs_before} output channels before, {layer.outputs_after} after"
        dense, pruned = layer.outputs_before / (widest or 1), layer.outputs_after / (widest or 1)
        bars = _bar("dense", dense, 3, 7) + _bar("pruned", pruned, 12, 7)
        broken = '<rect class="gap" x="96%" y="0" width="5" height="22"/>' if dense > 1 else ""
        return _arrow(layer.outputs_before, layer.outputs_after), _svg(label, bars + broken)

    note = (
        "Output channels of each convolution and linear layer, in the order in which they run: the upper bar "
        "is the dense model, the lower one the pruned. Layers that feed the same sum are cut together."
    )
    if any(layer.outputs_before > widest for layer in layers):
        note += " A bar with a gap is wider than the scale."
    legend = _legend(("dense", "dense"), ("pruned", "pruned"))
    return _chart(
        note + legend, layers, figure, _axis([(0.0, "0"), (0.5, f"{widest / 2:g}"), (1.0, f"{widest}")])
    )


def _strengths(layers: Sequence[LayerReport]) -> str:
    known = [layer for layer in layers if len(layer.strength) == len(_PARTS)]
    # The weakest are left out: a few that are all but zero would squeeze the rest; their dots go to the edge.
    positive = [value for layer in known for value in layer.strength[1:] if 0 < value < math.inf]
    if not positive:
        return "<p>The strengths of this model were not recorded.</p>"
    scale = _LogScale(positive)

    def figure(layer: LayerReport) -> tuple[str, str]:
        quantiles = zip(_PARTS, layer.strength, strict=True)
        spoken = ", ".join(f"{name} {_power(value)}" for name, value in quantiles)
        return _power(layer.strength[3]), _svg(
            f"{layer.path}: {spoken}", scale.grid() + _box(layer.strength, scale)
        )

    note = (
        "Strength of the dense model's synapses, on a logarithmic scale: the box holds the middle half, the "
        "line in it is the median (the number beside the name), the whiskers reach from the 5th to the 95th "
        "percentile, the dots are the weakest and the strongest. A dot at the left edge stands for that or "
        "anything weaker."
    )
    return _chart(note, known, figure, _axis(scale.ticks()))


def _shares_cut(layers: Sequence[LayerReport]) -> str:
    def figure(layer: LayerReport) -> tuple[str, str]:
        label = f"{layer.path}: {percent(layer.share_cut)} of {layer.synapses_before} synapses cut"
        return percent(layer.share_cut), _svg(
            label, _bar("track", 1.0, 6, 10) + _bar("cut", layer.share_cut, 6, 10)
        )

    note = (
        "A synapse is the connection from one input channel to one output channel. It goes when either end "
        "goes, so a layer between two narrowed ones loses twice."
    )
    ticks = [(position / 4, f"{25 * position} %") for position in range(5)]
    return _chart(note, layers, figure, _axis(ticks))


def _left_whole(entries: Sequence[LeftWhole]) -> str:
    if not entries:
        return "<p>Nothing: every channel could go.</p>"
    items = "".join(
        f'<dt>{_text(entry.reason)} <span class="muted">({entry.channels:,} channels)</span></dt>'
        f"<dd>{_paths(entry.paths)}</dd>"
        for entry in entries
    )
    return f'<dl class="whole">{items}</dl>'


def _run(report: Report) -> str:
    html = ""
    if report.command:
        html += f"<h3>Command</h3><pre><code>{_text(report.command)}</code></pre>"
    seconds = {name: f"{value:.2f} s" for name, value in report.seconds.items()}
    for heading, values in (("Settings", report.settings), ("Time", seconds), ("Versions", report.versions)):
        if values:
            rows = "".join(
                f'<tr><th scope="row">{_breakable(name)}</th><td>{_breakable(_value(value))}</td></tr>'
                for name, value in values.items()
            )
            html += f'<h3>{heading}</h3><table class="facts"><tbody>{rows}</tbody></table>'
    return html or "<p>Not recorded.</p>"


def _value(value: object) -> str:
    plain = jsonable(value)
    if plain is None:
        return "not set"
    if isinstance(plain, bool):
        return "yes" if plain else "no"
    if isinstance(plain, list):
        return ", ".join(map(str, plain)) or "none"
    return str(plain)


# ---------------------------------------------------------------- rows


def _chart(
    note: str, layers: Sequence[LayerReport], figure: Callable[[LayerReport], tuple[str, str]], axis: str
) -> str:
    """Lay out one row per layer: name, numbers, picture; the axis stays in sight while the rows scroll."""
    if not layers:
        return "<p>No layers.</p>"
    rows = []
    for layer in layers:
        numbers, svg = figure(layer)
        name = f'<span class="name" title="{_text(layer.kind)}">{_breakable(layer.path)}</span>'
        rows.append(f'<li>{name}<span class="numbers">{_text(numbers)}</span>{svg}</li>')
    return (
        f'<p class="note">{note}</p><div class="axis" aria-hidden="true">{axis}</div>'
        f'<ol class="rows" role="list">{"".join(rows)}</ol>'
    )


def _legend(*entries: tuple[str, str]) -> str:
    swatches = "".join(
        f'<span class="key"><svg class="swatch" aria-hidden="true">'
        f'<rect class="{kind}" width="100%" height="100%"/></svg>{_text(name)}</span>'
        for kind, name in entries
    )
    return f' <span class="legend">{swatches}</span>'


def _arrow(before: int, after: int) -> str:
    return f"{before}" if before == after else f"{before} → {after}"


def _paths(paths: Sequence[str]) -> str:
    names = [f"<code>{_breakable(path)}</code>" for path in paths]
    html = ", ".join(names[:_MOST_PATHS])
    rest = names[_MOST_PATHS:]
    if rest:
        html += f"<details><summary>and {len(rest)} more</summary>{', '.join(rest)}</details>"
    return html


# ---------------------------------------------------------------- SVG


def _svg(label: str, shapes: str) -> str:
    """Wrap shapes of one row; `label` is read aloud and shown on hovering."""
    text = _text(label)
    return f'<svg class="figure" role="img" aria-label="{text}"><title>{text}</title>{shapes}</svg>'


def _bar(kind: str, share: float, top: int, height: int) -> str:
    """A horizontal bar from the left; a share above 0 stays visible however small."""
    width = _at(share)
    least = ' style="min-width:1px"' if share > 0 else ""
    return f'<rect class="{kind}" x="0" y="{top}" width="{width}" height="{height}"{least}/>'


def _line(kind: str, start: float, end: float, top: float, bottom: float) -> str:
    return f'<line class="{kind}" x1="{_at(start)}" x2="{_at(end)}" y1="{top:g}" y2="{bottom:g}"/>'


def _axis(ticks: Iterable[tuple[float, str]]) -> str:
    """Label positions along the figures' width; the outermost labels stay inside."""
    marks = []
    for position, label in ticks:
        anchor = "start" if position < 0.02 else "end" if position > 0.98 else "middle"
        marks.append(f'<text x="{_at(position)}" y="12" text-anchor="{anchor}">{_text(label)}</text>')
    return f'<svg class="figure">{"".join(marks)}</svg>'


_PARTS = ("weakest", "5 %", "25 %", "median", "75 %", "95 %", "strongest")


class _LogScale:
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
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return min(max(share, 0.0), 1.0)

    def ticks(self) -> list[tuple[float, str]]:
        """Return (position, label) of each decade, of every second where they are many."""
        step = 1 if self.high - self.low <= 5 else 2
        return [
            (self.at(10.0**power), f"10{_superscript(power)}")
            for power in range(self.high, self.low - 1, -step)
        ]

    def grid(self) -> str:
        """Return the decades as lines."""
        return "".join(
            _line("grid", self.at(10.0**p), self.at(10.0**p), 0, 22) for p in range(self.low, self.high + 1)
        )


def _box(strength: Sequence[float], scale: _LogScale) -> str:
    weakest, low, lower, median, upper, high, strongest = (scale.at(value) for value in strength)
    return (
        _line("whisker", low, high, 11, 11)
        + f'<rect class="box" x="{_at(lower)}" y="4" width="{_at(upper - lower)}" height="14"/>'
        + _line("median", median, median, 3, 19)
        + "".join(f'<circle class="dot" cx="{_at(place)}" cy="11" r="2"/>' for place in (weakest, strongest))
    )


def _at(share: float) -> str:
    """Write a share of the width as SVG does."""
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"


def _power(value: float) -> str:
    """Write a strength in two digits: 0.0042, 13, 3.1e-07."""
    return f"{value:.2g}"


def _superscript(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


# ---------------------------------------------------------------- text


def _text(value: object) -> str:
    """Escape anything for text and attributes."""
    return escape(printable(value), quote=True)


def _unbroken_numbers(value: str) -> str:
    """Escape, and keep numbers such as 3.1e-07 on one line."""
    return re.sub(r"[\d.]+e[-+]\d+", r'<span class="nobreak">\g<0></span>', _text(value))


def _breakable(value: object) -> str:
    """Escape, and allow a line break after each dot of a module path."""
    return _text(value).replace(".", ".<wbr>")

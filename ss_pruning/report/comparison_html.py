"""Two reports side by side as one self-contained HTML page, made of the same parts as a single report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ss_pruning.report import parts
from ss_pruning.report.comparison import ABSENT

if TYPE_CHECKING:
    from ss_pruning.report.comparison import Comparison, LayerPair
    from ss_pruning.report.records import Report


def render(comparison: Comparison, a: Report, b: Report) -> str:
    """Return the whole page."""
    sections = [
        ("headline", "Headline", _headline(comparison)),
        ("widths", "Width of each layer", _widths(comparison)),
        ("settings", "Settings that differ", _settings(comparison)),
        ("commands", "How they were made", _commands(a, b)),
    ]
    lead = f"A is {comparison.name_a}, B is {comparison.name_b}."
    name = a.model if a.model == b.model else f"{a.model} and {b.model}"
    return parts.page("Two prunings compared", name, lead, sections)


def _headline(comparison: Comparison) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in ("dense", "A", "B", "A to B"))
    rows = "".join(
        f'<tr><th scope="row">{parts.text(row.name)}</th>'
        f"{''.join(f'<td>{_cell(cell)}</td>' for cell in (row.dense, row.a, row.b, row.difference))}</tr>"
        for row in comparison.figures
    )
    notes = "".join(f'<p class="verdict open">{parts.text(note)}</p>' for note in comparison.notes)
    return (
        '<table class="headline both"><thead><tr><td></td>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table>{notes}"
    )


def _cell(figure: str) -> str:
    """Let a line break only where a phone needs it: not between a number and its sign."""
    held = parts.text(figure).replace(" ", "&nbsp;")
    for before, behind in (("", "("), ("", "points"), ("/", "")):
        held = held.replace(f"{before}&nbsp;{behind}", f"{before} {behind}")
    return held


def _widths(comparison: Comparison) -> str:
    cut = [pair.dense for pair in comparison.layers if {pair.a, pair.b} != {pair.dense}]
    widest = max(cut or [pair.dense for pair in comparison.layers], default=0) or 1

    def row(pair: LayerPair) -> parts.Row:
        widths = [ABSENT if width is None else f"{width}" for width in (pair.a, pair.b)]
        label = f"{pair.path}: {pair.dense} output channels, {widths[0]} in A, {widths[1]} in B"
        bars = (
            parts.bar("track", pair.dense / widest, 2, 18)
            + parts.bar("pruned", (pair.a or 0) / widest, 4, 6)
            + parts.bar("cut", (pair.b or 0) / widest, 12, 6)
        )
        return parts.Row(pair.path, pair.kind, " | ".join(widths), parts.svg(label, bars))

    note = "Output channels of each layer in A and in B, on the width of the dense model."
    legend = parts.legend(("track", "dense"), ("pruned", "A"), ("cut", "B"))
    axis = parts.axis([(0.0, "0"), (0.5, f"{widest / 2:g}"), (1.0, f"{widest}")])
    return parts.chart(note + legend, [row(pair) for pair in comparison.layers], axis)


def _settings(comparison: Comparison) -> str:
    if not comparison.settings:
        return "<p>None.</p>"
    rows = "".join(
        f'<tr><th scope="row">{parts.breakable(name)}</th>'
        f"{''.join(f'<td>{parts.breakable(ABSENT if value is None else value)}</td>' for value in values)}</tr>"
        for name, *values in comparison.settings
    )
    head = '<thead><tr><td></td><th scope="col">A</th><th scope="col">B</th></tr></thead>'
    return f'<table class="facts">{head}<tbody>{rows}</tbody></table>'


def _commands(a: Report, b: Report) -> str:
    return "".join(
        f"<h3>{name}</h3><pre><code>{parts.text(report.command or 'not recorded')}</code></pre>"
        for name, report in (("A", a), ("B", b))
    )

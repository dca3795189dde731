"""What the HTML pages are made of: rows of one layer each, small SVG figures, escaped text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from ss_pruning.report.records import printable
from ss_pruning.report.style import STYLE

_META = """<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
"""

_MOST_PATHS = 6
"""Modules listed before the rest folds away."""

Section = tuple[str, str, str]
"""Anchor, heading and contents."""


def page(kind: str, name: str, lead: str, sections: Sequence[Section]) -> str:
    """Return a whole page: what kind it is of, what it is about, the outcome in a sentence, and the sections."""
    links = "".join(f'<li><a href="#{anchor}">{text(heading)}</a></li>' for anchor, heading, _ in sections)
    body = "".join(
        f'<section id="{anchor}" aria-labelledby="{anchor}-h">'
        f'<h2 id="{anchor}-h">{text(heading)}</h2>{html}</section>\n'
        for anchor, heading, html in sections
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{_META}'
        f"<title>{text(kind)}: {text(name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header><p class="kind">{text(kind)}</p><h1>{breakable(name)}</h1>'
        f'<p class="lead">{text(lead)}</p></header>\n'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>\n{body}\n</main>\n</body>\n</html>\n'
    )


def facts(values: Iterable[tuple[str, str]]) -> str:
    """Return a table of names and what they are, both as text."""
    rows = "".join(
        f'<tr><th scope="row">{breakable(name)}</th><td>{breakable(value)}</td></tr>'
        for name, value in values
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


# ---------------------------------------------------------------- rows


class Row(NamedTuple):
    """One layer in a figure: its name, its class, its numbers as text, and the picture."""

    name: str
    kind: str
    numbers: str
    picture: str


def chart(note: str, rows: Sequence[Row], axis: str) -> str:
    """Lay out one row per layer; the axis stays in sight while the rows scroll. `note` is HTML."""
    if not rows:
        return "<p>No layers.</p>"
    lines = "".join(
        f'<li><span class="name" title="{text(row.kind)}">{breakable(row.name)}</span>'
        f'<span class="numbers">{text(row.numbers)}</span>{row.picture}</li>'
        for row in rows
    )
    return (
        f'<p class="note">{note}</p><div class="axis" aria-hidden="true">{axis}</div>'
        f'<ol class="rows" role="list">{lines}</ol>'
    )


def legend(*entries: tuple[str, str]) -> str:
    """Explain colours: class of the style sheet, and what it stands for."""
    swatches = "".join(
        f'<span class="key"><svg class="swatch" aria-hidden="true">'
        f'<rect class="{kind}" width="100%" height="100%"/></svg>{text(name)}</span>'
        for kind, name in entries
    )
    return f' <span class="legend">{swatches}</span>'


def arrow(before: int, after: int) -> str:
    """Write what became of a number."""
    return f"{before}" if before == after else f"{before} → {after}"


def modules(paths: Sequence[str]) -> str:
    """List module paths; the rest of many folds away."""
    names = [f"<code>{breakable(path)}</code>" for path in paths]
    html = ", ".join(names[:_MOST_PATHS])
    rest = names[_MOST_PATHS:]
    if rest:
        html += f"<details><summary>and {len(rest)} more</summary>{', '.join(rest)}</details>"
    return html


# ---------------------------------------------------------------- SVG


def svg(label: str, shapes: str) -> str:
    """Wrap shapes of one row; `label` is read aloud and shown on hovering."""
    said = text(label)
    return f'<svg class="figure" role="img" aria-label="{said}"><title>{said}</title>{shapes}</svg>'


def bar(kind: str, share: float, top: int, height: int) -> str:
    """A horizontal bar from the left; a share above 0 stays visible however small."""
    width = at(share)
    least = ' style="min-width:1px"' if share > 0 else ""
    return f'<rect class="{kind}" x="0" y="{top}" width="{width}" height="{height}"{least}/>'


def line(kind: str, start: float, end: float, top: float, bottom: float) -> str:
    """A straight line between two positions, at two heights."""
    return f'<line class="{kind}" x1="{at(start)}" x2="{at(end)}" y1="{top:g}" y2="{bottom:g}"/>'


def axis(ticks: Iterable[tuple[float, str]]) -> str:
    """Label positions along the figures' width; the outermost labels stay inside."""
    marks = []
    for position, label in ticks:
        anchor = "start" if position < 0.02 else "end" if position > 0.98 else "middle"
        marks.append(f'<text x="{at(position)}" y="12" text-anchor="{anchor}">{text(label)}</text>')
    return f'<svg class="figure">{"".join(marks)}</svg>'


def at(share: float) -> str:
    """Write a share of the width as SVG does."""
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"


def short(value: float) -> str:
    """Write a strength in two digits: 0.0042, 13, 3.1e-07."""
    return f"{value:.2g}"


def superscript(power: int) -> str:
    """Write an exponent."""
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


# ---------------------------------------------------------------- text


def text(value: object) -> str:
    """Escape anything for text and attributes."""
    return escape(printable(value), quote=True)


def unbroken_numbers(value: str) -> str:
    """Escape, and keep numbers such as 3.1e-07 on one line."""
    return re.sub(r"[\d.]+e[-+]\d+", r'<span class="nobreak">\g<0></span>', text(value))


def breakable(value: object) -> str:
    """Escape, and allow a line break after the dots of a module path, but none in a number or before its unit."""
    lines = re.sub(r"\.(?!\d)|(?<!\d)\.", ".<wbr>", text(value))
    return re.sub(r"(?<=\d) (?=%|ms\b)", "&nbsp;", lines)

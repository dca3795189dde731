"""Reports and comparisons as self-contained HTML: no script, no network, figures as inline SVG.

The templates hold the words; what is drawn comes from `charts`. Every figure is a list with one row per layer: the
name and numbers as text, the picture as a small SVG whose coordinates are percentages. So rows reflow on a phone, break
between pages in print, read aloud in order, and two hundred layers are two hundred rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from ss_pruning.report import charts
from ss_pruning.report.formatting import in_words, percent, printable
from ss_pruning.report.next_steps import next_steps
from ss_pruning.report.notes import certainty

if TYPE_CHECKING:
    from ss_pruning.report.comparison import Comparison
    from ss_pruning.report.records import Report


def render(report: Report) -> str:
    """Return the page of one report."""
    return _template("report").render(
        report=report,
        lead=_lead(report),
        verified=math.isfinite(report.max_error) and not report.by_decisions,
        certainty=certainty(report),
        widths=charts.widths(report.layers),
        costs=charts.costs(report.layers),
        strengths=charts.strengths(report.layers),
        synapses=charts.synapses_cut(report.layers),
        next_steps=next_steps(report),
        run=_run(report),
    )


def render_comparison(comparison: Comparison, a: Report, b: Report) -> str:
    """Return the page of two reports side by side."""
    return _template("comparison").render(
        comparison=comparison,
        reports={"A": a, "B": b},
        name=a.model if a.model == b.model else f"{a.model} and {b.model}",
        widths=charts.compared_widths(comparison.layers),
        settings=comparison.told_settings(),
    )


def render_fragment(
    title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]], notes: Sequence[str]
) -> str:
    """Return what a notebook shows: a headline table whose style touches nothing else on the page."""
    return _template("fragment").render(title=title, columns=columns, rows=rows, notes=notes)


@cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("ss_pruning.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_plain,
    )
    environment.filters |= {
        "at": charts.at,
        "breakable": _breakable,
        "figure": _figure,
        "percent": percent,
        "unbroken": _unbroken,
    }
    return environment.get_template(f"{name}.html.j2")


def _lead(report: Report) -> str:
    """Say the outcome in one sentence."""
    kept = []
    if report.macs_before:
        kept.append(f"{percent(report.macs_after / report.macs_before)} of the multiply-accumulates")
    if report.params_before:
        kept.append(f"{percent(report.params_after / report.params_before)} of the parameters")
    said = f"The pruned model keeps {' and '.join(kept)}." if kept else ""
    if report.accuracy_before is not None and report.accuracy_after is not None:
        before, after = percent(report.accuracy_before, 2), percent(report.accuracy_after, 2)
        images = f" on {report.images:,} images" if report.images is not None else ""
        said += f" Top-1{images} goes from {before} to {after}, with no training in between."
    return said.strip()


def _run(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """How the report was made, as (heading, rows); what is unknown is left out."""
    file = {} if report.model_sha256 is None else {"SHA-256 of its content": report.model_sha256}
    tables: list[tuple[str, Mapping[str, object]]] = [
        ("Settings", report.settings),
        ("Time", {name: f"{value:.2f} s" for name, value in report.seconds.items()}),
        ("Versions", report.versions),
        ("The model's file", file),
    ]
    return [
        (heading, [(name, in_words(v)) for name, v in values.items()]) for heading, values in tables if values
    ]


def _plain(value: object) -> object:
    """What every expression of a template goes through before it is escaped."""
    return value if isinstance(value, Markup) else printable(value)


def _escaped(value: object) -> str:
    return str(escape(printable(value)))


def _unbroken(value: object) -> Markup:
    """Keep numbers such as 3.1e-07 on one line."""
    return Markup(re.sub(r"[\d.]+e[-+]\d+", r'<span class="nobreak">\g<0></span>', _escaped(value)))


def _breakable(value: object) -> Markup:
    """Allow a line break within a path or a name (`a.b_c`), but none in a number or before its unit."""
    lines = re.sub(r"\.(?!\d)|(?<!\d)\.|(?<=\w)[_:/](?=\w)", r"\g<0><wbr>", _escaped(value))
    return Markup(re.sub(r"(?<=\d) (?=%|ms\b)", "&nbsp;", lines))


def _figure(value: object) -> Markup:
    """Let a figure break only where a phone needs it: not between a number and its unit."""
    return Markup(re.sub(r"(?<=\d) (?=[\w%])(?!points)| (?=/)", "&nbsp;", _escaped(value)))

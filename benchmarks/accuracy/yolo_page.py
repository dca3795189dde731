"""Turn benchmarks/results/yolo.json into docs/yolo.md: no figure is typed in by hand.

Run `python examples/yolo/prune.py --out runs/yolo`, then
`python -m benchmarks.accuracy.yolo_page runs/yolo/results.json [the same of further runs]`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import DOCS, RESULTS

PAGE = DOCS / "yolo.md"
RESULT = RESULTS / "yolo.json"

INTRODUCTION = """# A YOLO, end to end

A YOLOv8n trained from nothing for {epochs} epochs on {training} photographs of 160 x 160 with handwritten digits on \
them, pruned, and repaired.{one} mAP is \
Ultralytics' own, in %, on {validation} images that share neither digits nor backgrounds with those trained on. It is \
one run with one seed, of a detector whose training is far from its end: it shows that the road can be walked, not \
what a YOLO trained on COCO would lose, which has 80 things to find.
"""

TABLE = """## To {macs:.0%} of the multiply-accumulates, {params:.0%} of the parameters

| | mAP50-95 | against dense | mAP50 | parameters | seconds |
|---|---:|---:|---:|---:|---:|"""

NOTES = """
Calibration: 64 training images without labels. Recovery: {steps} steps on up to 256 of them. Trained on for \
{tuning_epochs} epochs, as the dense one was for comparison. Cut and masked network differ by at most {max_error:.0e} \
in float64. Seconds are those of a busy CPU, one thread. These runs were made while detectors had a rate of their own; \
what recovery brings since one rate serves all was not run through this script.

Made by `python examples/yolo/prune.py {command}` for each share `--macs`, and \
`python -m benchmarks.accuracy.yolo_page`. How to do it with yours: [I have a YOLO](yolo_how.md)."""


def write_page(runs: list[dict[str, Any]], page: Path = PAGE) -> Path:
    """A table for each run of the same dense network, a line for each station."""
    options = runs[0]["options"]
    one = " Digits are found, not told apart." if options["one_class"] else ""
    lines = [INTRODUCTION.format(**options, one=one)]
    for run in runs:
        lines += [
            TABLE.format(**run),
            *(_line(station, run["stations"][0]) for station in run["stations"]),
            "",
        ]
    worst = max(run["max_error"] for run in runs)
    lines += [NOTES.strip().format(**options, max_error=worst, command=_command(options))]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return page


def _line(station: dict[str, Any], dense: dict[str, Any]) -> str:
    change = "" if station is dense else f"{100 * (station['map50_95'] - dense['map50_95']):+.1f}"
    params = f"{station['params'] / 1e6:.2f} M" if "params" in station else ""
    figures = (f"{100 * station['map50_95']:.1f}", change, f"{100 * station['map50']:.1f}", params)
    seconds = f"{station['seconds']:.0f}" if station["seconds"] > 5 else ""  # less: read from a file
    return f"| {station['name']} | {' | '.join(figures)} | {seconds} |"


def _command(options: dict[str, Any]) -> str:
    words = [
        f"--{key.replace('_', '-')} {value}"
        for key, value in options.items()
        if key not in ("one_class", "macs")
    ]
    return " ".join([*words, *["--one-class"] * options["one_class"]])


if __name__ == "__main__":
    if sys.argv[1:]:
        found = [json.loads(Path(file).read_text(encoding="utf-8")) for file in sys.argv[1:]]
        RESULT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(write_page(json.loads(RESULT.read_text(encoding="utf-8"))))

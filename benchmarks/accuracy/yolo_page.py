"""Turn benchmarks/results/yolo.json into docs/yolo.md: no figure is typed in by hand.

python examples/yolo/prune.py --out runs/yolo && cp runs/yolo/results.json benchmarks/results/yolo.json
python -m benchmarks.accuracy.yolo_page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common import DOCS, RESULTS

PAGE = DOCS / "yolo.md"
RESULT = RESULTS / "yolo.json"

INTRODUCTION = """# A YOLO, end to end

A YOLOv8n trained from nothing for {epochs} epochs on {training} photographs of 160 x 160 with handwritten digits on \
them, pruned to {macs:.0%} of its multiply-accumulates ({params:.0%} of its parameters), and repaired.{one} mAP is \
Ultralytics' own, in %, on {validation} images that share neither digits nor backgrounds with those trained on. It is \
one run with one seed, of a detector whose training is far from its end: it shows that the road can be walked, not \
what a YOLO trained on COCO would lose.

| | mAP50-95 | against dense | mAP50 | parameters | seconds |
|---|---:|---:|---:|---:|---:|"""

NOTES = """
Calibration: 64 training images without labels. Recovery: {steps} steps on up to 256 of them. Trained on for \
{tuning_epochs} epochs, as the dense one was for comparison. Cut and masked network differ by {max_error:.0e} in \
float64. Seconds are those of a busy CPU, one thread.

Made by `python examples/yolo/prune.py {command}` and `python -m benchmarks.accuracy.yolo_page`. How to do it with \
yours: [I have a YOLO](yolo_how.md)."""


def write_page(result: dict[str, Any], page: Path = PAGE) -> Path:
    """One table, a line for each station."""
    options, stations = result["options"], result["stations"]
    one = " Digits are found, not told apart." if options["one_class"] else ""
    lines = [INTRODUCTION.format(**options | {key: result[key] for key in ("macs", "params")}, one=one)]
    lines += [_line(station, stations[0]) for station in stations]
    lines += [NOTES.format(**options, max_error=result["max_error"], command=_command(options))]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return page


def _line(station: dict[str, Any], dense: dict[str, Any]) -> str:
    change = "" if station is dense else f"{100 * (station['map50_95'] - dense['map50_95']):+.1f}"
    params = f"{station['params'] / 1e6:.2f} M" if "params" in station else ""
    figures = (f"{100 * station['map50_95']:.1f}", change, f"{100 * station['map50']:.1f}", params)
    return f"| {station['name']} | {' | '.join(figures)} | {station['seconds']:.0f} |"


def _command(options: dict[str, Any]) -> str:
    words = [f"--{key.replace('_', '-')} {value}" for key, value in options.items() if key != "one_class"]
    return " ".join([*words, *["--one-class"] * options["one_class"]])


if __name__ == "__main__":
    print(write_page(json.loads(RESULT.read_text(encoding="utf-8"))))

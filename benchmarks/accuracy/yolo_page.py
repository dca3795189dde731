"""Turn benchmarks/results/yolo.json into docs/yolo.md: no figure is typed in by hand.

python examples/yolo/prune.py --out runs/yolo_digits && cp runs/yolo_digits/results.json benchmarks/results/yolo.json
python -m benchmarks.accuracy.yolo_page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common import DOCS, RESULTS

PAGE = DOCS / "yolo.md"
RESULT = RESULTS / "yolo.json"


def write_page(result: dict[str, Any], page: Path = PAGE) -> Path:
    """One table, a line for each station."""
    options, stations = result["options"], result["stations"]
    dense = stations[0]
    lines = [
        "# A YOLO, end to end",
        "",
        f"A YOLOv8n trained from nothing on {options['training']} photographs of 160 x 160 with handwritten digits on them for "
        f"{options['epochs']} epochs, pruned to {result['macs']:.0%} of its multiply-accumulates ({result['params']:.0%} of its "
        "parameters), and repaired. "
        + ("Digits are found, not told apart. " if options["one_class"] else "")
        + f"mAP is Ultralytics' own, on {options['validation']} images that share neither digits nor backgrounds with those "
        "trained on. It is one run with one seed, of a detector whose training is far from its end: it shows that the road can be "
        "walked, and how far apart its stations are, not what a YOLO trained on COCO would lose.",
        "",
        "| | mAP50-95 | against dense | mAP50 | parameters | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for station in stations:
        params = f"{station['params'] / 1e6:.2f} M" if "params" in station else ""
        change = "" if station is dense else f"{100 * (station['map50_95'] - dense['map50_95']):+.1f}"
        lines.append(
            f"| {station['name']} | {100 * station['map50_95']:.1f} | {change} | {100 * station['map50']:.1f} | {params} | "
            f"{station['seconds']:.0f} |"
        )
    lines += [
        "",
        f"Calibration: 64 training images without labels; recovery: {options['steps']} steps on 200 or more; trained on for "
        f"{options['tuning_epochs']} epochs, as was the dense one for comparison. Cut and masked network differed by "
        f"{result['max_error']:.0e} in float64. Seconds are of a shared CPU, one thread.",
        "",
        "Made by `python examples/yolo/prune.py` with "
        + " ".join(f"`--{key.replace('_', '-')} {value}`" for key, value in options.items())
        + " and `python -m benchmarks.accuracy.yolo_page`. How to do it with yours: [I have a YOLO](yolo_how.md).",
    ]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return page


if __name__ == "__main__":
    print(write_page(json.loads(RESULT.read_text(encoding="utf-8"))))

"""Turn benchmarks/results/yolo.json into docs/yolo.md: no figure is typed in by hand.

Run `python examples/yolo/prune.py --out runs/yolo`, then
`python -m benchmarks.accuracy.yolo_page runs/yolo/results.json [the same of further shares and draws]`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common import DOCS, RESULTS
from benchmarks.pages import spread, table

PAGE = DOCS / "yolo.md"
RESULT = RESULTS / "yolo.json"
Run = dict[str, Any]

INTRODUCTION = """# A YOLO, end to end

A YOLOv8n trained from nothing for {epochs} epochs on {training} photographs of 160 x 160 with handwritten digits on \
them, pruned, and repaired.{one} mAP is \
Ultralytics' own, in %, on {validation} images that share neither digits nor backgrounds with those trained on. It is \
one dense detector, whose training is far from its end: it shows that the road can be walked, not \
what a YOLO trained on COCO would lose, which has 80 things to find. What comes after it has draws of its own, of \
calibration images, of recovery's batches and of the order of training: mean ± standard deviation over them, where \
there are several.
"""

TABLE = """## To {macs:.0%} of the multiply-accumulates, {params:.0%} of the parameters, {draws}
"""

NOTES = """
Calibration: 64 training images without labels. Recovery: {steps} steps on up to 256 of them. Trained on for \
{tuning_epochs} epochs by AdamW at a rate of 1e-4 without warm-up, which was chosen on the first draw, as the dense \
one was for comparison. Cut and masked network differ by at most {max_error:.0e} in float64. Seconds are those of a \
busy CPU, one thread.

Made by `python examples/yolo/prune.py {command}` for each share `--macs` and each `--draw`, and \
`python -m benchmarks.accuracy.yolo_page`. How to do it with yours: [I have a YOLO](yolo_how.md)."""


def write_page(runs: Sequence[Run], page: Path = PAGE) -> Path:
    """A table for each share of the same dense network, a line for each station."""
    options = runs[0]["options"]
    one = " Digits are found, not told apart." if options["one_class"] else ""
    parts = [INTRODUCTION.format(**options, one=one)]
    for share in dict.fromkeys(run["options"]["macs"] for run in runs):
        parts += [*_section([run for run in runs if run["options"]["macs"] == share]), ""]
    worst = max(run["max_error"] for run in runs)
    parts += [NOTES.strip().format(**options, max_error=worst, command=_command(options))]
    page.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return page


def _section(draws: Sequence[Run]) -> list[str]:
    """The draws of one share."""
    count = f"{len(draws)} draws" if len(draws) > 1 else "one draw"
    facts = {key: mean(run[key] for run in draws) for key in ("macs", "params")}
    heads = ["", "mAP50-95", "against dense", "mAP50", "parameters", "seconds"]
    stations = zip(*(run["stations"] for run in draws), strict=True)
    dense = [run["stations"][0] for run in draws]
    return [TABLE.format(**facts, draws=count), table(heads, (_row(same, dense) for same in stations))]


def _row(draws: Sequence[Run], dense: Sequence[Run]) -> list[str]:
    """One station, of all draws."""
    name = draws[0]["name"]

    def share(key: str) -> str:
        values = [100 * run[key] for run in draws]
        values = values[:1] if name.startswith("dense") else values  # the same in all draws
        return spread(values, 1, len(values))

    change = [now["map50_95"] - before["map50_95"] for now, before in zip(draws, dense, strict=True)]
    params = f"{mean(run['params'] for run in draws) / 1e6:.2f} M" if "params" in draws[0] else ""
    seconds = mean(run["seconds"] for run in draws)
    return [
        name,
        share("map50_95"),
        "" if name == "dense" else f"{100 * mean(change):+.1f}",
        share("map50"),
        params,
        f"{seconds:.0f}" if seconds > 5 else "",  # less: read from a file
    ]


def _command(options: dict[str, Any]) -> str:
    words = [
        f"--{key.replace('_', '-')} {value}"
        for key, value in options.items()
        if key not in ("one_class", "macs", "draw")
    ]
    return " ".join([*words, *["--one-class"] * options["one_class"]])


if __name__ == "__main__":
    if sys.argv[1:]:
        found = [json.loads(Path(file).read_text(encoding="utf-8")) for file in sys.argv[1:]]
        RESULT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(write_page(json.loads(RESULT.read_text(encoding="utf-8"))))

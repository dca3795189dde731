"""Show what a sweep found in docs/sweeps.md: a table and a plot from the sweep.json that `sweep` wrote.

python -m benchmarks.sparse_training.sweep --data FOLDER
python -m benchmarks.sparse_training.sweep_page runs/sweep/sweep.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common import DOCS, RESULTS
from benchmarks.sparse_training.sweep import Row, kept, plot
from ss_pruning._utils.files import write_text

PAGE = DOCS / "sweeps.md"
BEGIN, END = "<!-- sweep -->", "<!-- /sweep -->"


def block(result: dict[str, Any]) -> list[str]:
    """The part of the page between the markers."""
    rows: list[Row] = result["rows"]
    chosen = result["options"]
    versions = ", ".join(f"{name} {text}" for name, text in result["versions"].items())
    images = f"{chosen['images']:,} images" if chosen["images"] else "all images"
    lines = [
        f"A sweep as it came out: {chosen['net']} at width {chosen['width']:g} on {chosen['dataset']}, "
        f"{chosen['epochs']} epochs on {images}, {chosen['finetune_epochs']} of fine-tuning, one "
        "seed. Top-1 on the test images, in %.",
        "",
        "![top-1 against the share that is gone](sweep.svg)",
        "",
        "| penalty | criterion | synapses gone | trained | pruned | fine-tuned | MACs left | parameters left |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        tops = " | ".join(f"{row['top1'][name]:.2f}" for name in ("trained", "pruned", "fine-tuned"))
        left = " | ".join(f"{kept(row, what):.3f}" for what in ("macs", "params"))
        lines.append(f"| {row['weight']:g} | {row['criterion']} | {row['sparsity']:.0%} | {tops} | {left} |")
    return [
        *lines,
        "",
        "Made by `python -m benchmarks.sparse_training.sweep` and "
        f"`python -m benchmarks.sparse_training.sweep_page` ({versions}).",
    ]


def write_page(result: dict[str, Any], page: Path = PAGE) -> Path:
    """Rewrite what stands between the markers, and the plot."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} lacks the markers {BEGIN} and {END}")
    plot(result["rows"], page.with_name("sweep.svg"))
    write_text(page, before + begin + "\n" + "\n".join(block(result)) + "\n" + end + after)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("result", type=Path, nargs="?", default=RESULTS / "sweep.json", metavar="FILE")
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    write_text(RESULTS / "sweep.json", json.dumps(result, indent=2) + "\n")
    print(f"written: {write_page(result)}")


if __name__ == "__main__":
    main()

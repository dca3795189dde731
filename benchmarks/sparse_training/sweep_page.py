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
from benchmarks.pages import figure, render, table, write_part
from ss_pruning._utils.files import write_text

PAGE = DOCS / "sweeps.md"
HEADS = (
    *("penalty", "criterion", "synapses gone", "trained", "pruned", "fine-tuned"),
    *("MACs left", "parameters left"),
)
Row = dict[str, Any]


def kept(row: Row, what: str) -> float:
    """The share of parameters or MACs that is left."""
    return float(row["after"][what] / row["before"][what])


def make_page(result: dict[str, Any], page: Path = PAGE) -> Path:
    """Rewrite what stands between the markers, and the plot."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    cells = table(HEADS, map(_row, result["rows"]), "rl")
    write_part(page, "sweep", render("sweep", table=cells, versions=versions, **result["options"]))
    plot(result["rows"], page.with_name("sweep.svg"))
    return page


def _row(row: Row) -> list[str]:
    tops = (f"{row['top1'][name]:.2f}" for name in ("trained", "pruned", "fine-tuned"))
    left = (f"{kept(row, what):.3f}" for what in ("macs", "params"))
    return [f"{row['weight']:g}", row["criterion"], f"{row['sparsity']:.0%}", *tops, *left]


def plot(rows: list[Row], path: Path) -> None:
    """One picture for each penalty weight: top-1 after fine-tuning against the share of synapses that is gone."""
    weights = sorted({row["weight"] for row in rows})
    size = (1.5 + 3 * len(weights), 3)
    with figure(path, columns=len(weights), sharey=True, figsize=size) as (_, (panels,)):
        for axes, weight in zip(panels, weights, strict=True):
            _draw(axes, [row for row in rows if row["weight"] == weight])
        panels[0].set_ylabel("top-1 after fine-tuning, %")
        panels[-1].legend()


def _draw(axes: Any, rows: list[Row]) -> None:
    for criterion in dict.fromkeys(row["criterion"] for row in rows):
        of = [row for row in rows if row["criterion"] == criterion]
        points = sorted((row["sparsity"], row["top1"]["fine-tuned"]) for row in of)
        axes.plot(*zip(*points, strict=True), marker="o", label=criterion)
    axes.axhline(rows[0]["top1"]["trained"], color="0.5", linestyle=":", label="not pruned")
    axes.set(title=f"penalty {rows[0]['weight']:g}", xlabel="share of the synapses gone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("result", type=Path, nargs="?", default=RESULTS / "sweep.json", metavar="FILE")
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    write_text(RESULTS / "sweep.json", json.dumps(result, indent=2) + "\n")
    print(f"written: {make_page(result)}")


if __name__ == "__main__":
    main()

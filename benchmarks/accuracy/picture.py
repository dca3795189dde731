"""The picture on top of the README: accuracy against time, of dense nets and of nets pruned to several budgets.

    python -m benchmarks.accuracy.picture          # prunes, measures, draws docs/readme.svg
    python -m benchmarks.accuracy.picture --draw   # draws again from benchmarks/results/picture.json

Nothing is trained after the cut. One thread; times of dense and pruned are taken in turns, see `measure_latency`.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import DATA, DOCS, RESULTS, write
from benchmarks.data.cifar import as_input, draw, load, top1
from benchmarks.data.models import load_net
from ss_pruning import measure_latency, prune_

NETS = ("resnet20", "resnet56", "vgg16bn")
BUDGETS = (0.8, 0.65, 0.5, 0.4)
#: By what is drawn, what `prune_` is asked for beside the budget.
WAYS: dict[str, dict[str, Any]] = {
    "weight magnitude, cut": {"importance": "magnitude", "allocation": "global"},
    "ss-pruning, 512 unlabelled images": {"compensation": "reconstruct"},
}
BATCH, IMAGES, CALIBRATION = 64, 10_000, 512


def measured(net: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One line for the dense net and for each way and budget."""
    dense = load_net(net, options.data, options.weights)
    tested = draw(load(options.data, "test"), options.images, seed=0)
    images = as_input(draw(load(options.data, "train"), CALIBRATION, 0)[0])
    batch = images[:BATCH]
    lines: list[dict[str, Any]] = [{"net": net, "way": "dense", "time": 1.0, "top1": top1(dense, tested)}]
    for way, asked in WAYS.items():
        for budget in BUDGETS:
            small: nn.Module = copy.deepcopy(dense)
            calibration = images if "compensation" in asked else None
            prune_(small, images[:1], macs=budget, calibration=calibration, **asked)
            before, after = measure_latency([dense, small], batch, precision=0.02, rounds=(7, 25))
            line = {
                "net": net,
                "way": way,
                "macs": budget,
                "time": after.over(before),
                "top1": top1(small, tested),
            }
            print(line, flush=True)
            lines.append(line)
    return lines


def draw_picture(lines: list[dict[str, Any]], path: Path) -> None:
    """One panel a net, one curve a way, the dense net as a dot."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "ss-pruning", "svg.fonttype": "none", "font.size": 9})
    size = 5.4, 3.2  # inches: no wider, or a phone makes the letters too small
    figure, axes = pyplot.subplots(1, len(NETS), figsize=size, sharey=True, layout="constrained")
    for axis, net in zip(axes, NETS, strict=True):
        own = [line for line in lines if line["net"] == net]
        dense = next(line for line in own if line["way"] == "dense")
        for way, style in zip(WAYS, ("C7o--", "C0o-"), strict=True):
            points = sorted((line["time"], line["top1"]) for line in own if line["way"] == way)
            axis.plot(*zip(*points, (1.0, dense["top1"]), strict=True), style, label=way, markersize=4)
        axis.plot(1.0, dense["top1"], "ko", label="dense", markersize=5)
        axis.set(title=net, xlim=(0.3, 1.08), xticks=(0.4, 0.6, 0.8, 1.0), ylim=(0, 100))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1 in %, not fine-tuned")
    figure.supxlabel("time of a forward pass, dense = 1 (CIFAR-10)", fontsize="medium")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw what was measured")
    parser.add_argument("--images", type=int, default=IMAGES, help="test images")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--weights", type=Path, default=Path("runs"))
    options = parser.parse_args()
    if not options.draw:
        torch.set_num_threads(1)
        lines = [line for net in NETS for line in measured(net, options)]
        write(
            "picture", {"batch": BATCH, "images": options.images, "calibration": CALIBRATION, "lines": lines}
        )
    draw_picture(json.loads((RESULTS / "picture.json").read_text())["lines"], DOCS / "readme.svg")


if __name__ == "__main__":
    main()

"""Whether the defaults hold on nets that had no say in them: top-1 of small nets of other kinds, right after the cut.

    OMP_NUM_THREADS=1 python -m benchmarks.accuracy.defaults --weights runs
    OMP_NUM_THREADS=1 python -m benchmarks.accuracy.defaults --nets closure44 --importances default

Nothing is set but compensation, calibration and importance. Each run is a line of benchmarks/results/defaults.jsonl,
and what is there is not run again; docs/defaults.md is made of all lines. `benchmarks.data.small_nets` trains the nets.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.accuracy.sensitivity import rank_correlation
from benchmarks.common import DATA, DOCS, RESULTS, add_line, made_on, read_lines, versions
from benchmarks.data.cifar import Images, as_input, draw, load, top1
from benchmarks.data.models import load_net
from benchmarks.data.small_nets import CONFIRMING
from benchmarks.pages import table, write_page
from ss_pruning import prune_
from ss_pruning.graph.layers import has_statistics

#: Compensation and calibration.
WAYS = (
    "none", "mean", "mean, synthetic", "none, images", "mean, images", "linear, images", "reconstruct, images",
)  # fmt: skip
BUDGETS = (0.7, 0.5)
IMAGES, EXAMPLE, DEFAULT = 512, (1, 3, 32, 32), "default"
RIVALS = ("magnitude", "bn-scale", "lamp", "fpgm")
KINDS = {
    "closure44": "a ResNet whose shortcuts are padded inside a closure",
    "shuffle29": "a ShuffleNet",
    "gated20": "a ResNet with gates",
    "bottleneck68": "a ResNet of bottlenecks, 68 layers deep",
    "groupnorm20": "a ResNet with group norms",
    "conv_tokens4": "a convolutional stem in front of four ViT blocks",
}
#: Whatever was chosen was chosen elsewhere.
NETS = (*CONFIRMING, "conv_tokens4")
PATH = RESULTS / "defaults.jsonl"
Line = dict[str, Any]


def run(model: nn.Module, tested: Images, images: Images, macs: float, way: str, importance: str) -> Line:
    """Cut a copy as `prune_` does by default, and see what is left."""
    compensation, _, calibration = way.partition(", ")
    given = {"": None, "images": as_input(images[0]), "synthetic": "synthetic"}[calibration]
    small, began = copy.deepcopy(model), time.process_time()
    report = prune_(
        small,
        torch.zeros(EXAMPLE),
        macs=macs,
        compensation=compensation,
        calibration=given,
        importance=None if importance == DEFAULT else importance,
    )
    seconds = time.process_time() - began
    fidelity = None if report.fidelity is None or report.fidelity.synthetic else report.fidelity
    return {
        "top1": top1(small.eval(), tested),
        "agreement": None if fidelity is None else fidelity.agreement,
        "error": None if fidelity is None else fidelity.error,
        "seconds": round(seconds, 2),
    }


def main() -> int:
    """Run what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nets", nargs="+", default=list(NETS))
    parser.add_argument("--importances", nargs="+", default=[DEFAULT, *RIVALS])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--macs", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="draws of calibration images")
    parser.add_argument("--images", type=int, default=2000, help="test images")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--weights", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=PATH)
    options = parser.parse_args()
    train, tested = load(options.data, "train"), draw(load(options.data, "test"), options.images, 0)
    points = itertools.product(options.nets, options.seeds, options.macs, options.importances, options.ways)
    done = {_point(line) for line in read_lines(options.results)}
    models: dict[str, tuple[nn.Module, float]] = {}
    for point in points:
        net, seed, macs, importance, way = point
        if point in done or (seed and not way.endswith("images")):
            continue
        if net not in models:
            model = load_net(net, options.data, options.weights)
            models[net] = model, top1(model, tested)
        model, dense = models[net]
        if way.endswith("synthetic") and not any(map(has_statistics, model.modules())):
            continue  # there is nothing to make images from
        found = run(model, tested, draw(train, IMAGES, seed), macs, way, importance)
        line = {"net": net, "seed": seed, "macs": macs, "importance": importance, "way": way, **found}
        line |= {"dense": dense, "images": options.images, "versions": versions()}
        add_line(line, options.results)
        print(
            f"{net}, {macs:.0%}, {way}, {importance}: {found['top1']:.2f}, {found['seconds']} s", flush=True
        )
    if options.results == PATH:
        write(read_lines(PATH))
    return 0


def _point(line: Line) -> tuple[str, int, float, str, str]:
    return line["net"], line["seed"], line["macs"], line["importance"], line["way"]


def write(lines: list[Line], page: Path = DOCS / "defaults.md") -> Path:
    """docs/defaults.md: nets that had no say, ours beside the best of the other importances."""
    confirmed = [line for line in lines if line["net"] in NETS]
    return write_page(
        page,
        "defaults",
        images=max(line["images"] for line in confirmed),
        calibration=IMAGES,
        kinds=", ".join(kind for net, kind in KINDS.items() if any(line["net"] == net for line in confirmed)),
        versions=made_on(confirmed),
        sections=[
            (macs, _table([line for line in confirmed if line["macs"] == macs]))
            for macs in sorted({line["macs"] for line in confirmed}, reverse=True)
        ],
        others=", ".join(sorted({line["importance"] for line in confirmed} - {DEFAULT})),
        orders=_orders(confirmed),
        predicted=_predicted(confirmed),
        runs=len(confirmed),
    )


def _means(lines: Iterable[Line]) -> Mapping[tuple[str, str, str], float]:
    """By net, way and importance, over seeds."""
    found = defaultdict(list)
    for line in lines:
        found[line["net"], line["way"], line["importance"]].append(line["top1"])
    return {key: statistics.mean(values) for key, values in found.items()}


def _table(lines: list[Line]) -> str:
    """A net a column; in a cell ours, and the best of the others."""
    means, dense = _means(lines), {line["net"]: line["dense"] for line in lines}
    ways = [way for way in WAYS if any(key[1] == way for key in means)]

    def cell(net: str, way: str) -> str:
        ours = means.get((net, way, DEFAULT))
        others = {i: value for (n, w, i), value in means.items() if (n, w) == (net, way) and i != DEFAULT}
        if ours is None:
            return ""
        if not others:
            return f"{ours:.1f}"
        best = max(others, key=others.__getitem__)
        text = f"**{ours:.1f}**" if ours >= others[best] else f"{ours:.1f}"
        return f"{text} / {others[best]:.1f} ({best})"

    rows = [[way, *(cell(net, way) for net in dense)] for way in ways]
    return table(["", *dense], [["dense", *(f"{top:.1f}" for top in dense.values())], *rows])


def _orders(lines: list[Line]) -> list[tuple[str, int, int, float]]:
    """What should be no worse than what: in how many cells it holds, of how many, and the most that is missing."""
    ours = {
        (*key, macs): v
        for macs in BUDGETS
        for key, v in _means(_of(lines, macs)).items()
        if key[2] == DEFAULT
    }
    found = []
    for better, worse, slack in (
        ("mean", "none", 1.0),
        ("mean, synthetic", "none", 1.0),
        ("linear, images", "none, images", 0.5),
        ("reconstruct, images", "linear, images", 0.5),
    ):
        gaps = [
            ours[net, better, i, macs] - value + slack
            for (net, way, i, macs), value in ours.items()
            if way == worse and (net, better, i, macs) in ours
        ]
        if gaps:
            text = f"{better} >= {worse} - {slack:g}"
            found.append((text, sum(gap >= 0 for gap in gaps), len(gaps), max(0.0, -min(gaps))))
    return found


def _of(lines: list[Line], macs: float) -> list[Line]:
    return [line for line in lines if line["macs"] == macs]


def _predicted(lines: list[Line]) -> tuple[int, float, float] | None:
    """Over all runs with images: how many, and how agreement and output error rank with the accuracy that is lost."""
    told = [line for line in lines if line["agreement"] is not None]
    if len(told) < 3:
        return None
    lost = torch.tensor([line["dense"] - line["top1"] for line in told]).double().numpy()
    agreement = torch.tensor([1 - line["agreement"] for line in told]).double().numpy()
    error = torch.tensor([line["error"] for line in told]).double().numpy()
    return len(told), rank_correlation(agreement, lost), rank_correlation(error, lost)


if __name__ == "__main__":
    sys.exit(main())

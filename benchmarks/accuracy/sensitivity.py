"""How well sensitivity is predicted: local error in closed form and two measured widths, against damage elsewhere.

Every group of a model, cut by itself to three widths with the linear compensation: the share of the output's variance
that is lost on test images, against what `allocation="sensitivity"` predicts from calibration images. Beside it the
local error alone, and the measurement of each width on 32 images, which was the way before.

    OMP_NUM_THREADS=1 python -m benchmarks.accuracy.sensitivity
    OMP_NUM_THREADS=1 python -m benchmarks.accuracy.sensitivity --nets resnet20
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import DATA, DOCS, RESULTS, write
from benchmarks.data.cifar import as_input, draw, load
from benchmarks.data.models import load_net
from ss_pruning._utils.arrays import Floats
from ss_pruning.graph.groups import couple
from ss_pruning.graph.tracing import trace
from ss_pruning.importance import sensitivity
from ss_pruning.importance.activation_stats import measure
from ss_pruning.importance.batched_ablation import BatchedAblation
from ss_pruning.importance.scoring import SubgroupGraph, subgroup_scores
from ss_pruning.importance.synaptic import SynapticImportance

WIDTHS = (0.25, 0.5, 0.75)
CALIBRATION, TEST, BEFORE = 512, 128, 32
BATCH, MAX_RATIO = 64, 0.9


def rank_correlation(a: Floats, b: Floats) -> float:
    """Spearman's."""
    ranks = [np.argsort(np.argsort(values.ravel())) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def row(net: str, data: Path, weights: Path) -> dict[str, Any]:
    """Rank correlations of one net, and what the predictions took."""
    model = load_net(net, data, weights)
    train, test = load(data, "train"), load(data, "test")
    x, unseen = as_input(draw(train, CALIBRATION, 0)[0]), as_input(draw(test, TEST, 0)[0])
    connectivity = trace(model, x[:1])
    groups = couple(connectivity, model).groups
    importance = SynapticImportance(statistics=x.split(BATCH), conditional=1.0)
    graph = SubgroupGraph(model, x[:1], connectivity)
    scored = iter(subgroup_scores(importance, [s for group in groups for s in group.subgroups], graph))
    scores = [[next(scored).numpy() for _ in group.subgroups] for group in groups]
    paths = list(dict.fromkeys(p for group in groups for p in sensitivity._consumers(group, connectivity)))
    statistics = measure(model, connectivity, x.split(BATCH), None, paths, covariance=True)

    def ablation(images: Any) -> BatchedAblation:
        return BatchedAblation(model, connectivity, images, statistics, "linear", follow=True)

    truth = ablation(unseen)
    shrinkages = [
        sensitivity._shrinkage(truth, group, subgroups, MAX_RATIO)
        for group, subgroups in zip(groups, scores, strict=True)
    ]
    steps = [[max(1, round(w * len(s.scores))) for w in WIDTHS] for s in shrinkages]

    def measured(lab: BatchedAblation) -> Floats:
        pairs = zip(shrinkages, steps, strict=True)
        return np.array([lab.sensitivity([s.cut(n) for n in counts]) for s, counts in pairs])

    began = time.process_time()
    few = ablation(x[: sensitivity.QUICK.images])
    found = sensitivity._measured(few, shrinkages, [0] * len(groups), lambda done: None)
    predicted = np.array(
        [_sums(parts, s, counts) for parts, s, counts in zip(found, shrinkages, steps, strict=True)]
    )
    seconds = time.process_time() - began
    began = time.process_time()
    before = measured(ablation(x[:BEFORE]))
    seconds_before = (time.process_time() - began) * 5 / len(WIDTHS)  # it was done at five widths
    true = measured(truth)
    local = np.array([[s.error[n - 1] for n in counts] for s, counts in zip(shrinkages, steps, strict=True)])
    return {
        "net": net, "groups": len(groups), "points": true.size,
        "local": rank_correlation(local, true), "predicted": rank_correlation(predicted, true),
        "measured": rank_correlation(before, true), "seconds": seconds, "seconds_before": seconds_before,
    }  # fmt: skip


def _sums(parts: Sequence[Floats], shrinkage: Any, counts: Sequence[int]) -> Floats:
    """`[counts]`: what the first steps of a group add to output error, as they compete by it."""
    by_step = [
        p[r].reshape(len(shrinkage.scores), -1).sum(1) for p, r in zip(parts, shrinkage.ranks, strict=True)
    ]
    summed: Floats = np.sum(by_step, axis=0).cumsum()[np.array(counts) - 1]
    return summed


PAGE = """# How well sensitivity is predicted

Output error of every group of a model, cut by itself to 25, 50 and 75 % of its channels with the linear compensation,
on {test} test images: Spearman's rank correlation with what is predicted from calibration images.

- *Local error*: the closed form alone.
- *Predicted*: the closed form and two widths measured on {images} images, as `allocation="sensitivity"` does it.
- *Measured*: each width by itself on {before} images, as it was done before.

Seconds are CPU seconds of one thread, without the covariances, which both need; before, five widths were measured.
`python -m benchmarks.accuracy.sensitivity` makes this page.

| net | groups | points | local error | predicted | measured | s | s before |
|---|---:|---:|---:|---:|---:|---:|---:|
"""
LINE = (
    "| {net} | {groups} | {points} | {local:.3f} | {predicted:.3f} | {measured:.3f} | {seconds:.1f} "
    "| {seconds_before:.1f} |\n"
)


def page(rows: Sequence[dict[str, Any]]) -> str:
    """docs/sensitivity.md."""
    head = PAGE.format(test=TEST, images=sensitivity.QUICK.images, before=BEFORE)
    return head + "".join(LINE.format(**r) for r in rows)


@torch.no_grad()
def main() -> int:
    """Measure the nets that were asked for, and write the page from all that were ever measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nets", nargs="+", default=["resnet20", "vgg16bn", "resnet56"])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--weights", type=Path, default=Path("runs"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "sensitivity.json"
    rows = {r["net"]: r for r in json.loads(path.read_text())["nets"]} if path.is_file() else {}
    for net in options.nets:
        rows[net] = row(net, options.data, options.weights)
        print(json.dumps(rows[net]), flush=True)
        write("sensitivity", {"nets": list(rows.values())})
    (DOCS / "sensitivity.md").write_text(page(list(rows.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Turn benchmarks/results/study.jsonl into docs/study.md and its plots: no figure is typed in by hand."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import DOCS
from benchmarks.pages import spread
from benchmarks.sparse_training.paper import CRITERIA
from benchmarks.sparse_training.run import (
    EPOCHS,
    NETS,
    QUANTILES,
    SMALL,
    SMALL_EPOCHS,
    SWEEP,
    TUNING_EPOCHS,
    WEIGHT,
)

PAGE = DOCS / "study.md"
PUBLISHED = Path(__file__).with_name("published.json")
Line = dict[str, Any]

INTRODUCTION = f"""# Sparse training on synaptic strength: a study

What happens when a net is trained with a penalty on its synaptic strengths, loses most of its synapses and is \
fine-tuned: the method of Lin et al. (NeurIPS 2018), at sizes that one CPU core trains in minutes. Their penalty \
weight, threshold and schedule are not known to us, so **nothing here is their result or disputes it**. Nets: \
VGG-16-BN with a quarter, ResNet-18 with an eighth of the usual width; CIFAR-10; {EPOCHS} epochs of SGD (one cycle, \
largest rate 0.1), {TUNING_EPOCHS} of fine-tuning, the same for every criterion. Accuracies are those after the last \
epoch, not of the best one, on all 10,000 test images; ± is the standard deviation over seeds. First layers and \
classifiers stay whole and do not count.

Made by `python -m benchmarks.sparse_training.run` and `python -m benchmarks.sparse_training.run --page` from \
`benchmarks/results/study.jsonl`. \
The recipe with options: `benchmarks/sparse_training/paper.py`.
"""


def write_page(lines: list[Line], page: Path = PAGE) -> Path:
    """Write text, tables and plots; sections without a result say so."""
    latest = list({line["name"]: line for line in lines}.values())
    if not latest:
        raise SystemExit("no result yet: run python -m benchmarks.sparse_training.run first")
    parts = [INTRODUCTION, f"Versions: {', '.join(f'{k} {v}' for k, v in latest[-1]['versions'].items())}.\n"]
    for part in NETS:
        parts += main_section(part, [line for line in latest if line["part"] == part])
    small = f"VGG-16-BN with {SMALL['width']:g} of the width, {SMALL_EPOCHS} epochs"
    parts += lambda_section(_of(latest, "lambda"), small, page)
    parts += depth_section(latest, page)
    parts += task_section(latest, small, page)
    parts += criteria_section(latest, small)
    parts += entropy_section(latest)
    parts += regulariser_section(latest)
    parts += published_section()
    page.write_text("\n".join(parts) + "\n")
    return page


def _of(lines: list[Line], part: str) -> list[Line]:
    return [line for line in lines if line["part"] == part]


def _is(line: Line, **values: Any) -> bool:
    return all(line.get(key) == value for key, value in values.items())


def _by_seed(lines: Iterable[Line], what: str, **values: Any) -> dict[int, float]:
    chosen = [line for line in lines if _is(line, **values) and line.get(what) is not None]
    return {line["recipe"]["seed"]: line[what] for line in chosen}


def _values(lines: Iterable[Line], what: str, **values: Any) -> list[float]:
    """One value a seed."""
    return list(_by_seed(lines, what, **values).values())


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "|---|" + "---:|" * (len(head) - 1),
        *(f"| {' | '.join(r)} |" for r in rows),
        "",
    ]


def _seeds(values: list[float]) -> str:
    return spread(values) or "not run"


def _gap(lines: list[Line], base: dict[int, float], **values: Any) -> float | None:
    """The mean difference to `base` after fine-tuning, over the seeds that both have."""
    mine = _by_seed(lines, "top1_tuned", **values)
    gaps = [value - base[seed] for seed, value in mine.items() if seed in base]
    return statistics.mean(gaps) if gaps else None


def _over(base: dict[int, float], mine: dict[int, float]) -> str:
    """The mean difference to `base`, over the seeds that both have."""
    gaps = [value - base[seed] for seed, value in mine.items() if seed in base]
    return f"{statistics.mean(gaps):+.2f}" if gaps else ""


def main_section(part: str, lines: list[Line]) -> list[str]:
    """Accuracy at each sparsity, ours and rivals; what compaction leaves."""
    net, width, sparsities = NETS[part]
    title = f"## {net}, width {width:g}: how many synapses can go"
    if not lines:
        return [title, "", "Not run yet.", ""]
    shorter = _shorter(lines, sparsities[0])
    lines = [line for line in lines if line.get("epochs", 0) in (0, TUNING_EPOCHS)]
    by_layer = [line for line in lines if line.get("scope") == "layer"]
    dense = [line for line in lines if not line["weight"] and line not in by_layer]
    ours = [line for line in lines if line["weight"] == WEIGHT]
    base = _by_seed(dense, "top1_tuned", criterion="strength", sparsity=0.0)
    as_trained = [[line for line in some if "criterion" not in line] for some in (dense, ours)]
    start = _by_seed(as_trained[0], "top1")
    rows = [
        ["dense, as trained", "", _seeds(list(start.values())), "0", ""],
        ["dense, fine-tuned as long", "0 %", _seeds(list(base.values())), _over(start, base), "0"],
        ["trained with the penalty", "0 %", _seeds(_values(as_trained[1], "top1")), "", ""],
    ]
    runs = [(f"with the penalty, strength, {TUNING_EPOCHS} epochs", ours, "strength", s) for s in sparsities]
    runs += [
        (f"without, {name}, {TUNING_EPOCHS} epochs", dense, name, sparsities[0])
        for name in ("kernel norm", "random")
    ]
    if by_layer:
        label = f"without, kernel norm by layer, {TUNING_EPOCHS} epochs"
        runs.append((label, by_layer, "kernel norm", sparsities[0]))
    for label, some, criterion, sparsity in runs:
        at = {"criterion": criterion, "sparsity": sparsity}
        top = _seeds(_values(some, "top1_tuned", **at))
        mine = _by_seed(some, "top1_tuned", **at)
        rows.append([label, f"{sparsity:.0%}", top, _over(start, mine), _over(base, mine)])
    text = [
        title,
        "",
        f"Penalty weight {WEIGHT:g}; differences go seed by seed: to the dense net as it was trained, and to the "
        f"one that was fine-tuned as long as the pruned ones, since {EPOCHS} epochs leave room. Synapses of all "
        "layers are ranked together, unless it says by layer; where that takes a whole layer, the net is at 10 %.",
        "",
    ]
    text += _table(
        ["net", "synapses removed", "top-1 %", "against as trained", "against tuned as long"], rows
    )
    text += shorter + _highest(ours, base, sparsities)
    return text + _untuned(dense, ours, sparsities[0]) + _compaction(ours, sparsities)


def _untuned(dense: list[Line], ours: list[Line], sparsity: float) -> list[str]:
    """What each criterion leaves before any fine-tuning."""
    rows = []
    for name in CRITERIA:
        at = {"criterion": name, "sparsity": sparsity, "epochs": 0}
        rows.append([name, *(_seeds(_values(some, "top1", **at)) for some in (dense, ours))])
    head = ["criterion", "trained without the penalty", "trained with it"]
    return [f"Before fine-tuning, {sparsity:.0%} removed, top-1 %:", "", *_table(head, rows)]


def _shorter(lines: list[Line], sparsity: float) -> list[str]:
    """The same after fewer epochs of fine-tuning, where that was run."""
    text = []
    for epochs in sorted({line.get("epochs", 0) for line in lines} - {0, TUNING_EPOCHS}):
        at = [line for line in lines if line.get("epochs") == epochs]
        base = _by_seed(at, "top1_tuned", criterion="strength", sparsity=0.0)
        ours = {"criterion": "strength", "sparsity": sparsity, "weight": WEIGHT}
        gap = _gap(at, base, **ours)
        if gap is not None:
            top = _seeds(_values(at, "top1_tuned", **ours))
            text.append(
                f"With {epochs} epochs of fine-tuning instead, for both: {top} at {sparsity:.0%}, {gap:+.2f}.\n"
            )
    return text


def _highest(ours: list[Line], base: dict[int, float], sparsities: tuple[float, ...]) -> list[str]:
    gaps = {sparsity: _gap(ours, base, criterion="strength", sparsity=sparsity) for sparsity in sparsities}
    kept = [sparsity for sparsity, gap in gaps.items() if gap is not None and gap >= -1]
    found = f"{max(kept):.0%}" if kept else "none"
    tried = ", ".join(f"{sparsity:.0%}" for sparsity, gap in gaps.items() if gap is not None)
    return [
        f"The highest sparsity tried ({tried}) that stays within 1 point, mean over seeds: **{found}**.",
        "",
    ]


def _compaction(ours: list[Line], sparsities: tuple[float, ...]) -> list[str]:
    def share(what: Callable[[Line], float]) -> Callable[[float], str]:
        def text(sparsity: float) -> str:
            at = {"criterion": "strength", "sparsity": sparsity}
            values = [100 * what(line) for line in ours if _is(line, **at) and "after" in line]
            return _seeds(values)

        return text

    columns: list[tuple[str, Callable[[float], str]]] = [
        ("parameters %", share(lambda line: line["after"]["params"] / line["before"]["params"])),
        ("MACs %", share(lambda line: line["after"]["macs"] / line["before"]["macs"])),
        (
            "MACs over living synapses %",
            share(lambda line: line["after"]["living_macs"] / line["before"]["macs"]),
        ),
        (
            "bytes, stored sparse %",
            share(lambda line: line["after"]["sparse_bytes"] / line["before"]["bytes"]),
        ),
    ]
    errors = [line["max_error"] for line in ours if "max_error" in line]
    worst = f"{max(errors):.1e}" if errors else "not measured"
    gaps = [abs(line["top1_compacted"] - line["top1_tuned"]) for line in ours if "top1_compacted" in line]
    left = sum(line["dead_left"] for line in ours if "dead_left" in line)
    return [
        "What compaction (dead channels cut, constants folded) leaves of the whole net, against the "
        "dense one:",
        "",
        *_table(
            ["synapses removed", *(c for c, _ in columns)],
            [[f"{s:.0%}", *(f(s) for _, f in columns)] for s in sparsities],
        ),
        f"Compacted and masked nets differ by {worst} at most in float64 (relative), and by "
        f"{max(gaps, default=0):.2f} points of top-1; {left} dead channels in all of them had to stay. "
        f"Zero kernels inside "
        "what is left save storage, not time.",
        "",
    ]


def _label(line: Line) -> str:
    if not line["weight"]:
        return "none"
    kind = "" if line["form"] == "strength" else " (shares)"
    return f"{line['weight']:g}{kind}" + (", proximal" if line["step"] == "proximal" else "")


def _in_sweep(line: Line) -> bool:
    plain = {"weight": 0.0, "step": "gradient", "form": "strength"}
    return any(_is(line, **(plain | options)) for options in SWEEP)


def lambda_section(lines: list[Line], small: str, page: Path) -> list[str]:
    """Sensitivity to the penalty's weight and to the threshold."""
    title = "## How much penalty, and which threshold"
    if not lines:
        return [title, "", "Not run yet.", ""]
    labels = list(dict.fromkeys(_label(line) for line in lines if _in_sweep(line)))
    rows = []
    curves: dict[str, dict[float, list[float]]] = {}
    for label in labels:
        mine = [line for line in lines if _label(line) == label]
        trained = [line for line in mine if "criterion" not in line]
        score = "share" if "shares" in label else "strength"
        untuned = {s: _values(mine, "top1", criterion=score, sparsity=s, epochs=0) for s in (0.5, 0.7, 0.9)}
        curves[label] = {0.0: _values(trained, "top1")} | untuned
        tuned = _values(mine, "top1_tuned", sparsity=0.9, epochs=1)
        rows.append([label, *(_seeds(values) for values in (*curves[label].values(), tuned))])
    plot = page.with_name("study_lambda.svg")
    _plot_curves(curves, plot)
    return [
        title,
        "",
        f"{small}; 45,000 images to train on, top-1 % on the other 5,000 training images, so that no test "
        f"image has a say in "
        "the choice. Columns: as trained; without 50, 70, 90 % of the synapses and no fine-tuning; "
        "without 90 % and one "
        "epoch of it.",
        "",
        *_table(["penalty", "trained", "50 %", "70 %", "90 %", "90 %, tuned"], rows),
        f"![accuracy against sparsity]({plot.name})",
        "",
    ]


def depth_section(lines: list[Line], page: Path) -> list[str]:
    """Where in depth synapses go, and how strengths are spread."""
    parts = ["## Where in depth", ""]
    for part in NETS:
        trained = [line for line in _of(lines, part) if line["weight"] == WEIGHT and "strengths" in line]
        pruned = [
            line
            for line in _of(lines, part)
            if _is(line, criterion="strength", weight=WEIGHT) and line.get("epochs")
        ]
        if not trained or not pruned:
            parts += [f"{part}: not run yet.", ""]
            continue
        plot = page.with_name(f"study_depth_{part}.svg")
        _plot_depth(trained[0], pruned, plot)
        parts += [
            f"{NETS[part][0]}: strengths by layer (seed {trained[0]['recipe']['seed']}: median, "
            f"quartiles, 5 to 95 %), and "
            "the share of each layer's synapses that stays (mean over seeds).",
            "",
            f"![strength and kept synapses by depth]({plot.name})",
            "",
        ]
    return parts


def task_section(lines: list[Line], small: str, page: Path) -> list[str]:
    """Is the distribution alike across tasks?"""
    title = "## Another task"
    tasks = {
        "CIFAR-10": [
            x
            for x in _of(lines, "lambda")
            if _is(x, weight=WEIGHT, form="strength", step="gradient") and "strengths" in x
        ],
        "Fashion-MNIST": [x for x in _of(lines, "task") if "strengths" in x],
    }
    if not all(tasks.values()):
        return [title, "", "Not run yet.", ""]
    plot = page.with_name("study_task.svg")
    _plot_tasks(tasks, plot)
    return [
        title,
        "",
        f"{small}, penalty {WEIGHT:g}. Quantiles of each layer's strengths, relative to the layer's root "
        f"mean square (bands: "
        "from the lowest to the highest seed).",
        "",
        f"![relative strengths by depth]({plot.name})",
        "",
    ]


def criteria_section(lines: list[Line], small: str) -> list[str]:
    """Which synapses criteria call important, and what it means for accuracy."""
    parts = ["## Other criteria", ""]
    for part in NETS:
        trained = [line for line in _of(lines, part) if "overlap" in line]
        for weight in sorted({line["weight"] for line in trained}):
            mine = [line for line in trained if line["weight"] == weight]
            fractions = sorted(mine[0]["overlap"])
            rows = [
                [name, *(_seeds([100 * line["overlap"][f][name] for line in mine]) for f in fractions)]
                for name in CRITERIA
            ]
            parts += [
                f"{NETS[part][0]}, penalty {weight:g}: of the synapses that *strength* keeps, the share "
                f"(%) that another "
                "criterion keeps, too.",
                "",
                *_table(["criterion", *(f"{float(f):.0%} removed" for f in fractions)], rows),
            ]
    dense = [line for line in _of(lines, "criteria") if not line["weight"]]
    if dense:
        rows = []
        for name in CRITERIA:
            plain = _values(dense, "top1", criterion=name, epochs=0)
            rows.append([name, _seeds(plain), _seeds(_values(dense, "top1_tuned", criterion=name, epochs=1))])
        parts += [
            f"{small}, no penalty, 70 % of the synapses removed, on held-out training images:",
            "",
            *_table(["criterion", "no fine-tuning", "one epoch"], rows),
        ]
    return parts


def entropy_section(lines: list[Line]) -> list[str]:
    """Variance against entropy."""
    title = "## Variance or entropy"
    found = [line for line in lines if "entropy_agreement" in line and line["part"] in NETS]
    text = [
        title,
        "",
        "A Gaussian's entropy is `0.5 ln(2 pi e v)`: it grows with the variance, so single synapses rank "
        "alike. Sums over "
        "the synapses of a channel need not: a sum of logarithms weighs the weak ones more.",
        "",
    ]
    if not found:
        return [*text, "Not run yet.", ""]
    rows = []
    for part in NETS:
        mine = [line["entropy_agreement"] for line in found if line["part"] == part]
        if mine:
            rows.append(
                [
                    NETS[part][0],
                    *(f"{statistics.mean(m[k] for m in mine):.3f}" for k in ("synapses", "channels")),
                ]
            )
    return [
        *text,
        *_table(["rank correlation, mean over layers and nets", "of synapses", "of sums by channel"], rows),
    ]


def regulariser_section(lines: list[Line]) -> list[str]:
    """Does light sparsity help generalisation?"""
    parts = [
        "## Is it a regulariser?",
        "",
        "Top-1 % on as many training images as there are to measure on, and on the latter.",
        "",
    ]
    rows = []
    for part in (*NETS, "lambda"):
        trained = [line for line in _of(lines, part) if "top1_train" in line]
        for label in dict.fromkeys(_label(line) for line in trained):
            mine = [line for line in trained if _label(line) == label]
            rows.append(
                [
                    f"{mine[0]['net']}, width {mine[0]['width']:g}",
                    label,
                    _seeds(_values(mine, "top1_train")),
                    _seeds(_values(mine, "top1")),
                ]
            )
    return parts + _table(["net", "penalty", "training images", "others"], rows)


def published_section() -> list[str]:
    """Others' numbers, with their sources."""
    names = ("method", "net", "data", "dense", "top1", "before", "after", "source")
    rows = [[str(entry[n] or "") for n in names] for entry in json.loads(PUBLISHED.read_text())]
    return [
        "## What others have published",
        "",
        "Not run by us, and not comparable with the small nets above. Many report the best test epoch.",
        "",
        *_table(["method", "net", "data", "dense %", "pruned %", "before", "after", "source"], rows),
    ]


def _figure(width: float = 7.0, rows: int = 1) -> tuple[Any, Any, Any]:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "ss-pruning"  # the same file for the same results
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(rows, figsize=(width, 3.2 * rows), sharex=rows > 1)
    return plt, figure, axes


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _plot_curves(curves: dict[str, dict[float, list[float]]], path: Path) -> None:
    plt, figure, axes = _figure()
    for label, points in curves.items():
        at = [s for s, values in points.items() if values]
        means = [statistics.mean(points[s]) for s in at]
        errors = [statistics.stdev(points[s]) if len(points[s]) > 1 else 0.0 for s in at]
        axes.errorbar([100 * s for s in at], means, errors, marker="o", capsize=2, label=label)
    axes.set(xlabel="synapses removed, %", ylabel="top-1 %", title="without fine-tuning")
    axes.legend(title="penalty", fontsize=7)
    _save(plt, figure, path)


def _plot_depth(trained: Line, pruned: list[Line], path: Path) -> None:
    plt, figure, (top, bottom) = _figure(rows=2)
    layers = list(trained["strengths"])
    for number, layer in enumerate(layers):
        q = dict(zip(QUANTILES, trained["strengths"][layer]["quantiles"], strict=True))
        top.plot([number, number], [max(q[0.05], 1e-8), q[0.95]], color="C0", linewidth=1)
        top.plot([number, number], [max(q[0.25], 1e-8), q[0.75]], color="C0", linewidth=4)
        top.plot(number, max(q[0.5], 1e-8), "o", color="white", markeredgecolor="C0", markersize=4)
    top.set(yscale="log", ylabel="strength")
    for sparsity in sorted({line["sparsity"] for line in pruned}):
        mine = [line["kept_by_layer"] for line in pruned if line["sparsity"] == sparsity]
        kept = [100 * statistics.mean(m[layer] for m in mine) for layer in layers]
        bottom.plot(range(len(layers)), kept, marker="o", label=f"{sparsity:.0%}")
    bottom.set(ylabel="synapses kept, %", xlabel="layer, input to output")
    bottom.set_xticks(range(len(layers)), layers, rotation=60, fontsize=6)
    bottom.legend(title="removed in all", fontsize=7)
    _save(plt, figure, path)


def _plot_tasks(tasks: dict[str, list[Line]], path: Path) -> None:
    plt, figure, axes = _figure()
    for number, (task, lines) in enumerate(tasks.items()):
        layers = list(lines[0]["strengths"])
        for quantile, style in ((0.25, ":"), (0.5, "-"), (0.75, "--")):
            at = QUANTILES.index(quantile)
            values = [[line["strengths"][layer]["relative"][at] for line in lines] for layer in layers]
            label = f"{task}, {quantile:.0%} quantile"
            axes.plot(
                range(len(layers)),
                [statistics.mean(v) for v in values],
                style,
                color=f"C{number}",
                label=label,
            )
            axes.fill_between(
                range(len(layers)),
                [min(v) for v in values],
                [max(v) for v in values],
                color=f"C{number}",
                alpha=0.15,
            )
    axes.set(xlabel="layer, input to output", ylabel="strength / root mean square")
    axes.set_xticks(range(len(layers)), layers, fontsize=7)
    axes.legend(fontsize=7, loc="lower left", ncols=2)
    _save(plt, figure, path)

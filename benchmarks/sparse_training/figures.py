"""The figures of docs/study.md."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.pages import figure
from benchmarks.sparse_training.run import QUANTILES

Line = dict[str, Any]


def draw_curves(curves: dict[str, dict[float, list[float]]], path: Path) -> None:
    """Accuracy against sparsity, a curve for each penalty."""
    with figure(path, figsize=(7, 3.2)) as (_, ((axes,),)):
        for label, points in curves.items():
            at = [s for s, values in points.items() if values]
            means = [statistics.mean(points[s]) for s in at]
            errors = [statistics.stdev(points[s]) if len(points[s]) > 1 else 0.0 for s in at]
            axes.errorbar([100 * s for s in at], means, errors, marker="o", capsize=2, label=label)
        axes.set(xlabel="synapses removed, %", ylabel="top-1 %", title="without fine-tuning")
        axes.legend(title="penalty", fontsize=7)


def draw_depth(trained: Line, pruned: list[Line], path: Path) -> None:
    """Strengths by layer above, the share of synapses that stays below."""
    layers = list(trained["strengths"])
    with figure(path, rows=2, figsize=(7, 6.4), sharex=True) as (_, ((top,), (bottom,))):
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


def draw_tasks(tasks: dict[str, list[Line]], path: Path) -> None:
    """Quantiles of strengths by layer, for each task; bands go from the lowest to the highest seed."""
    layers = list(next(iter(tasks.values()))[0]["strengths"])
    numbers = range(len(layers))
    with figure(path, figsize=(7, 3.2)) as (_, ((axes,),)):
        for number, (task, lines) in enumerate(tasks.items()):
            for quantile, style in ((0.25, ":"), (0.5, "-"), (0.75, "--")):
                at = QUANTILES.index(quantile)
                values = [[line["strengths"][layer]["relative"][at] for line in lines] for layer in layers]
                label, color = f"{task}, {quantile:.0%} quantile", f"C{number}"
                axes.plot(numbers, [statistics.mean(v) for v in values], style, color=color, label=label)
                lowest, highest = [min(v) for v in values], [max(v) for v in values]
                axes.fill_between(numbers, lowest, highest, color=color, alpha=0.15)
        axes.set(xlabel="layer, input to output", ylabel="strength / root mean square")
        axes.set_xticks(numbers, layers, fontsize=7)
        axes.legend(fontsize=7, loc="lower left", ncols=2)

"""How long scoring and provenance take, beside Torch-Pruning's group magnitude, in one process.

(a) Scoring all groups of a torchvision ResNet-50 with `SynapticImportance` and with
`GroupMagnitudeImportance`: the
    same groups, in turns, the median of the ratios. The first call finds the connectivity and is timed by itself,
    each time on a model that no importance has seen.
(b) `trace`, the provenance of every channel, on DenseNet-121 at 64 pixels.
(c) Build, score and cut together at 64 pixels, local ratio 0.5 by group magnitude: `GraphPruner` (which also verifies
    the cut on a copy; its build alone is timed, too) and Torch-Pruning's `BasePruner`, in turns, on fresh models.

    OMP_NUM_THREADS=2 python -m benchmarks.latency.speed
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
import torchvision
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.common import write
from ss_pruning import SynapticImportance
from ss_pruning.graph import trace
from ss_pruning.integrations.torch_pruning.pruner import ChannelGraph, GraphPruner


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def score_all(importance: Any, groups: list[Any]) -> None:
    """Score every group, as a pruner does in one step."""
    for group in groups:
        importance(group)


def groups_of(model: nn.Module, example: torch.Tensor) -> list[Any]:
    """All groups of Torch-Pruning's dependency graph, the classifier left out as every pruner is told to."""
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=example)
    return list(graph.get_all_groups(ignored_layers=[model.fc], root_module_types=[nn.Conv2d, nn.Linear]))


def scoring(repeats: int, pixels: int) -> dict[str, Any]:
    """Times of scoring all groups of ResNet-50."""
    example = torch.randn(1, 3, pixels, pixels)
    model = torchvision.models.resnet50(weights=None).eval()
    groups = groups_of(model, example)
    ours, theirs = SynapticImportance(), tp.importance.GroupMagnitudeImportance()
    first = seconds(lambda: score_all(ours, groups))
    score_all(theirs, groups)
    pairs = [
        (seconds(lambda: score_all(ours, groups)), seconds(lambda: score_all(theirs, groups)))
        for _ in range(repeats)
    ]
    fresh = [first_call(example) for _ in range(max(1, repeats // 4))]
    ratio = statistics.median(a / b for a, b in pairs)
    return {
        "groups": len(groups),
        "pixels": pixels,
        "repeats": repeats,
        "ours": statistics.median(a for a, _ in pairs),
        "group_magnitude": statistics.median(b for _, b in pairs),
        "ratio": ratio,
        "first_call": statistics.median([first, *fresh]),
        "first_ratio": statistics.median([first, *fresh]) / statistics.median(b for _, b in pairs),
    }


def first_call(example: torch.Tensor) -> float:
    """Time of scoring a model that was never seen: provenance and scores."""
    model = torchvision.models.resnet50(weights=None).eval()
    groups = groups_of(model, example)
    return seconds(lambda: score_all(SynapticImportance(), groups))


def provenance(repeats: int, pixels: int = 64) -> dict[str, Any]:
    """Times of `trace` on DenseNet-121, each on a fresh model."""
    example = torch.randn(1, 3, pixels, pixels)
    times = []
    for _ in range(repeats):
        model = torchvision.models.densenet121(weights=None).eval()
        times.append(seconds(lambda model=model: trace(model, example)))
    return {
        "pixels": pixels,
        "repeats": repeats,
        "seconds": statistics.median(times),
        "slowest": max(times),
    }


def pruning(name: str, repeats: int, pixels: int = 64) -> dict[str, Any]:
    """Times from a fresh model to a pruned one."""
    example, importance = torch.randn(1, 3, pixels, pixels), tp.importance.GroupMagnitudeImportance()

    def fresh() -> nn.Module:
        return torchvision.models.get_model(name, weights=None).eval()

    def theirs(model: nn.Module) -> None:
        head = model.fc if hasattr(model, "fc") else model.classifier
        dictionaries: dict[str, Any] = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}
        tp.pruner.BasePruner(model, example, importance, ignored_layers=[head], **dictionaries).step()

    def ours(model: nn.Module) -> None:
        GraphPruner(model, example, importance).step()

    works: dict[str, Callable[[nn.Module], object]] = {
        "ours": ours,
        "torch_pruning": theirs,
        "our_build": lambda model: ChannelGraph().build_dependency(model, example),
        "their_build": lambda model: tp.DependencyGraph().build_dependency(model, example_inputs=example),
    }
    times: dict[str, list[float]] = {key: [] for key in works}
    for _ in range(repeats + 1):  # the first round warms up
        for key, work in works.items():
            model = fresh()
            times[key].append(seconds(lambda work=work, model=model: work(model)))
    medians = {key: statistics.median(values[1:]) for key, values in times.items()}
    ratio = statistics.median(
        a / b for a, b in zip(times["ours"][1:], times["torch_pruning"][1:], strict=True)
    )
    return {"model": name, "pixels": pixels, "repeats": repeats, **medians, "ratio": ratio}


def table(score: dict[str, Any], connectivity: dict[str, Any], pruned: list[dict[str, Any]]) -> Table:
    """The result for people."""
    result = Table(title=f"Speed, {torch.get_num_threads()} threads")
    for column, justify in (("what", "left"), ("seconds", "right"), ("ratio", "right")):
        result.add_column(column, justify=justify)
    groups = f"{score['groups']} groups of ResNet-50"
    result.add_row(f"GroupMagnitudeImportance, {groups}", f"{score['group_magnitude']:.4f}", "1.00")
    result.add_row(f"SynapticImportance, {groups}", f"{score['ours']:.4f}", f"{score['ratio']:.2f}")
    first, first_ratio = f"{score['first_call']:.4f}", f"{score['first_ratio']:.2f}"
    result.add_row("the same on a model never seen, with its provenance", first, first_ratio)
    result.add_row(
        f"trace, DenseNet-121 at {connectivity['pixels']} pixels", f"{connectivity['seconds']:.2f}", ""
    )
    for row in pruned:
        at = f"{row['model']} at {row['pixels']} pixels"
        result.add_row(f"BasePruner, build to cut, {at}", f"{row['torch_pruning']:.2f}", "1.00")
        result.add_row(
            f"GraphPruner, build to cut, verified, {at}", f"{row['ours']:.2f}", f"{row['ratio']:.2f}"
        )
        build = f"{row['our_build'] / row['their_build']:.2f}"
        result.add_row(f"the build alone, against theirs, {at}", f"{row['our_build']:.2f}", build)
    return result


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--pixels", type=int, default=224, help="input size of ResNet-50")
    options = parser.parse_args()
    score = scoring(options.repeats, options.pixels)
    connectivity = provenance(max(3, options.repeats // 5))
    console = Console()
    pruned = [pruning(name, max(2, options.repeats // 5)) for name in ("resnet50", "densenet121")]
    console.print(table(score, connectivity, pruned))
    results = {"scoring": score, "provenance": connectivity, "pruning": pruned}
    path = write("speed", {"threads": torch.get_num_threads(), **results})
    console.print(f"written: {path.name} in {path.parent.name}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Turn benchmarks/results/scale.json into docs/scale.md and its plot: no figure is typed in by hand.

python -m benchmarks.latency.scale_page
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks.common import DOCS, RESULTS
from benchmarks.latency.scale import GIB, GIVING_BACK, GOAL, MODELS, STAGES
from benchmarks.pages import figure, table, write_page

PAGE = DOCS / "scale.md"
HEADS = (
    *("model", "pixels", "parameters, M", *STAGES, "CPU s"),
    *("model, GiB", "peak, GiB", "peak to model", "needed"),
)
Model = dict[str, Any]


def make_page(result: dict[str, Any], page: Path = PAGE) -> Path:
    """Write the page and its plot."""
    measured = [item for item in result["models"].items() if "failed" not in item[1]]
    measured.sort(key=lambda item: item[1]["params"])
    models = [model for _, model in measured]
    ratios = {name: needed(model) for name, model in measured if needed(model)}
    plot(models, page.with_name("scale.svg"))
    return write_page(
        page,
        "scale",
        table=table(HEADS, (row(name, model) for name, model in measured)),
        setting=" ".join(f"{name}={value}" for name, value in GIVING_BACK.items()),
        goal=GOAL,
        known=len(ratios),
        over=[f"{name} ({ratio:.2f})" for name, ratio in ratios.items() if ratio > GOAL],
        growth=f"{exponent(models, STAGES):.2f}",
        by_stage=", ".join(f"{stage} {exponent(models, [stage]):.2f}" for stage in STAGES),
        machine=result["machine"],
        load=result["load"],
        versions=", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        failed={name: m["failed"] for name, m in result["models"].items() if "failed" in m},
        missing=[name for name in MODELS if name not in result["models"]],
    )


def exponent(models: Collection[dict[str, Any]], stages: Collection[str]) -> float:
    """The slope of log seconds in these stages over log parameters, by least squares; 1 is linear."""
    points = [
        (math.log(m["params"]), math.log(sum(m["seconds"].get(stage, 0.0) for stage in stages) or 1e-3))
        for m in models
    ]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


def needed(model: dict[str, Any]) -> float:
    """The peak to the model where freed tensors are given back; 0 if that was not measured."""
    return float(model.get("needed", {}).get("peak_to_model", 0))


def row(name: str, model: Model) -> list[str]:
    """A line of the table."""
    seconds = (f"{model['seconds'].get(stage, 0):.2f}" for stage in STAGES)
    sizes = (f"{model['model_bytes'] / GIB:.3f}", f"{max(model['peaks'].values()) / GIB:.2f}")
    ratios = (f"{model['peak_to_model']:.2f}", f"{needed(model):.2f}" if needed(model) else "")
    millions = f"{model['params'] / 1e6:.1f}"
    return [name, model["size"], millions, *seconds, f"{model['cpu_seconds']:.1f}", *sizes, *ratios]


def plot(models: list[Model], path: Path) -> None:
    """Seconds by stage, and memory, against parameters."""
    millions = [m["params"] / 1e6 for m in models]
    with figure(path, columns=2, figsize=(9, 3.5)) as (_, ((left, right),)):
        for stage in STAGES:
            left.loglog(millions, [m["seconds"].get(stage, math.nan) for m in models], "o-", label=stage)
        right.loglog(millions, [m["model_bytes"] / GIB for m in models], "o-", label="model")
        peaks = [max(m["peaks"].values()) / GIB for m in models]
        right.loglog(millions, peaks, "o-", label="peak of the process")
        for axes, label in ((left, "seconds"), (right, "GiB")):
            axes.set(xlabel="parameters, millions", ylabel=label)
            axes.legend(loc="upper left")


if __name__ == "__main__":
    print(f"written: {make_page(json.loads((RESULTS / 'scale.json').read_text()))}")

"""Turn benchmarks/results/latency.jsonl into docs/latency.md: no figure is typed in by hand.

python -m benchmarks.latency.page
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import DOCS, made_on, read_lines
from benchmarks.latency.run import LINES, what_of
from benchmarks.pages import spread, table, write_page
from ss_pruning.profiling.comparison import Setting

PAGE = DOCS / "latency.md"
#: How much of the dense time ResNet-50 may take at half its MACs on a CPU, how near a latency target has to be met, and
#: how near to its promise of MACs a GPU should come.
CPU_GOAL, NEAR, GPU_NEAR = 0.62, 0.05, 0.15
MEASURED = 'round_to="measured"'
BUDGET_HEADS = (
    "way",
    "MACs",
    "parameters",
    "file",
    "median",
    "middle half",
    "images/s",
    "peak memory",
    "of dense",
)
TARGET_HEADS = (
    *("model", "setting", "target", "found", "measured again", "off target"),
    *("MACs kept", "parameters kept", "took"),
)

Line = dict[str, Any]


def make_page(lines: list[Line], page: Path = PAGE) -> Path:
    """Write the tables; of several results for the same thing the last counts."""
    if not lines:
        raise SystemExit("no result yet: run python -m benchmarks.latency.run first")
    latest = [
        {**line, "runs": [other for other in lines if _alike(line, other)]}
        for line in {what_of(line): line for line in lines}.values()
    ]
    machines: dict[str, list[Line]] = defaultdict(list)
    for line in latest:
        machines[f"{line['machine']['device'].upper()}: {place_of(line)}"].append(line)
    return write_page(
        page,
        "latency",
        summary=summary(lines),
        pixels=lines[0]["pixels"],
        versions=made_on(latest),
        machines=[{"title": title, **_tables(of)} for title, of in machines.items()],
        has_gpu=any(line["machine"]["device"] == "cuda" for line in latest),
        goals={"cpu": CPU_GOAL, "gpu": GPU_NEAR, "near": NEAR},
    )


def _tables(lines: list[Line]) -> dict[str, Any]:
    """What the page shows of one machine."""
    return {
        "budgets": [budget(line) for line in lines if line["part"] == "budget"],
        "settings": _settings(lines),
        "rounding": _rounding(lines),
        "targets": _targets([line for line in lines if line["part"] == "targets"]),
        "trained": _trained([line for line in lines if line["part"] == "trained"]),
    }


def summary(lines: list[Line], net: str = "resnet50") -> str:
    """What was asked for and how much time is left, on each machine; of several runs the last."""
    latest = {what_of(line): line for line in lines if line["net"] == net}.values()
    rows = [row for line in latest if _is_shown(line) for row in [_asked(line)]]
    heads = [f"{net}, 224 pixels, on", "in", "asked for", "MACs kept", "time kept"]
    return table(heads, sorted(rows, key=lambda row: row[:3]), "lll")


def _is_shown(line: Line) -> bool:
    """Budgets of MACs and of time; of a GPU in all settings that keep it busy."""
    busy = line["part"] == "settings" and line["machine"]["device"] == "cuda" and of_line(line).batch >= 256
    return busy or line["part"] in ("budget", "targets")


def _asked(line: Line) -> tuple[str, ...]:
    if line["part"] == "targets":
        asked, kept, time = f"`latency={line['target']}`", line["macs_kept"], line["again"]
    else:
        asked = "`macs=0.5`"
        kept, time = line["facts"]["default"]["macs_kept"], line["comparison"]["ratios"]["default"]
    return place_of(line), str(of_line(line)), asked, f"{kept:.3f}", f"{time:.3f}"


def _alike(line: Line, other: Line) -> bool:
    """True for comparisons of the same model in the same setting on the same machine."""
    both = "comparison" in line and "comparison" in other
    return both and what_of({**line, "part": ""}) == what_of({**other, "part": ""})


def place_of(line: Line) -> str:
    """The machine, in words."""
    threads = line["machine"]["threads"]
    count = "" if threads == "-" else f", {threads} thread{'s' * (threads != '1')}"
    return f"{line['machine']['name']}{count}"


def of_line(line: Line) -> Setting:
    """How its models ran."""
    if "comparison" in line:
        return Setting(**line["comparison"]["setting"])
    return Setting(line["batch"], line.get("dtype", "float32"), line.get("layout", "contiguous"))


def budget(line: Line) -> dict[str, Any]:
    """All ways to the same MACs, and whether they keep what is hoped of them."""
    comparison = line["comparison"]
    ratios = {way: ratio for way, ratio in comparison["ratios"].items() if way != "dense"}
    promised = {way: line["facts"][way]["macs_kept"] for way in ratios}
    return {
        "net": line["net"],
        "setting": of_line(line),
        "rounds": comparison["rounds"],
        "table": table(BUDGET_HEADS, (_row(line, way) for way in comparison["speeds"])),
        "on_cpu": line["machine"]["device"] == "cpu",
        "met": [_code(way) for way, ratio in ratios.items() if ratio <= CPU_GOAL],
        "missed": [way for way, ratio in ratios.items() if ratio > CPU_GOAL],
        "off": ", ".join(f"{way} {ratios[way] / promised[way] - 1:+.0%}" for way in ratios),
        "best": _code(min(ratios, key=ratios.__getitem__)),
    }


def _code(way: str) -> str:
    return way if way == "default" else f"`{way}`"


def _row(line: Line, way: str) -> list[str]:
    speed, known = line["comparison"]["speeds"][way], line["facts"].get(way, {})
    shares = [f"{known[key]:.3f}" if key in known else "1" for key in ("macs_kept", "params_kept", "file")]
    peak = f"{speed['peak_bytes'] / 1e6:,.0f} MB" if speed["peak_bytes"] else ""
    return [way, *shares, *_times(speed), f"{speed['images_per_second']:,.1f}", peak, _share(line, way)]


def _times(speed: dict[str, Any]) -> list[str]:
    """Median and middle half."""
    return [f"{1000 * speed['seconds']:.1f} ms", f"{1000 * speed['low']:.1f} to {1000 * speed['high']:.1f}"]


def _share(line: Line, way: str) -> str:
    """Of the dense time: in the last run, and from the smallest to the largest of all."""
    ratios = [run["comparison"]["ratios"].get(way) for run in line["runs"]]
    seen = [ratio for ratio in ratios if ratio is not None]
    last = line["comparison"]["ratios"].get(way)
    if last is None:
        return ""
    return f"{last:.3f}" + f" [{min(seen):.3f}, {max(seen):.3f}]" * (len(seen) > 1 and way != "dense")


def _settings(lines: list[Line]) -> dict[str, Any] | None:
    shown = {what_of({**line, "part": ""}) for line in lines if line["part"] == "budget"}
    chosen = [line for line in lines if line["part"] in ("settings", "compiled")]
    chosen = [line for line in chosen if what_of({**line, "part": ""}) not in shown]
    if not chosen:
        return None
    ways = [
        way for way in dict.fromkeys(w for x in chosen for w in x["comparison"]["ratios"]) if way != "dense"
    ]
    rows = [
        [of_line(x), *_times(x["comparison"]["speeds"]["dense"]), *(_share(x, way) for way in ways)]
        for x in chosen
    ]
    heads = ["setting", "dense, median", "middle half", *(f"{way}, of dense" for way in ways)]
    return {"net": chosen[0]["net"], "table": table(heads, rows)}


def _rounding(lines: Iterable[Line]) -> str:
    """What widths as measured spare, over all runs: a share of the time that any widths take at the same MACs."""
    runs = {id(run): run for line in lines for run in line["runs"]}
    ratios = [run["comparison"]["ratios"] for run in runs.values()]
    gains = [r[MEASURED] / r["default"] - 1 for r in ratios if MEASURED in r and "default" in r]
    if not gains:
        return ""
    middle = f"in the middle {statistics.median(gains):+.1%}"
    return f"over {len(gains)} comparisons: time {min(gains):+.1%} to {max(gains):+.1%}, {middle}"


def _targets(lines: list[Line]) -> dict[str, Any] | None:
    if not lines:
        return None
    off = [line["again"] / line["target"] - 1 for line in lines]
    rows = [
        [line["net"], of_line(line), line["target"], f"{line['found']:.3f}", f"{line['again']:.3f}", f"{value:+.1%}",
         f"{line['macs_kept']:.3f}", f"{line['params_kept']:.3f}", f"{line['seconds']:.0f} s"]
        for line, value in zip(lines, off, strict=True)
    ]  # fmt: skip
    near = sum(abs(value) <= NEAR for value in off)
    return {"table": table(TARGET_HEADS, rows, "ll"), "near": near, "count": len(lines)}


def _trained(lines: list[Line]) -> list[dict[str, Any]]:
    """One table for each target."""
    found = []
    for target in sorted({line["target"] for line in lines}, reverse=True):
        at = [line for line in lines if line["target"] == target]
        by_use: dict[str, list[Line]] = defaultdict(list)
        for line in at:
            by_use[line["use"]].append(line)
        rows = [[use, *_means(of)] for use, of in by_use.items()]
        heads = ["what is used of it", "measured again", "MACs kept", "parameters kept", "top-1"]
        seeds = sorted({str(line["seed"]) for line in at})
        found.append({"first": at[0], "target": target, "seeds": seeds, "table": table(heads, rows)})
    return found


def _means(lines: list[Line]) -> list[str]:
    keys = ("again", "macs_kept", "params_kept")
    means = [f"{statistics.mean(line[key] for line in lines):.3f}" for key in keys]
    return [*means, spread((line["top1"] for line in lines), seeds=0)]


if __name__ == "__main__":
    print(f"written: {make_page(read_lines(LINES))}")

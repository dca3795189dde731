"""Turn benchmarks/results/latency.jsonl into docs/latency.md: no figure is typed in by hand."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import DOCS, made_on
from ss_pruning.cli.bench import Setting

PAGE = DOCS / "latency.md"
#: How much of the dense time ResNet-50 may take at half its MACs on a CPU, how near a latency target has to be met, and
#: how near to its promise of MACs a GPU should come.
CPU_GOAL, NEAR, GPU_NEAR = 0.62, 0.05, 0.15

MEASURED = 'round_to="measured"'

Line = dict[str, Any]

INTRODUCTION = """# Latency after pruning

Fewer multiply-accumulates are not the aim, less time is. All models of a table ran in turns in one process, first \
forwards and then backwards, and *of dense* is the median, over the rounds, of a model's time as a share of the dense \
model's in the same round. Where the same was run several times, the last run counts, and the smallest and the largest \
share of all runs stand in brackets: that is how far a figure can be trusted. Weights are random, which costs the same \
time, except where accuracy is given. Images: {pixels} x {pixels} unless CIFAR-10.

Made by `python -m benchmarks.latency.run` and `python -m benchmarks.latency.run --page` from \
`benchmarks/results/latency.jsonl` ({versions}).
"""


def write_page(lines: list[Line], page: Path = PAGE) -> Path:
    """Write the tables; of several results for the same thing the last counts."""
    if not lines:
        raise SystemExit("no result yet: run python -m benchmarks.latency.run first")
    latest = {
        what_of(line): {**line, "runs": [other for other in lines if _alike(line, other)]} for line in lines
    }
    pixels = next(line["pixels"] for line in lines)
    parts = [INTRODUCTION.format(pixels=pixels, versions=made_on(latest.values()))]
    for title, of in _by_machine(latest.values()).items():
        parts += [f"## {title}", ""]
        for section in (_budget, _settings, _rounding, _targets, _trained):
            parts += section(of)
    if not any(line["machine"]["device"] == "cuda" for line in latest.values()):
        parts += [
            "## GPU",
            "",
            "Not measured yet. `python -m benchmarks.latency.run --device cuda --parts budget settings "
            "compiled targets` does it on one with about 24 GiB.",
            "",
        ]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(parts).rstrip() + "\n")
    return page


def what_of(line: Line) -> tuple[Any, ...]:
    """Equal for two lines that measured the same thing on the same machine."""
    machine = tuple(line["machine"].values())
    if "comparison" in line:
        return line["part"], line["net"], machine, tuple(line["comparison"]["setting"].values())
    return (
        line["part"],
        line["net"],
        machine,
        *(line.get(key) for key in ("target", "batch", "use", "seed")),
        *(line.get("dtype", "float32"), line.get("layout", "contiguous")),
    )


def _alike(line: Line, other: Line) -> bool:
    """True for comparisons of the same net in the same setting on the same machine."""
    return (
        "comparison" in line
        and "comparison" in other
        and what_of({**line, "part": ""}) == what_of({**other, "part": ""})
    )


def _by_machine(lines: Iterable[Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(f"{line['machine']['device'].upper()}: {place_of(line)}", []).append(line)
    return found


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


def _budget(lines: list[Line]) -> list[str]:
    parts = []
    for line in (line for line in lines if line["part"] == "budget"):
        comparison = line["comparison"]
        rows = [_row(line, way) for way in comparison["speeds"]]
        parts += [
            f"### {line['net']} at half of its multiply-accumulates",
            "",
            f"{of_line(line)}, {comparison['rounds']} rounds.",
            "",
            "| way | MACs | parameters | file | median | middle half | images/s | peak memory | of dense |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
            *rows,
            "",
            *_verdict(line),
            *_recipe(line),
        ]
    return parts


def _recipe(line: Line) -> list[str]:
    """What follows for somebody who has to choose."""
    ratios = {way: ratio for way, ratio in line["comparison"]["ratios"].items() if way != "dense"}
    best = min(ratios, key=ratios.__getitem__)
    return [
        f"At these MACs {best if best == 'default' else f'`{best}`'} takes the least time. If a time is what has to be "
        "met, ask for it (`--latency`, or `prune_(..., latency=)`): channels are then weighed by the time that they "
        'cost, and MACs are what comes out. `scope="local"` takes the same share of every layer, whatever its channels '
        "are worth: look at the accuracy before you choose it.",
        "",
    ]


def _verdict(line: Line) -> list[str]:
    ratios = {way: ratio for way, ratio in line["comparison"]["ratios"].items() if way != "dense"}
    if line["machine"]["device"] == "cpu":
        met = [f"`{way}`" if way != "default" else way for way, ratio in ratios.items() if ratio <= CPU_GOAL]
        found = f"met by {', '.join(met)}" if met else "met by none"
        rest = [way for way, ratio in ratios.items() if ratio > CPU_GOAL]
        return [
            f"At most {CPU_GOAL} of the dense time is {found}{'; not by ' * bool(rest)}{', '.join(rest)}.",
            "",
        ]
    promised = {way: line["facts"][way]["macs_kept"] for way in ratios}
    off = ", ".join(f"{way} {ratios[way] / promised[way] - 1:+.0%}" for way in ratios)
    return [f"Against what the MACs promise (aim: within {GPU_NEAR:.0%}): {off}.", ""]


def _share(line: Line, way: str) -> str:
    """Of the dense time: in the last run, and from the smallest to the largest of all."""
    ratios = [run["comparison"]["ratios"].get(way) for run in line["runs"]]
    seen = [ratio for ratio in ratios if ratio is not None]
    last = line["comparison"]["ratios"].get(way)
    if last is None:
        return ""
    return f"{last:.3f}" + f" [{min(seen):.3f}, {max(seen):.3f}]" * (len(seen) > 1 and way != "dense")


def _row(line: Line, way: str) -> str:
    speed, known = line["comparison"]["speeds"][way], line["facts"].get(way, {})
    shares = [f"{known[key]:.3f}" if key in known else "1" for key in ("macs_kept", "params_kept", "file")]
    peak = f"{speed['peak_bytes'] / 1e6:,.0f} MB" if speed["peak_bytes"] else ""
    times = [f"{1000 * speed['seconds']:.1f} ms", f"{1000 * speed['low']:.1f} to {1000 * speed['high']:.1f}"]
    cells = [
        way,
        *shares,
        *times,
        f"{speed['images_per_second']:,.1f}",
        peak,
        _share(line, way),
    ]
    return f"| {' | '.join(cells)} |"


def _settings(lines: list[Line]) -> list[str]:
    shown = {what_of({**line, "part": ""}) for line in lines if line["part"] == "budget"}
    chosen = [line for line in lines if line["part"] in ("settings", "compiled")]
    chosen = [line for line in chosen if what_of({**line, "part": ""}) not in shown]
    if not chosen:
        return []
    ways = list(
        dict.fromkeys(way for line in chosen for way in line["comparison"]["ratios"] if way != "dense")
    )
    parts = [
        f"### {chosen[0]['net']} at half of its multiply-accumulates, in other settings",
        "",
        f"| setting | dense, median | middle half | {' | '.join(f'{way}, of dense' for way in ways)} |",
        "|---|---:|---:|" + "---:|" * len(ways),
    ]
    for line in chosen:
        comparison = line["comparison"]
        dense, cells = comparison["speeds"]["dense"], [_share(line, way) for way in ways]
        times = f"{1000 * dense['seconds']:.1f} ms | {1000 * dense['low']:.1f} to {1000 * dense['high']:.1f}"
        parts.append(f"| {Setting(**comparison['setting'])} | {times} | {' | '.join(cells)} |")
    return [*parts, ""]


def _rounding(lines: list[Line]) -> list[str]:
    """What widths as measured spare, over all runs: a share of the time that any widths take at the same MACs."""
    runs = {id(run): run for line in lines for run in line["runs"]}
    ratios = [run["comparison"]["ratios"] for run in runs.values()]
    gains = [r[MEASURED] / r["default"] - 1 for r in ratios if MEASURED in r and "default" in r]
    if not gains:
        return []
    low, high = min(gains), max(gains)
    return [
        f"`{MEASURED}` against any width, same MACs, over {len(gains)} comparisons: time {low:+.1%} to {high:+.1%}, "
        f"in the middle {statistics.median(gains):+.1%}.",
        "",
    ]


def _targets(lines: list[Line]) -> list[str]:
    chosen = [line for line in lines if line["part"] == "targets"]
    if not chosen:
        return []
    off = [line["again"] / line["target"] - 1 for line in chosen]
    near = sum(abs(value) <= NEAR for value in off)
    parts = [
        "### Latency targets",
        "",
        "`prune_(..., latency=TARGET)`: the latency that the search found, and that of a second comparison afterwards.",
        "",
        "| net | setting | target | found | measured again | off target | MACs kept | parameters kept | took |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for line, value in zip(chosen, off, strict=True):
        cells = [
            line["net"],
            of_line(line),
            line["target"],
            f"{line['found']:.3f}",
            f"{line['again']:.3f}",
            f"{value:+.1%}",
        ]
        kept = [f"{line['macs_kept']:.3f}", f"{line['params_kept']:.3f}", f"{line['seconds']:.0f} s"]
        parts.append(f"| {' | '.join(map(str, [*cells, *kept]))} |")
    return [*parts, "", f"Within {NEAR:.0%} of the target when measured again: {near} of {len(chosen)}.", ""]


def _trained(lines: list[Line]) -> list[str]:
    chosen = [line for line in lines if line["part"] == "trained"]
    parts: list[str] = []
    for target in sorted({line["target"] for line in chosen}, reverse=True):
        at = [line for line in chosen if line["target"] == target]
        parts += [
            f"### What the table of layer times is good for: {at[0]['net']} at {target:.0%} of its time",
            "",
            f"CIFAR-10, top-1 on 10,000 test images, dense {at[0]['dense_top1']:.2f}; reconstructed on 512 unlabelled "
            f"training images, no fine-tuning; seeds: {', '.join(sorted({str(line['seed']) for line in at}))}.",
            "",
            "| what is used of it | measured again | MACs kept | parameters kept | top-1 |",
            "|---|---:|---:|---:|---:|",
        ]
        for use in dict.fromkeys(line["use"] for line in at):
            of = [line for line in at if line["use"] == use]
            means = [
                statistics.mean(line[key] for line in of)
                for key in ("again", "macs_kept", "params_kept", "top1")
            ]
            spread = f" ± {statistics.stdev(line['top1'] for line in of):.2f}" if len(of) > 1 else ""
            cells = [*(f"{value:.3f}" for value in means[:3]), f"{means[3]:.2f}{spread}"]
            parts.append(f"| {use} | {' | '.join(cells)} |")
        parts.append("")
    return parts

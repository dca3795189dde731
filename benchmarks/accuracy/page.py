"""Turn benchmarks/results/accuracy.jsonl into docs/accuracy.md and its plots: no figure is typed in by hand.

python -m benchmarks.accuracy.page
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cells import (
    SEEDS,
    Cells,
    Line,
    accuracy_table,
    by_chance,
    cells,
    column_of,
    columns_of,
    is_default,
    is_outdated,
    text_of,
)
from benchmarks.accuracy.criteria import CRITERIA, OURS, named_options
from benchmarks.accuracy.run import LINES, Run
from benchmarks.common import DOCS, RESULTS, made_on, read_lines
from benchmarks.data.models import NETS
from benchmarks.pages import figure, spread, table, write_page
from ss_pruning.config import METHODS, RELEVANCE_EXPONENT

PAGE = DOCS / "accuracy.md"
#: Criteria in another scope than is theirs, and the columns of the table that compares scopes.
VARIANTS = (f"{OURS}:scope=global", "Magnitude L2:scope=sensitivity")
SHOWN = (*CRITERIA, *VARIANTS)
SCOPES = {
    "Magnitude L2": "Magnitude L2, global",
    VARIANTS[0]: f"{OURS}, global",
    VARIANTS[1]: "Magnitude L2, sensitivity",
    OURS: f"{OURS}, sensitivity",
}
#: Of the dense MACs: how far apart budgets may be.
TOLERANCE = 0.01
#: What is drawn, each on a scale of its own.
PANELS = {"reconstruct": "reconstruct", "none, images": "plain cut", "none": "plain cut, no image"}
#: What stands first: columns of the tables below.
SUMMARY = {"none": "plain cut, no image", "reconstruct": "reconstruct"}
#: Net, whether its residual stream was pruned, and share of the MACs.
Point = tuple[str, bool, float]


def make_page(lines: list[Line], page: Path = PAGE) -> Path:
    """Write tables and plots; of several results for one run the last counts."""
    latest = {_run(line): line for line in lines if line["split"] == "test" and line["criterion"] in SHOWN}
    chosen = [line for line in latest.values() if line["top1"] is not None and not is_outdated(line)]
    if not chosen:
        raise SystemExit("no result yet: run python -m benchmarks.accuracy.run first")
    images = max(line["images"] for line in chosen)
    chosen = [line for line in chosen if line["images"] == images]
    ours = [line for line in chosen if line["criterion"] in CRITERIA]
    default = [line for line in ours if is_default(line)]
    return write_page(
        page,
        "accuracy",
        images=images,
        ours=OURS,
        versions=made_on(chosen),
        summary=summary(default),
        sections=list(_sections(default, page)),
        other_norms=[
            {"title": _title(point), "table": accuracy_table(of)}
            for point, of in by_point(line for line in ours if not is_default(line)).items()
        ],
        gains=gains(ours),
        scopes=scopes(chosen),
        tolerance=TOLERANCE,
        tried=tried(lines),
        relevance_exponent=RELEVANCE_EXPONENT,
    )


def _run(line: Line) -> tuple[Any, ...]:
    """What tells a run from others; older lines lack some of it."""
    return tuple(line.get(name, "global" if name == "scope" else False) for name in Run.__dataclass_fields__)


def by_point(lines: Iterable[Line]) -> dict[Point, list[Line]]:
    """Lines by net and budget, in the order of the page."""
    found: dict[Point, list[Line]] = defaultdict(list)
    for line in lines:
        found[line["net"], line["residual"], line["macs"]].append(line)
    return dict(sorted(found.items(), key=lambda item: (NETS.index(item[0][0]), item[0][1], -item[0][2])))


def _title(point: Point) -> str:
    net, residual, macs = point
    return f"{net}{', residual stream included' * residual}, {macs:.0%} of the multiply-accumulates"


def summary(lines: list[Line]) -> str:
    """Each net at the budget nearest to half: ours and the best of the others; cells that lack seeds are left out."""
    points = by_point(line for line in lines if not line["residual"] and line["calibration"] != "synthetic")
    rows = []
    for net in dict.fromkeys(net for net, *_ in points):
        point = min((p for p in points if p[0] == net), key=lambda p: abs(p[2] - 0.5))
        found = {key: values for key, values in cells(points[point]).items() if _is_complete(*key, values)}
        texts = [text for column in SUMMARY for text in (text_of(found, OURS, column), _rival(found, column))]
        rows.append([f"{net}, {point[2]:.0%}", f"{points[point][0]['dense']:.2f}", *texts])
    heads = [head for words in SUMMARY.values() for head in (f"{words}: ss-pruning", "best other")]
    return table(["net, MACs kept", "dense", *heads], rows)


def _is_complete(criterion: str, column: str, values: list[float]) -> bool:
    return len(values) >= SEEDS or not by_chance(criterion, column)


def _rival(found: Cells, column: str) -> str:
    others = {name: values for (name, of), values in found.items() if of == column and name != OURS}
    if not others:
        return ""
    best = max(others, key=lambda name: statistics.mean(others[name]))
    return f"{text_of(found, best, column)} ({best})"


def _sections(lines: list[Line], page: Path) -> Iterator[dict[str, Any]]:
    """One a net, with a table for each budget."""
    points = by_point(lines)
    for net, residual in dict.fromkeys(point[:2] for point in points):
        of_net = {point[2]: of for point, of in points.items() if point[:2] == (net, residual)}
        title = f"{net}{', residual stream included' * residual}"
        plot = page.with_name(f"accuracy_{net}{'_residual' * residual}.svg")
        yield {
            "title": title,
            "dense": next(iter(of_net.values()))[0]["dense"],
            "training": _training(net),
            "plot": plot.name if draw(of_net, title, plot) else "",
            "budgets": {
                macs: {"table": accuracy_table(of), "off": _off_budget(of)} for macs, of in of_net.items()
            },
        }


def _training(net: str) -> dict[str, Any] | None:
    """Recipe and log of weights that were trained here."""
    path = RESULTS / f"train_{net}.json"
    return {**json.loads(path.read_text()), "net": net, "log": path.name} if path.is_file() else None


def _off_budget(lines: list[Line]) -> list[str]:
    off = (line for line in lines if abs(line["macs_kept"] - line["macs"]) > TOLERANCE)
    return sorted({f"{line['criterion']} keeps {line['macs_kept']:.1%}" for line in off})


def gains(lines: list[Line]) -> str:
    """What compensation adds to the plain cut, averaged over nets and budgets."""
    plain: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    untuned = [line for line in lines if not line["finetune"]]
    for line in (line for line in untuned if column_of(line) == "none"):
        plain[_same(line)].append(line["top1"])
    for line in (line for line in untuned if column_of(line) != "none" and _same(line) in plain):
        found[line["criterion"], column_of(line)].append(line["top1"] - statistics.mean(plain[_same(line)]))
    columns = columns_of(found)
    rows = [[name, *(_gain(found.get((name, c), [])) for c in columns)] for name in CRITERIA]
    return table(["criterion", *columns], (row for row in rows if any(row[1:]))) if found else ""


def _gain(values: list[float]) -> str:
    return f"{statistics.mean(values):+.1f} ({len(values)} runs)" if values else ""


def _same(line: Line) -> tuple[Any, ...]:
    """What a gain is counted within; ours weighs costs as its scope does by default, which compensation changes."""
    weight = None if line["criterion"] == OURS else line["cost_exponent"]
    return line["net"], line["macs"], line["criterion"], weight, line["residual"]


def scopes(lines: list[Line]) -> str:
    """What the scores do, and what the scope does."""
    rows = []
    for (net, residual, macs), at in by_point(lines).items():
        found = {name: values for (name, column), values in cells(at).items() if column == "reconstruct"}
        if not residual and VARIANTS[0] in found and len(found.keys() & SCOPES) > 1:
            rows.append([f"{net}, {macs:.0%}", *(spread(found.get(name, ())) for name in SCOPES)])
    return table(["net, MACs", *SCOPES.values()], rows) if rows else ""


def tried(lines: list[Line]) -> dict[str, Any] | None:
    """What was weighed, on training images, for cuts that have no image to measure output error on."""
    chosen = [line for line in lines if line["split"] == "train" and line["calibration"] == "none"]
    chosen = [line for line in chosen if line.get("scope") != "sensitivity" and not line.get("recalibrate")]
    if not chosen:
        return None
    found: dict[tuple[str, float], dict[tuple[Any, ...], float]] = defaultdict(dict)
    for line in chosen:
        place = NETS.index(line["net"]), -line["macs"], METHODS.index(line["compensation"])
        found[line["criterion"], line["cost_exponent"]][(*place, column_of(line))] = line["top1"]
    points = sorted({point for at in found.values() for point in at})
    heads = [f"{NETS[net]}, {-macs:.0%}, {column}" for net, macs, _, column in points]
    default = (OURS, RELEVANCE_EXPONENT)
    ordered = sorted(found.items(), key=lambda item: (item[0] != default, item[0]))
    rows = [[_words(name), f"{weight:g}", *_texts(at, points)] for (name, weight), at in ordered]
    return {"images": chosen[0]["images"], "table": table(["scores", "cost exponent", *heads], rows)}


def _words(criterion: str) -> str:
    """A criterion's name with its options, without what has a column of its own."""
    options = {k: v for k, v in named_options(criterion).items() if k != "cost_exponent"}
    return criterion.partition(":")[0] + "".join(f", {key}={value}" for key, value in options.items())


def _texts(at: dict[Any, float], points: Iterable[Any]) -> list[str]:
    return [f"{at[point]:.1f}" if point in at else "" for point in points]


def draw(budgets: dict[float, list[Line]], title: str, path: Path) -> bool:
    """Accuracy against MACs, reconstructed and plain cuts side by side. False where there is one budget only."""
    curves: dict[str, dict[str, dict[float, float]]] = {column: defaultdict(dict) for column in PANELS}
    for macs, lines in budgets.items():
        for (criterion, column), values in cells(x for x in lines if x["calibration"] != "synthetic").items():
            if column in PANELS:
                curves[column][criterion][macs] = statistics.mean(values)
    shown = {c: of for c, of in curves.items() if len({macs for at in of.values() for macs in at}) > 1}
    if not shown:
        return False
    dense = next(iter(budgets.values()))[0]["dense"]
    with figure(path, columns=len(shown), figsize=(1.5 + 4 * len(shown), 4)) as (drawn, panels):
        drawn.suptitle(title)
        for axes, (column, of) in zip(panels[0], shown.items(), strict=True):
            _draw_panel(axes, of, dense, PANELS[column])
        panels[0][0].set_ylabel("top-1 %")
        panels[0][0].legend(fontsize=7)
    return True


def _draw_panel(axes: Any, curves: dict[str, dict[float, float]], dense: float, title: str) -> None:
    for number, criterion in enumerate(CRITERIA):
        if criterion in curves:
            width = 2.5 if criterion == OURS else 1.2
            macs, means = zip(*sorted(curves[criterion].items()), strict=True)
            axes.plot(macs, means, color=f"C{number}", marker="o", label=criterion, linewidth=width)
    axes.axhline(dense, color="0.6", linewidth=0.8, linestyle=":", label="dense")
    axes.set(xlabel="share of multiply-accumulates kept", title=title)


if __name__ == "__main__":
    print(f"written: {make_page(read_lines(LINES))}")

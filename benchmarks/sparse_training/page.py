"""Turn benchmarks/results/study.jsonl into docs/study.md and its plots: no figure is typed in by hand.

python -m benchmarks.sparse_training.page
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import DOCS, read_lines
from benchmarks.pages import spread, table, write_page
from benchmarks.sparse_training.figures import draw_curves, draw_depth, draw_tasks
from benchmarks.sparse_training.paper import CRITERIA, LARGER
from benchmarks.sparse_training.run import (
    EPOCHS,
    LINES,
    NETS,
    SMALL,
    SMALL_EPOCHS,
    SWEEP,
    TUNING_EPOCHS,
    WEIGHT,
)

PAGE = DOCS / "study.md"
PUBLISHED = Path(__file__).with_name("published.json")
Line = dict[str, Any]
#: Heads, and what stands below them: what is left, over what there was.
LEFT = {
    "parameters %": ("params", "params"),
    "MACs %": ("macs", "macs"),
    "MACs over living synapses %": ("living_macs", "macs"),
    "bytes, stored sparse %": ("sparse_bytes", "bytes"),
}


def make_page(lines: list[Line], page: Path = PAGE, larger: Sequence[Line] = ()) -> Path:
    """Write text, tables and plots; sections without a result say so."""
    latest = list({line["name"]: line for line in lines}.values())
    if not latest:
        raise SystemExit("no result yet: run python -m benchmarks.sparse_training.run first")
    parts = {part: of for part in NETS if (of := _of(latest, part))}
    return write_page(
        page,
        "study",
        nets=[main_section(part, of) for part, of in parts.items()],
        summary=summary(parts),
        missing=[part for part in NETS if part not in parts],
        versions=", ".join(f"{name} {version}" for name, version in latest[-1]["versions"].items()),
        epochs=EPOCHS,
        tuning_epochs=TUNING_EPOCHS,
        weight=WEIGHT,
        small=f"VGG-16-BN with {SMALL['width']:g} of the width, {SMALL_EPOCHS} epochs",
        penalties=penalties(_of(latest, "lambda"), page),
        depths=depths(parts, page),
        tasks=_draw_tasks(latest, page),
        overlaps=[overlap for part, of in parts.items() for overlap in overlaps(part, of)],
        criteria=criteria(_of(latest, "criteria")),
        entropies=entropies(parts),
        regularised=regularised(latest),
        larger=at_a_larger_size(larger),
        published=published(),
    )


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


def _seeds(values: Iterable[float]) -> str:
    return spread(values) or "not run"


def _gap(base: dict[int, float], mine: dict[int, float]) -> float | None:
    """The mean difference to `base`, over the seeds that both have."""
    gaps = [value - base[seed] for seed, value in mine.items() if seed in base]
    return statistics.mean(gaps) if gaps else None


def _over(base: dict[int, float], mine: dict[int, float]) -> str:
    gap = _gap(base, mine)
    return "" if gap is None else f"{gap:+.2f}"


def _split(lines: list[Line]) -> tuple[list[Line], list[Line], list[Line]]:
    """Lines with the usual fine-tuning: nets trained without a penalty, with it, and pruned layer by layer."""
    lines = [line for line in lines if line.get("epochs", 0) in (0, TUNING_EPOCHS)]
    by_layer = [line for line in lines if line.get("scope") == "layer"]
    dense = [line for line in lines if not line["weight"] and line not in by_layer]
    return dense, [line for line in lines if line["weight"] == WEIGHT], by_layer


def summary(parts: dict[str, list[Line]]) -> str:
    """Each net at the sparsity that rivals were run at, too."""
    rows = []
    for part, lines in parts.items():
        net, width, (sparsity, *_) = NETS[part]
        dense, ours, by_layer = _split(lines)
        at = {"sparsity": sparsity}
        tops = [
            _values(dense, "top1_tuned", criterion="strength", sparsity=0.0),
            _values(ours, "top1_tuned", criterion="strength", **at),
            *(_values(dense, "top1_tuned", criterion=name, **at) for name in ("kernel norm", "random")),
            _values(by_layer, "top1_tuned", criterion="kernel norm", **at),
        ]
        rows.append([f"{net}, width {width:g}", f"{sparsity:.0%}", *map(_seeds, tops)])
    rivals = (f"{name}, no penalty" for name in ("kernel norm", "random", "kernel norm by layer"))
    heads = ["dense, tuned as long", "penalty and strength", *rivals]
    return table(["net", "synapses removed", *heads], rows)


def main_section(part: str, lines: list[Line]) -> dict[str, Any]:
    """Accuracy at each sparsity, ours and rivals; what compaction leaves."""
    net, width, sparsities = NETS[part]
    dense, ours, by_layer = _split(lines)
    base = _by_seed(dense, "top1_tuned", criterion="strength", sparsity=0.0)
    return {
        "title": f"{net}, width {width:g}: how many synapses can go",
        "table": _against_dense(dense, ours, by_layer, sparsities),
        "shorter": list(_shorter(lines, sparsities[0])),
        **_highest(ours, base, sparsities),
        "asked": sparsities[0],
        "untuned": _untuned(dense, ours, sparsities[0]),
        "compaction": _compaction(ours, sparsities),
        **_exactness(ours),
    }


def _against_dense(
    dense: list[Line], ours: list[Line], by_layer: list[Line], sparsities: tuple[float, ...]
) -> str:
    base = _by_seed(dense, "top1_tuned", criterion="strength", sparsity=0.0)
    start, penalised = ([line for line in some if "criterion" not in line] for some in (dense, ours))
    first = _by_seed(start, "top1")
    rows = [
        ["dense, as trained", "", _seeds(first.values()), "0", ""],
        ["dense, fine-tuned as long", "0 %", _seeds(base.values()), _over(first, base), "0"],
        ["trained with the penalty", "0 %", _seeds(_values(penalised, "top1")), "", ""],
    ]
    runs = [("with the penalty, strength", ours, "strength", s) for s in sparsities]
    runs += [(f"without, {name}", dense, name, sparsities[0]) for name in ("kernel norm", "random")]
    if by_layer:
        runs.append(("without, kernel norm by layer", by_layer, "kernel norm", sparsities[0]))
    for label, some, criterion, sparsity in runs:
        mine = _by_seed(some, "top1_tuned", criterion=criterion, sparsity=sparsity)
        rows.append([f"{label}, {TUNING_EPOCHS} epochs", f"{sparsity:.0%}", _seeds(mine.values()),
                     _over(first, mine), _over(base, mine)])  # fmt: skip
    heads = ["net", "synapses removed", "top-1 %", "against as trained", "against tuned as long"]
    return table(heads, rows)


def _untuned(dense: list[Line], ours: list[Line], sparsity: float) -> str:
    """What each criterion leaves before any fine-tuning."""
    at = {"sparsity": sparsity, "epochs": 0}
    rows = [
        [name, *(_seeds(_values(some, "top1", criterion=name, **at)) for some in (dense, ours))]
        for name in CRITERIA
    ]
    return table(["criterion", "trained without the penalty", "trained with it"], rows)


def _shorter(lines: list[Line], sparsity: float) -> Iterable[dict[str, Any]]:
    """The same after fewer epochs of fine-tuning, where that was run."""
    for epochs in sorted({line.get("epochs", 0) for line in lines} - {0, TUNING_EPOCHS}):
        at = [line for line in lines if line.get("epochs") == epochs]
        base = _by_seed(at, "top1_tuned", criterion="strength", sparsity=0.0)
        mine = _by_seed(at, "top1_tuned", criterion="strength", sparsity=sparsity, weight=WEIGHT)
        if gap := _over(base, mine):
            yield {"epochs": epochs, "top": _seeds(mine.values()), "gap": gap}


def _highest(ours: list[Line], base: dict[int, float], sparsities: tuple[float, ...]) -> dict[str, Any]:
    """The sparsities that were tried, and the highest that costs at most one point."""
    by_sparsity = {s: _by_seed(ours, "top1_tuned", criterion="strength", sparsity=s) for s in sparsities}
    gaps = {s: gap for s, mine in by_sparsity.items() if (gap := _gap(base, mine)) is not None}
    kept = [sparsity for sparsity, gap in gaps.items() if gap >= -1]
    return {
        "tried": [f"{sparsity:.0%}" for sparsity in gaps],
        "highest": f"{max(kept):.0%}" if kept else "none",
    }


def _compaction(ours: list[Line], sparsities: tuple[float, ...]) -> str:
    rows = []
    for sparsity in sparsities:
        at = [line for line in ours if _is(line, criterion="strength", sparsity=sparsity) and "after" in line]
        shares = [[100 * x["after"][part] / x["before"][whole] for x in at] for part, whole in LEFT.values()]
        rows.append([f"{sparsity:.0%}", *map(_seeds, shares)])
    return table(["synapses removed", *LEFT], rows)


def _exactness(ours: list[Line]) -> dict[str, Any]:
    """How far compacted nets are from masked ones, and the dead channels that they still have."""
    errors = [line["max_error"] for line in ours if "max_error" in line]
    gaps = [abs(line["top1_compacted"] - line["top1_tuned"]) for line in ours if "top1_compacted" in line]
    return {
        "worst": f"{max(errors):.1e}" if errors else "not measured",
        "points": f"{max(gaps, default=0):.2f}",
        "dead_left": sum(line["dead_left"] for line in ours if "dead_left" in line),
    }


def _label(line: Line) -> str:
    if not line["weight"]:
        return "none"
    kind = "" if line["form"] == "strength" else " (shares)"
    return f"{line['weight']:g}{kind}" + (", proximal" if line["step"] == "proximal" else "")


def _in_sweep(line: Line) -> bool:
    plain = {"weight": 0.0, "step": "gradient", "form": "strength"}
    return any(_is(line, **(plain | options)) for options in SWEEP)


def penalties(lines: list[Line], page: Path) -> dict[str, str] | None:
    """What the penalty's weight and the threshold do."""
    if not lines:
        return None
    rows = []
    curves: dict[str, dict[float, list[float]]] = {}
    for label in dict.fromkeys(_label(line) for line in lines if _in_sweep(line)):
        mine = [line for line in lines if _label(line) == label]
        trained = [line for line in mine if "criterion" not in line]
        score = "share" if "shares" in label else "strength"
        untuned = {s: _values(mine, "top1", criterion=score, sparsity=s, epochs=0) for s in (0.5, 0.7, 0.9)}
        curves[label] = {0.0: _values(trained, "top1")} | untuned
        tuned = _values(mine, "top1_tuned", sparsity=0.9, epochs=1)
        rows.append([label, *map(_seeds, (*curves[label].values(), tuned))])
    plot = page.with_name("study_lambda.svg")
    draw_curves(curves, plot)
    return {
        "table": table(["penalty", "trained", "50 %", "70 %", "90 %", "90 %, tuned"], rows),
        "plot": plot.name,
    }


def depths(parts: dict[str, list[Line]], page: Path) -> list[dict[str, Any]]:
    """Where in depth synapses go, and how strengths are spread."""
    found = []
    for part, lines in parts.items():
        ours = [line for line in lines if line["weight"] == WEIGHT]
        trained = [line for line in ours if "strengths" in line]
        pruned = [line for line in ours if _is(line, criterion="strength") and line.get("epochs")]
        if trained and pruned and "kept_by_layer" in pruned[0]:
            plot = page.with_name(f"study_depth_{part}.svg")
            draw_depth(trained[0], pruned, plot)
            found.append({"net": NETS[part][0], "seed": trained[0]["recipe"]["seed"], "plot": plot.name})
    return found


def _draw_tasks(lines: list[Line], page: Path) -> str:
    """Is the distribution alike across tasks? The plot's name, or nothing without results."""
    plain = {"weight": WEIGHT, "form": "strength", "step": "gradient"}
    tasks = {
        "CIFAR-10": [x for x in _of(lines, "lambda") if _is(x, **plain) and "strengths" in x],
        "Fashion-MNIST": [x for x in _of(lines, "task") if "strengths" in x],
    }
    if not all(tasks.values()):
        return ""
    plot = page.with_name("study_task.svg")
    draw_tasks(tasks, plot)
    return plot.name


def overlaps(part: str, lines: list[Line]) -> Iterable[dict[str, Any]]:
    """Which synapses criteria call important."""
    trained = [line for line in lines if "overlap" in line]
    for weight in sorted({line["weight"] for line in trained}):
        mine = [line["overlap"] for line in trained if line["weight"] == weight]
        shares = sorted(mine[0])
        rows = [[name, *(_seeds(100 * of[f][name] for of in mine) for f in shares)] for name in CRITERIA]
        heads = ["criterion", *(f"{float(f):.0%} removed" for f in shares)]
        yield {"net": NETS[part][0], "weight": weight, "table": table(heads, rows)}


def criteria(lines: list[Line]) -> str:
    """What each criterion means for accuracy, on held-out training images."""
    dense = [line for line in lines if not line["weight"]]
    columns: list[Callable[[str], list[float]]] = [
        lambda name: _values(dense, "top1", criterion=name, epochs=0),
        lambda name: _values(dense, "top1_tuned", criterion=name, epochs=1),
    ]
    rows = [[name, *(_seeds(values(name)) for values in columns)] for name in CRITERIA]
    return table(["criterion", "no fine-tuning", "one epoch"], rows) if dense else ""


def entropies(parts: dict[str, list[Line]]) -> str:
    """Variance against entropy."""
    rows = []
    for part, lines in parts.items():
        if mine := [line["entropy_agreement"] for line in lines if "entropy_agreement" in line]:
            means = (f"{statistics.mean(m[k] for m in mine):.3f}" for k in ("synapses", "channels"))
            rows.append([NETS[part][0], *means])
    heads = ["rank correlation, mean over layers and nets", "of synapses", "of sums by channel"]
    return table(heads, rows) if rows else ""


def regularised(lines: list[Line]) -> str:
    """Does light sparsity help generalisation?"""
    rows = []
    for part in (*NETS, "lambda"):
        trained = [line for line in _of(lines, part) if "top1_train" in line]
        for label in dict.fromkeys(_label(line) for line in trained):
            mine = [line for line in trained if _label(line) == label]
            tops = (_seeds(_values(mine, what)) for what in ("top1_train", "top1"))
            rows.append([f"{mine[0]['net']}, width {mine[0]['width']:g}", label, *tops])
    return table(["net", "penalty", "training images", "others"], rows)


def _best(line: Line) -> float:
    """Top-1 without the synapses, fine-tuned or not."""
    return float(max(line["top1"]["pruned"], line["top1"]["fine-tuned"]))


def at_a_larger_size(lines: Sequence[Line]) -> dict[str, Any] | None:
    """Single runs of `benchmarks.sparse_training.paper`: accuracies by stage, and what compaction leaves."""
    if not lines:
        return None
    rows = []
    for line in sorted(lines, key=lambda line: (line["weight"], line["sparsity"], line["finetune_epochs"])):
        top, pruned, tuned = line["top1"], line["sparsity"] > 0, line["finetune_epochs"]
        stages = [f"{top['pruned']:.2f}" if pruned else "", f"{top['fine-tuned']:.2f}" if tuned else ""]
        left = (f"{100 * line['after'][part] / line['before'][whole]:.1f}" for part, whole in LEFT.values())
        cut = [*left, f"{100 * line['seconds_a_batch']['ratio']:.0f}"] if pruned else [""] * (len(LEFT) + 1)
        rows.append(
            [f"{line['weight']:g}", f"{top['trained']:.2f}", f"{line['sparsity']:.0%}", *stages, *cut]
        )
    stages = ["as trained", "synapses removed", "pruned", "and fine-tuned"]
    trained = {line["weight"]: line["top1"]["trained"] for line in lines}
    dense, *penalised = (trained[weight] for weight in sorted(trained))
    first = lines[0]
    return {
        "net": f"{first['net']}, width {first['width']:g}",
        "epochs": first["recipe"]["epochs"],
        "within": max(
            (f"{x['sparsity']:.0%}" for x in lines if x["weight"] and _best(x) >= dense - 0.5), default="none"
        ),
        "cost": f"{dense - max(penalised):.2f}" if penalised else "",
        "finetune_epochs": max(line["finetune_epochs"] for line in lines),
        "points": f"{max(abs(line['top1']['compacted'] - line['top1']['fine-tuned']) for line in lines):.2f}",
        "seeds": len({line["recipe"]["seed"] for line in lines}),
        "table": table(["penalty", *stages, *LEFT, "time %"], rows),
    }


def published() -> str:
    """Others' numbers, with their sources."""
    names = ("method", "net", "data", "dense", "top1", "before", "after", "source")
    rows = [[entry[name] or "" for name in names] for entry in json.loads(PUBLISHED.read_text())]
    return table(["method", "net", "data", "dense %", "pruned %", "before", "after", "source"], rows)


if __name__ == "__main__":
    print(f"written: {make_page(read_lines(LINES), larger=read_lines(LARGER))}")

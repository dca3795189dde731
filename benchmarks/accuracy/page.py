"""Turn benchmarks/results/accuracy.jsonl into docs/accuracy.md and its plots: no figure is typed in by hand."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.accuracy.criteria import BY_CHANCE, CRITERIA, OURS, named_options
from benchmarks.accuracy.run import resolved
from benchmarks.common import DOCS, RESULTS, made_on
from benchmarks.data.models import NETS
from ss_pruning.config import COMPENSATIONS, METHODS, RELEVANCE_EXPONENT

PAGE = DOCS / "accuracy.md"
#: Criteria in another scope than is theirs, and the columns of the table that compares scopes.
VARIANTS = (f"{OURS}:scope=global", "Magnitude L2:scope=sensitivity")
SHOWN = (*CRITERIA, *VARIANTS)
SCOPES = {
    "Magnitude L2": "Magnitude L2, global",
    VARIANTS[0]: f"{OURS}, global",
    VARIANTS[1]: "Magnitude L2, measured",
    OURS: f"{OURS}, measured",
}
_TOLERANCE = 0.01  # of the dense MACs: how far apart budgets may be

Line = dict[str, Any]
#: Accuracies, one a seed, by criterion and column.
Cells = dict[tuple[str, str], list[float]]

#: Plain cuts by others: they have no use for images without labels.
USELESS = ("none, images", "none, synthetic")
#: What is drawn, each on a scale of its own.
PANELS = {"reconstruct": "reconstruct", "none, images": "plain cut", "none": "plain cut, no image"}
INTRODUCTION = """# Accuracy after pruning

CIFAR-10, top-1 in % on {images} test images. All criteria prune by the same call, `ss_pruning.prune_`, with the same \
groups, the same search for the budget and the same cut; only the scores differ, and how layers compete. Calibration: \
512 unlabelled training images, or *synthetic* ones as the library makes them by default, which needs no image at all. \
{ours} is the default. Given calibration images, it takes its variances from them, and layers compete by the \
output error that was measured on them (`scope="sensitivity"`); where the weights are solved anew (linear, \
reconstruct) it does not count what stronger channels tell already. In the columns *none* and *mean* nobody sees an \
image without a label: its layers compete by relevance in the first, by output error on noise and relevance in \
the second; in *none, images* and *mean, images* (or *synthetic*) they are there, \
for means to be taken from, too; plain cuts by the other criteria have no use for them and are those of *none*. \
Taylor and Hessian also see 512 labelled training images. The others are data-free, and rank the channels of all \
layers by their scores, as they are and divided by the root of what a channel costs; the better one is shown (where \
only the first seed was run with both, the one that was better with it; many cells of *mean* and *linear* were run \
only with the one that had been better with norms left). ± is the standard deviation over seeds \
(draws of images, and chance where it plays a part); without it the result cannot depend on a seed, and was computed \
once. *Then N images*: fine-tuned on N training images, for all in the same way, by `finetune` of the script. \
With *mean* and *linear* the statistics of the batch norms behind the cut are moved at the end as far as what reaches \
them has moved, on the calibration images or, without any, on noise: the default of `prune_`. \
**Bold**: the best of a column. The line below each table tells how far {ours} is from the best, and whether \
that is within one standard deviation (the larger of the two).

Made by `python -m benchmarks.accuracy.run` and `python -m benchmarks.accuracy.run --page` from \
`benchmarks/results/accuracy.jsonl` ({versions}). Runs on a GPU compute in single precision as those on a CPU do \
(no TF32).
"""


def write_page(lines: list[Line], page: Path = PAGE) -> Path:
    """Write tables and plots; of several results for one run the last counts."""
    latest = {_run(line): line for line in lines if line["split"] == "test" and line["criterion"] in SHOWN}
    chosen = [line for line in latest.values() if line["top1"] is not None and not is_outdated(line)]
    if not chosen:
        raise SystemExit("no result yet: run python -m benchmarks.accuracy.run first")
    images = max(line["images"] for line in chosen)
    chosen = [line for line in chosen if line["images"] == images]
    versions = made_on(chosen)
    parts = [INTRODUCTION.format(images=f"{images:,}", ours=OURS, versions=versions)]
    everything, chosen = chosen, [line for line in chosen if line["criterion"] in CRITERIA]
    for net in NETS:
        for residual in (False, True):
            of_net = [line for line in chosen if (line["net"], line["residual"]) == (net, residual)]
            if of_net:
                parts += _net_section(net, residual, of_net, page)
    parts += [*_other_norms(chosen), *_gains(chosen), *_scopes(everything), *_tried(lines), *_noise(lines)]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(parts) + "\n")
    return page


def _run(line: Line) -> tuple[Any, ...]:
    names = (
        "net",
        "macs",
        "criterion",
        "cost_exponent",
        "compensation",
        "seed",
        "calibration",
        "residual",
        "finetune",
        "split",
        "images",
        "recalibrate",
    )
    # Older lines lack some.
    return (*(line.get(name, False) for name in names), line.get("scope", "global"))


def _net_section(net: str, residual: bool, lines: list[Line], page: Path) -> list[str]:
    stream = ", residual stream included" if residual else ""
    parts = [f"## {net}{stream}: dense {lines[0]['dense']:.2f}", "", *_trained(net)]
    plot = page.with_name(f"accuracy_{net}{'_residual' * residual}.svg")
    if _plot(lines, f"{net}{stream}", plot):
        parts += [f"![accuracy against MACs]({plot.name})", ""]
    for macs in sorted({line["macs"] for line in lines}, reverse=True):
        at = [line for line in lines if line["macs"] == macs and is_default(line)]
        parts += [f"### {macs:.0%} of the multiply-accumulates", "", *table(at), *_remarks(at), ""]
    return parts


def _other_norms(lines: list[Line]) -> list[str]:
    """What was run with norms left where by default they are moved, or the other way round."""
    others = [line for line in lines if not is_default(line)]
    points = {(line["net"], line["residual"], line["macs"]) for line in others}
    about = (
        "The same with norms that keep the statistics of the dense net where by default they follow (*norms left*), or "
        "follow where by default they are left (*norms moved*)."
    )
    parts = ["## Norms left as they were", "", about, ""]
    for net, residual, macs in sorted(points, key=lambda p: (NETS.index(p[0]), p[1], -p[2])):
        at = [
            line for line in others if (line["net"], line["residual"], line["macs"]) == (net, residual, macs)
        ]
        stream = ", residual stream included" if residual else ""
        parts += [f"### {net}{stream}, {macs:.0%} of the multiply-accumulates", "", *table(at), ""]
    return parts if points else []


def _trained(net: str) -> list[str]:
    """Where the weights are from, if they were trained here."""
    path = RESULTS / f"train_{net}.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    recipe = f"python -m benchmarks.data.train_cifar {net} --epochs {found['recipe']['epochs']}"
    size = f"{found['parameters'] / 1e6:.2f} M parameters"
    return [f"{size}, trained by `{recipe}`; its log is `benchmarks/results/{path.name}`.", ""]


def cells(lines: Iterable[Line]) -> Cells:
    """Accuracies, one a seed, by criterion and column: compensation, and whether it was fine-tuned."""
    found: dict[tuple[str, str, float], dict[int, float]] = defaultdict(dict)
    for line in sorted(lines, key=lambda line: not line["finetune"]):  # untuned runs have the last word
        criterion, column, weight, seed = (
            line["criterion"],
            column_of(line),
            line["cost_exponent"],
            line["seed"],
        )
        fixed = not _by_chance(criterion, column)
        found[criterion, column, weight][0 if fixed else seed] = line["top1"]  # before any fine-tuning
        if line["finetune"]:
            column += f", then {line['finetune']:,} images"
            found[criterion, column, weight][seed] = line["top1_finetuned"]
    best: Cells = {}
    for (criterion, column, _), by_seed in found.items():
        values, known = list(by_seed.values()), best.get((criterion, column))
        if known is None or (len(values), statistics.mean(values)) > (len(known), statistics.mean(known)):
            best[criterion, column] = values
    plain = {criterion: values for (criterion, column), values in best.items() if column == "none"}
    for column in (column for column in USELESS if (OURS, column) in best):
        best |= {(criterion, column): values for criterion, values in plain.items() if criterion != OURS}
    return best


def is_default(line: Line) -> bool:
    """Whether norms were moved, or left, as `prune_` does by default."""
    return bool(line.get("recalibrate")) == COMPENSATIONS[line["compensation"]]().recalibrate


def is_outdated(line: Line) -> bool:
    """Whether it is a default of ours as it was once: layers compete otherwise today."""
    if line["criterion"] != OURS or not is_default(line):
        return False
    today = resolved(line["compensation"], line["calibration"]).allocation
    return (line.get("scope", "global"), line["cost_exponent"]) != (today.scope, today.cost_exponent)


def column_of(line: Line) -> str:
    """The compensation, and what it calibrated on if that is not what it always does."""
    norms = "" if is_default(line) else ", norms moved" if line.get("recalibrate") else ", norms left"
    images = ", images" if line["calibration"] == "real" and line["compensation"] in ("none", "mean") else ""
    synthetic = ", synthetic" if line["calibration"] == "synthetic" else ""
    return str(line["compensation"]) + synthetic + images + norms


def _columns(found: Cells) -> list[str]:
    def place(column: str) -> tuple[Any, ...]:
        images = int("".join(filter(str.isdigit, column.partition("then")[2])) or 0)
        return images, METHODS.index(column.split(",")[0]), column

    return sorted({column for _, column in found}, key=place)


def table(lines: list[Line]) -> list[str]:
    """One row a criterion, the best of each column in bold, and ours against the best."""
    found = cells(lines)
    columns = _columns(found)
    best = {
        c: max((statistics.mean(v), k) for (k, column), v in found.items() if column == c)[1] for c in columns
    }
    rivals = {c: sum(column == c for _, column in found) > 1 for c in columns}
    rows = [f"| criterion | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for criterion in CRITERIA:
        if not any((criterion, column) in found for column in columns):
            continue
        texts = (spread(found.get((criterion, c), ()), _by_chance(criterion, c)) for c in columns)
        marked = (
            f"**{t}**" if t and best[c] == criterion and rivals[c] else t
            for t, c in zip(texts, columns, strict=True)
        )
        rows.append(f"| {criterion} | {' | '.join(marked)} |")
    distances = (distance(found, column, best[column]) for column in columns)
    rows.append(f"| *{OURS} to the best* | {' | '.join(distances)} |")
    return rows


def distance(found: Cells, column: str, best: str) -> str:
    """How far ours is below the best of a column, and whether chance could be why."""
    ours, others = found.get((OURS, column)), found[best, column]
    if ours is None:
        return ""
    if best == OURS:
        return "best" if sum(c == column for _, c in found) > 1 else "no other was run"
    gap = statistics.mean(others) - statistics.mean(ours)
    deviation = max((statistics.stdev(v) for v in (ours, others) if len(v) > 1), default=0.0)
    return f"-{gap:.2f}, {'within' if gap <= deviation else 'not within'}"


def _by_chance(criterion: str, column: str) -> bool:
    """True if another seed would give another result."""
    free = ("none", "mean") if criterion == OURS else ("none", "mean", *USELESS)
    return criterion in BY_CHANCE or column.partition(", norms")[0] not in free


def spread(values: Iterable[float], by_chance: bool = False) -> str:
    """Mean, and standard deviation where there are several values; says so where they should be more."""
    values = list(values)
    if not values:
        return ""
    mean = f"{statistics.mean(values):.2f}"
    if len(values) == 1:
        return f"{mean} (one seed)" if by_chance else mean
    return f"{mean} ± {statistics.stdev(values):.2f}"


def _remarks(lines: list[Line]) -> list[str]:
    """What a consumer must know about unequal budgets."""
    off = {
        f"{line['criterion']} keeps {line['macs_kept']:.1%}"
        for line in lines
        if abs(line["macs_kept"] - line["macs"]) > _TOLERANCE
    }
    return ["", f"More than {_TOLERANCE:.0%} off the budget: {', '.join(sorted(off))}."] if off else []


def _gains(lines: list[Line]) -> list[str]:
    """What compensation adds to the plain cut, averaged over nets and budgets."""
    plain: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    gains: dict[tuple[str, str], list[float]] = defaultdict(list)
    untuned = [line for line in lines if not line["finetune"]]
    for line in (line for line in untuned if column_of(line) == "none"):
        plain[_point(line)].append(line["top1"])
    for line in (line for line in untuned if column_of(line) != "none" and _point(line) in plain):
        gains[line["criterion"], column_of(line)].append(line["top1"] - statistics.mean(plain[_point(line)]))
    if not gains:
        return []
    columns = _columns(gains)
    parts = ["## What compensation adds", "", "Points over the plain cut, mean over all nets, budgets and seeds above.",
             "", f"| criterion | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]  # fmt: skip
    for criterion in CRITERIA:
        values = [gains.get((criterion, column), []) for column in columns]
        if any(values):
            texts = (f"{statistics.mean(v):+.1f} ({len(v)} runs)" if v else "" for v in values)
            parts.append(f"| {criterion} | {' | '.join(texts)} |")
    return parts


def _scopes(lines: list[Line]) -> list[str]:
    """What the scores do, and what the scope does."""
    of_scope: dict[tuple[str, float], Cells] = {}
    points = {(line["net"], line["macs"]) for line in lines}
    for net, macs in sorted(points, key=lambda point: (NETS.index(point[0]), -point[1])):
        at = [line for line in lines if (line["net"], line["macs"], line["residual"]) == (net, macs, False)]
        found = cells(at)
        if (
            sum((name, "reconstruct") in found for name in SCOPES) > 1
            and (VARIANTS[0], "reconstruct") in found
        ):
            of_scope[net, macs] = found
    if not of_scope:
        return []
    parts = ["", "## Scores and scope", "", "With reconstruct. *Global*: scores rank the channels of all layers. "
             "*Measured*: scores rank the channels of a layer, and layers compete by measured output error.", "",
             f"| net, MACs | {' | '.join(SCOPES.values())} |", "|---|" + "---:|" * len(SCOPES)]  # fmt: skip
    for (net, macs), found in of_scope.items():
        texts = (spread(found.get((name, "reconstruct"), ()), by_chance=True) for name in SCOPES)
        parts.append(f"| {net}, {macs:.0%} | {' | '.join(texts)} |")
    return parts


def _tried(lines: list[Line]) -> list[str]:
    """What was weighed, on training images, for cuts that have no image to measure output error on."""
    tried = [line for line in _without_images(lines) if not _is_about_noise(line)]
    if not tried:
        return []
    found: dict[tuple[str, float], dict[tuple[Any, ...], float]] = defaultdict(dict)
    for line in tried:
        place = NETS.index(line["net"]), -line["macs"], METHODS.index(line["compensation"])
        point = *place, column_of(line)
        found[line["criterion"], line["cost_exponent"]][point] = line["top1"]
    points = sorted({point for at in found.values() for point in at})
    heads = [f"{NETS[net]}, {-macs:.0%}, {column}" for net, macs, _, column in points]
    parts = ["", "## Cuts without images: what was tried", "", f"Top-1 in % on {tried[0]['images']:,} training images, "
             "which are what choices are made on; one run each. First row: the default: relevance, divided by "
             f"cost to the power {RELEVANCE_EXPONENT:g}.",
             "", f"| scores | cost exponent | {' | '.join(heads)} |", "|---|---:|" + "---:|" * len(heads)]  # fmt: skip
    default = (OURS, RELEVANCE_EXPONENT)
    for (criterion, weight), at in sorted(found.items(), key=lambda item: (item[0] != default, item[0])):
        options = {k: v for k, v in named_options(criterion).items() if k != "cost_exponent"}
        name = criterion.partition(":")[0] + "".join(f", {key}={value}" for key, value in options.items())
        texts = (f"{at[point]:.1f}" if point in at else "" for point in points)
        parts.append(f"| {name} | {weight:g} | {' | '.join(texts)} |")
    return parts


def _noise(lines: list[Line]) -> list[str]:
    """What it is worth to measure output error on noise, for plain cuts and for means."""
    found: dict[tuple[str, float], dict[tuple[str, float], float]] = defaultdict(dict)
    tried = [line for line in _without_images(lines) if _is_about_noise(line)]
    plain = [
        line for line in _without_images(lines) if (line["criterion"], line["compensation"]) == (OURS, "none")
    ]
    for line in (*plain, *tried):
        way = "sensitivity" if line.get("scope") == "sensitivity" else "global"
        found[f"{line['compensation']}, {way}", line["cost_exponent"]][line["net"], line["macs"]] = line[
            "top1"
        ]
    points = sorted({point for at in found.values() for point in at}, key=lambda p: (NETS.index(p[0]), -p[1]))
    heads = [f"{net}, {macs:.0%}" for net, macs in points]
    parts = ["", "## Output error measured on noise", "", "Top-1 in % on training images, one run each, without "
             "any image to calibrate on. *Global*: layers compete by relevance, divided by cost; *sensitivity*: "
             "by output error on noise and relevance.",
             "", f"| compensation, scope | cost exponent | {' | '.join(heads)} |",
             "|---|---:|" + "---:|" * len(points)]  # fmt: skip
    for (way, weight), at in sorted(found.items(), reverse=True):
        texts = (f"{at[point]:.1f}" if point in at else "" for point in points)
        parts.append(f"| {way} | {weight:g} | {' | '.join(texts)} |")
    return parts if tried else []


def _without_images(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line["split"] == "train" and line["calibration"] == "none"]


def _is_about_noise(line: Line) -> bool:
    """Whether layers competed by output error on noise, or were run beside it."""
    return line.get("scope") == "sensitivity" or bool(line.get("recalibrate"))


def _point(line: Line) -> tuple[Any, ...]:
    """What a gain is counted within; ours weighs costs as its scope does by default, which compensation changes."""
    weight = None if line["criterion"] == OURS else line["cost_exponent"]
    return line["net"], line["macs"], line["criterion"], weight, line["residual"]


def _plot(lines: list[Line], title: str, path: Path) -> bool:
    """Accuracy against MACs, reconstructed and plain cuts side by side. False where there is one budget only."""
    curves: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(dict)
    real = [line for line in lines if line["calibration"] != "synthetic"]
    for macs in {line["macs"] for line in real}:
        found = cells(line for line in real if line["macs"] == macs)
        for (criterion, column), values in found.items():
            if column in PANELS:
                curves[criterion, column][macs] = values
    budgets = {c: {m for (_, of), at in curves.items() if of == c for m in at} for c in PANELS}
    shown = [c for c in PANELS if len(budgets[c]) > 1]
    if not shown:
        return False
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "ss-pruning"  # the same file for the same results
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(shown), squeeze=False, figsize=(1.5 + 4 * len(shown), 4), layout="constrained"
    )
    figure.suptitle(title)
    for axes, compensation in zip(panels[0], shown, strict=True):
        for number, criterion in enumerate(CRITERIA):
            points = sorted(curves.get((criterion, compensation), {}).items())
            means = [statistics.mean(values) for _, values in points]
            if points:
                axes.plot([macs for macs, _ in points], means, color=f"C{number}", marker="o", label=criterion,
                          linewidth=2.5 if criterion == OURS else 1.2)  # fmt: skip
        axes.axhline(lines[0]["dense"], color="0.6", linewidth=0.8, linestyle=":", label="dense")
        axes.set(xlabel="share of multiply-accumulates kept", title=PANELS[compensation])
    panels[0][0].set_ylabel("top-1 %")
    panels[0][0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return True

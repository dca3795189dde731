"""Which runs count, and what a table of accuracies says of them: one cell a criterion and a column."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from benchmarks.accuracy.criteria import BY_CHANCE, CRITERIA, OURS
from benchmarks.accuracy.run import resolved
from benchmarks.pages import spread, table
from ss_pruning.config import COMPENSATIONS, METHODS

Line = dict[str, Any]
#: Accuracies, one a seed, by criterion and column.
Cells = dict[tuple[str, str], list[float]]

#: Plain cuts by others: they have no use for images without labels.
USELESS = ("none, images", "none, synthetic")
SEEDS = 3


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
        fixed = not by_chance(criterion, column)
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


def columns_of(found: Cells) -> list[str]:
    def place(column: str) -> tuple[Any, ...]:
        images = int("".join(filter(str.isdigit, column.partition("then")[2])) or 0)
        return images, METHODS.index(column.split(",")[0]), column

    return sorted({column for _, column in found}, key=place)


def accuracy_table(lines: Iterable[Line]) -> str:
    """One row a criterion, the best of each column in bold, and ours against the best."""
    found = cells(lines)
    columns = columns_of(found)
    best = {column: best_of(found, column) for column in columns}
    rivals = {c: sum(column == c for _, column in found) > 1 for c in columns}

    def text(criterion: str, column: str) -> str:
        cell = text_of(found, criterion, column)
        return f"**{cell}**" if cell and best[column] == criterion and rivals[column] else cell

    shown = [name for name in CRITERIA if any((name, column) in found for column in columns)]
    rows = [[name, *(text(name, column) for column in columns)] for name in shown]
    distances = [distance(found, column, best[column]) for column in columns]
    return table(["criterion", *columns], [*rows, [f"*{OURS} to the best*", *distances]])


def best_of(found: Cells, column: str) -> str:
    """The criterion with the highest mean in a column."""
    return max((statistics.mean(values), name) for (name, of), values in found.items() if of == column)[1]


def text_of(found: Cells, criterion: str, column: str) -> str:
    """A cell; what chance plays no part in was computed once, and is not marked for it."""
    seeds = SEEDS if by_chance(criterion, column) else 1
    return spread(found.get((criterion, column), ()), seeds=seeds)


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


def by_chance(criterion: str, column: str) -> bool:
    """True if another seed would give another result."""
    free = ("none", "mean") if criterion == OURS else ("none", "mean", *USELESS)
    return criterion in BY_CHANCE or column.partition(", norms")[0] not in free

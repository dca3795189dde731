"""Summary and page of the coverage run."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.common import DOCS, RESULTS, write
from benchmarks.coverage.names import NAMED, Candidate

TIMES = RESULTS / "prune_times.json"
PAGE = DOCS / "coverage.md"
SIDE_NAMES = {"ours": "ss-pruning", "tp": "Torch-Pruning"}
#: What a status means.
STATUSES = {
    "ok": "pruned; runs, trains, and equals the masked dense model",
    "wrong": "runs, but its output is not the masked dense model's",
    "broken": "the pruned model's forward, or a training step, fails",
    "error": "an exception while building the graph or pruning",
    "timeout": "more CPU time than allowed",
    "refused": "refused with an error that says why; the model is as it was",
    "nothing": "no parameter was removed",
    "killed": "the process died or hung",
    "dense fails": "the dense model itself does not run here",
}
#: Short forms of the reasons for leaving channels whole.
REASONS = {
    "reaches the model's output": "output",
    "feeds several channels at once": "broadcast",
    "is fed by the model's input": "no producer",
    "no layer that ran reads it": "unread",
    "nothing that ran reads it": "unread",  # in earlier results
    "all channels of a layer hang together": "hang together",
    "the forward pass relies on its width": "forward",
}
TOLERANCE, LEAST_REMOVED, SLOW = 1e-10, 0.25, 60
Lines = Mapping[tuple[str, str], Mapping[str, Any]]


def summary(specs: Sequence[str], lines: Lines, side: str) -> dict[str, Any]:
    """Counts and extremes of one side."""
    found = [lines[spec, side] for spec in specs if (spec, side) in lines]
    ok = [line for line in found if line["status"] == "ok"]
    errors = [exact(line) for line in ok]
    return {
        "models": len(found),
        "statuses": dict(Counter(line["status"] for line in found).most_common()),
        "ok": len(ok),
        "share": len(ok) / max(1, len(found)),
        "compared": sum(e is not None for e in errors),
        "max_error": max((e for e in errors if e is not None), default=None),
        "seconds_median": median(line["seconds"] for line in ok) if ok else None,
        "seconds_most": max((line["seconds"] for line in found), default=None),
        "removed_median": median(line["removed"] for line in ok) if ok else None,
        "little_removed": {
            line["spec"]: round(line["removed"], 3) for line in ok if line["removed"] < LEAST_REMOVED
        },
        "slow": {line["spec"]: line["seconds"] for line in found if line["seconds"] > SLOW},
        "codes": sorted({line["code"] for line in found}),
    }


def exact(line: Mapping[str, Any]) -> float | None:
    """Difference between cut and masked: the side's own if it has one, else the outside check's, else unknown."""
    if "max_error" in line:
        return float(line["max_error"])
    error = line.get("masked_error")
    return None if error is None or (line.get("mixers") and error > TOLERANCE) else float(error)


def write_all(
    candidates: Iterable[Candidate],
    lines: Lines,
    versions: Mapping[str, str],
    timeout: float,
    code: str,
) -> None:
    """Write `results/coverage.json` and `docs/coverage.md`.

    Args:
        candidates: The models.
        lines: Results by model and side.
        versions: Of the packages.
        timeout: CPU seconds a model and side.
        code: The present version of what our results depend on.
    """
    models = list(candidates)
    specs = [c.spec for c in models]
    sides = {side: summary(specs, lines, side) for side in SIDE_NAMES}
    machine = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": 1,
        "system": platform.system(),
    }
    facts = {
        "limit": timeout,
        "models_listed": len(specs),
        "machine": machine,
        "sides": sides,
    }
    write(
        "coverage", {**facts, "models": [dict(lines[key]) for key in sorted(lines) if key[0] in set(specs)]}
    )
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(
        "\n".join([*_head(facts, versions, code), *_table(models, lines), *_failures(specs, lines)]) + "\n"
    )


def _head(facts: Mapping[str, Any], versions: Mapping[str, str], code: str) -> list[str]:
    sides, machine = facts["sides"], facts["machine"]
    stack = ", ".join(f"{name} {number}" for name, number in versions.items())
    rows = [
        (f"models run, of {facts['models_listed']}", lambda s: s["models"]),
        ("work", lambda s: f"**{s['ok']} ({s['share']:.1%})**"),
        *((status, lambda s, status=status: s["statuses"].get(status, 0)) for status in list(STATUSES)[1:]),
        ("largest difference to the masked model", lambda s: _error(s["max_error"])),
        ("working models in which that could be compared", lambda s: s["compared"]),
        ("median of parameters removed", lambda s: _percent(s["removed_median"])),
        ("median CPU seconds", lambda s: _seconds(s["seconds_median"])),
        ("most CPU seconds", lambda s: _seconds(s["seconds_most"])),
    ]
    return [
        "# Coverage",
        "",
        "Generated by `python -m benchmarks.coverage.run`; do not edit. One small variant of every convolutional or "
        "hybrid family of timm and torchvision (the rule is in `benchmarks/coverage/names.py`), and the architectures "
        "that were known to be hard. Random weights, one image, half of the channels of every layer (local ratio 0.5), "
        "the classifier kept. Plain Torch-Pruning is `BasePruner` with `GroupMagnitudeImportance`. Each model and side "
        f"in a process of its own, {facts['limit']:g} s of CPU time at most for building, scoring and cutting.",
        "",
        *_unfinished(sides, facts["models_listed"]),
        f"Machine: {machine['machine']}, {machine['cores']} cores (shared with other work), one thread. {stack}.",
        "",
        "| | " + " | ".join(SIDE_NAMES.values()) + " |",
        "|---|---:|---:|",
        *(
            f"| {label} | " + " | ".join(str(value(sides[side])) for side in SIDE_NAMES) + " |"
            for label, value in rows
        ),
        "",
        *_times(code),
        *_acceptance(facts),
        *(f"- *{status}*: {meaning}." for status, meaning in STATUSES.items()),
        "",
        "**Difference**: largest difference between the outputs of the cut model and of the dense model with the "
        "removed channels zeroed in what reads them, relative to the largest output, in float64. ss-pruning's is its "
        "report's; norms that span channels run on the kept channels alone there (a smaller layer cannot do "
        "otherwise). Torch-Pruning's is measured from outside by zeroing; a dash where such norms make that no "
        "comparison.",
        "",
        "**Excluded**, in percent of the output channels of all layers: *output*: reaches the model's output; "
        "*broadcast*: feeds several channels at once (a gate, a softmax or attention); *forward*: the forward pass "
        "relies on the width, found by trying on a copy; *no producer*, *unread*, *hang together*: see "
        "`Report.excluded`.",
        "",
    ]


def _times(code: str) -> list[str]:
    """CPU seconds on the models that both prune, side by side, as `benchmarks.coverage.prune_times` measured them."""
    if not TIMES.is_file():
        return ["How long both take was not measured: `python -m benchmarks.coverage.prune_times`.", ""]
    times = json.loads(TIMES.read_text())
    every, rest = times["all"], times["rest"]
    slow = ", ".join(spec.partition(":")[2] for spec in every["slow"])
    rows = [(f"all {every['models']} models", every)]
    if slow:
        rows.append((f"without {slow}", rest))
    text = [
        f"CPU seconds in all on {every['models']} of the {times['listed']} models that both prune, from a fresh model "
        "to a cut one, in turns in one process (`python -m benchmarks.coverage.prune_times`; copying the model and "
        "what the first call in a process costs are left out). *Same*: `prune_` with Torch-Pruning's own "
        "`GroupMagnitudeImportance`; *default*: with the one of ss-pruning, which runs the net on noise. *Verified*: "
        "with the check of the cut on a copy, which `prune_` always does and Torch-Pruning does not. In brackets, the "
        "share of Torch-Pruning's time.",
        "",
        "| | Torch-Pruning | same | verified | default | verified |",
        "|---|---:|---:|---:|---:|---:|",
        *(f"| {label} | {' | '.join(_shares(sums))} |" for label, sums in rows),
        "",
    ]
    if slow:
        text += [f"Torch-Pruning's total is mostly that of a few models ({slow}); hence the second row.", ""]
    if every["codes"] != [code]:
        text += ["These times are not all of the present version of the code.", ""]
    return text


def _shares(sums: Mapping[str, Any]) -> list[str]:
    tp = sums["seconds"]["tp"]
    ours = [sums[kind][name] for name in ("same", "default") for kind in ("bare", "seconds")]
    return [f"{tp:.1f}", *(f"{seconds:.1f} ({seconds / tp:.2f})" for seconds in ours)]


#: Why little goes, where the reasons that the report gives do not tell it all.
WHY_LITTLE = {
    "efficientnet_cc": "the kernels of its large convolutions are mixed at run time, from a flat matrix (a row an "
    "expert) by a routing layer: no layer holds them, so nothing in the channel graph can shrink them",
}


def _acceptance(facts: Mapping[str, Any]) -> list[str]:
    """Which models miss one of the goals."""
    ours = facts["sides"]["ours"]
    slow = ", ".join(f"{s} {t:.0f} s" for s, t in ours["slow"].items()) or "none"
    text = [
        f"- Works on at least 98% of the families that were run: **{'yes' if ours['share'] >= 0.98 else 'no'}** "
        f"({ours['ok']} of {ours['models']}, of {facts['models_listed']} in the list).",
        f"- Takes more than {facts['limit']:g} s: {slow}.",
        f"- Loses less than {LEAST_REMOVED:.0%} of its parameters: {', '.join(ours['little_removed']) or 'none'}.",
    ]
    for name, reason in WHY_LITTLE.items():
        if any(name in spec for spec in ours["little_removed"]):
            text.append(f"  {name}: {reason}.")
    return [*text, ""]


def _unfinished(sides: Mapping[str, Any], listed: int) -> list[str]:
    """Says where the results are not those of one complete run of one version of the code."""
    notes = []
    for side, name in SIDE_NAMES.items():
        models, codes = sides[side]["models"], len(sides[side]["codes"])
        if models < listed or codes > 1:
            notes.append(f"{name}: {models} of {listed} models, by {codes} version(s) of the code")
    return (
        [f"**Not one complete run.** {'; '.join(notes)}. Run it again to complete it.", ""] if notes else []
    )


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _table(models: Sequence[Candidate], lines: Lines) -> list[str]:
    header = ["model", "px", "params", *("status", "s", "removed", "difference") * 2, "excluded"]
    rows = []
    named = set(NAMED.split())
    for c in sorted(models, key=lambda c: c.spec):
        ours, theirs = (lines.get((c.spec, side), {}) for side in SIDE_NAMES)
        name = c.spec.removeprefix("timm:")
        millions = ours.get("params_before", theirs.get("params_before", c.params)) / 1e6
        pixels = ours.get("pixels", theirs.get("pixels", ""))
        cells = [f"{name}{' *' if name in named else ''}", str(pixels), f"{millions:.1f} M"]
        rows.append(" | ".join([*cells, *_side(ours), *_side(theirs), _left(ours)]))
    columns = "|".join(["---", "---:", "---:", *("---", "---:", "---:", "---:") * 2, "---"])
    return [
        "## All models",
        "",
        "First ss-pruning, then Torch-Pruning. A star marks architectures known to be hard.",
        "",
        f"| {' | '.join(header)} |",
        f"|{columns}|",
        *(f"| {row} |" for row in rows),
        "",
    ]


def _side(line: Mapping[str, Any]) -> list[str]:
    if not line:
        return ["not run", "", "", ""]
    ok = line["status"] == "ok"
    figures = [_percent(line["removed"]), _error(exact(line))] if ok else ["", ""]
    return [line["status"], _seconds(line["seconds"]) if "seconds" in line else "", *figures]


def _left(line: Mapping[str, Any]) -> str:
    outputs = line.get("outputs")
    if not outputs:
        return ""
    parts = []
    for reason, channels in line.get("excluded", {}).items():
        short = next((s for long, s in REASONS.items() if reason.startswith(long)), reason[:30])
        parts.append(f"{short} {channels / outputs:.0%}")
    return ", ".join(parts)


def _failures(specs: Sequence[str], lines: Lines) -> list[str]:
    text = []
    for side, name in SIDE_NAMES.items():
        failed = [
            lines[s, side] for s in sorted(specs) if lines.get((s, side), {}).get("status", "ok") != "ok"
        ]
        text += [f"## What fails: {name}", ""]
        text += [f"- {line['spec']}: {line['status']}, {_clean(line.get('error', ''))}" for line in failed]
        text += ["" if failed else "Nothing.\n"]
    return text


def _clean(error: str) -> str:
    one = " ".join(error.split())
    return one.replace("|", "/").replace("<", "&lt;")[:200]

"""Turn benchmarks/results/coverage.jsonl into docs/coverage.md: no figure is typed in by hand.

python -m benchmarks.coverage.page
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import DOCS, RESULTS
from benchmarks.coverage.names import NAMED, Candidate, default_names
from benchmarks.coverage.run import TIMEOUT, latest, read_lines
from benchmarks.pages import table, write_page

TIMES = RESULTS / "prune_times.json"
PAGE = DOCS / "coverage.md"
SIDES = {"ours": "ss-pruning", "tp": "Torch-Pruning"}
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
#: Short forms of the reasons for excluding channels.
REASONS = {
    "reaches the model's output": "output",
    "feeds several channels at once": "broadcast",
    "is fed by the model's input": "no producer",
    "no layer that ran reads it": "unread",
    "nothing that ran reads it": "unread",  # in earlier results
    "all channels of a layer hang together": "hang together",
    "the forward pass relies on its width": "forward",
}
#: Why little goes, where the reasons that the report gives do not tell it all.
WHY_LITTLE = {
    "efficientnet_cc": "the kernels of its large convolutions are mixed at run time, from a flat matrix (a row an "
    "expert) by a routing layer: no layer holds them, so nothing in the channel graph can shrink them",
}
TOLERANCE, LEAST_REMOVED, SLOW = 1e-10, 0.25, 60
HEADS = ("model", "px", "params", *("status", "s", "removed", "difference") * 2, "excluded")
Line = Mapping[str, Any]
Lines = Mapping[tuple[str, str], Line]


def make_page(candidates: Iterable[Candidate], lines: Lines, page: Path = PAGE) -> Path:
    """Write the page.

    Args:
        candidates: The models.
        lines: Results by model and side.
        page: Where to.
    """
    models = sorted(candidates, key=lambda c: c.spec)
    sides = {side: _summary([c.spec for c in models], lines, side) for side in SIDES}
    little = sides["ours"]["little_removed"]
    rows = [_row(c, *(lines.get((c.spec, side), {}) for side in SIDES)) for c in models]
    return write_page(
        page,
        "coverage",
        summary=_counts(sides, len(models)),
        statuses=STATUSES,
        times=_times(),
        slow=", ".join(f"{spec} {seconds:.0f} s" for spec, seconds in sides["ours"]["slow"].items()),
        little=", ".join(little),
        why={n: why for n, why in WHY_LITTLE.items() if any(n in spec for spec in little)},
        limit=TIMEOUT,
        least=LEAST_REMOVED,
        models=table(HEADS, rows, "lrrlrrrlrrrl"),
        failures={name: list(_failures(models, lines, side)) for side, name in SIDES.items()},
        states={name: len(sides[side]["codes"]) for side, name in SIDES.items()},
        versions=sorted({code.partition(" ")[2] for of in sides.values() for code in of["codes"]}),
    )


def _summary(specs: Sequence[str], lines: Lines, side: str) -> dict[str, Any]:
    """Counts and extremes of one side."""
    found = [lines[spec, side] for spec in specs if (spec, side) in lines]
    ok = [line for line in found if line["status"] == "ok"]
    errors = [error for line in ok if (error := exact(line)) is not None]
    return {
        "models": len(found),
        "statuses": Counter(line["status"] for line in found),
        "ok": len(ok),
        "share": len(ok) / max(1, len(found)),
        "compared": len(errors),
        "max_error": max(errors, default=None),
        "seconds_median": median(line["seconds"] for line in ok) if ok else None,
        "removed_median": median(line["removed"] for line in ok) if ok else None,
        "little_removed": [line["spec"] for line in ok if line["removed"] < LEAST_REMOVED],
        "slow": {line["spec"]: line["seconds"] for line in found if line.get("seconds", 0) > SLOW},
        "codes": {line["code"] for line in found},
    }


def exact(line: Line) -> float | None:
    """Difference between cut and masked: the side's own if it has one, else the outside check's, else unknown."""
    if "max_error" in line:
        return float(line["max_error"])
    error = line.get("masked_error")
    return None if error is None or (line.get("mixers") and error > TOLERANCE) else float(error)


def _counts(sides: Mapping[str, Mapping[str, Any]], listed: int) -> str:
    """How many models work, and how those fail that do not: statuses that no side has are left out."""
    failed = [name for name in STATUSES if name != "ok" and any(s["statuses"][name] for s in sides.values())]
    rows = {
        f"models run, of {listed}": lambda s: s["models"],
        "work": lambda s: f"**{s['ok']} ({s['share']:.1%})**",
        **{name: lambda s, name=name: s["statuses"][name] for name in failed},
        "largest difference to the masked model": lambda s: (
            f"{_error(s['max_error'])} (of {s['compared']} models)"
        ),
        "median of parameters removed": lambda s: _percent(s["removed_median"]),
        "median CPU seconds": lambda s: _seconds(s["seconds_median"]),
    }
    return table(
        ["", *SIDES.values()], ([label, *map(value, sides.values())] for label, value in rows.items())
    )


def _times() -> dict[str, Any] | None:
    """CPU seconds on the models that both prune, side by side, as `benchmarks.coverage.prune_times` measured them."""
    if not TIMES.is_file():
        return None
    times = json.loads(TIMES.read_text())
    every, rest = times["all"], times["rest"]
    slow = ", ".join(spec.partition(":")[2] for spec in every["slow"])
    rows = [[f"all {every['models']} models", *_shares(every)]]
    if slow:
        rows.append([f"without {slow}", *_shares(rest)])
    heads = ["", "Torch-Pruning", "same", "verified", "default", "verified"]
    return {
        "models": every["models"],
        "listed": times["listed"],
        "slow": slow,
        "states": len(every["codes"]),
        "table": table(heads, rows),
    }


def _shares(sums: Mapping[str, Any]) -> list[str]:
    tp = sums["seconds"]["tp"]
    ours = [sums[kind][name] for name in ("same", "default") for kind in ("bare", "seconds")]
    return [f"{tp:.1f}", *(f"{seconds:.1f} ({seconds / tp:.2f})" for seconds in ours)]


def _row(candidate: Candidate, ours: Line, theirs: Line) -> list[str]:
    name = candidate.spec.removeprefix("timm:") + " *" * (
        candidate.spec.removeprefix("timm:") in NAMED.split()
    )
    millions = ours.get("params_before", theirs.get("params_before", candidate.params)) / 1e6
    pixels = ours.get("pixels", theirs.get("pixels", ""))
    return [name, str(pixels), f"{millions:.1f} M", *_side(ours), *_side(theirs), _excluded(ours)]


def _side(line: Line) -> list[str]:
    if not line:
        return ["not run", "", "", ""]
    figures = [_percent(line["removed"]), _error(exact(line))] if line["status"] == "ok" else ["", ""]
    return [line["status"], _seconds(line["seconds"]) if "seconds" in line else "", *figures]


def _excluded(line: Line) -> str:
    parts = []
    for reason, channels in line.get("excluded", {}).items() if line.get("outputs") else ():
        short = next((s for long, s in REASONS.items() if reason.startswith(long)), reason[:30])
        parts.append(f"{short} {channels / line['outputs']:.0%}")
    return ", ".join(parts)


def _failures(models: Iterable[Candidate], lines: Lines, side: str) -> Iterable[dict[str, str]]:
    for line in (lines.get((c.spec, side), {"status": "ok"}) for c in models):
        if line["status"] != "ok":
            error = " ".join(line.get("error", "").split()).replace("|", "/").replace("<", "&lt;")[:200]
            yield {"spec": line["spec"], "status": line["status"], "error": error}


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    print(f"written: {make_page(default_names(), latest(read_lines()))}")

"""Turn benchmarks/results/coverage_elsewhere.json into docs/coverage_elsewhere.md: no figure is typed in by hand.

python -m benchmarks.coverage.elsewhere_page
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common import DOCS
from benchmarks.coverage.elsewhere import read
from benchmarks.coverage.fresh import WAYS
from benchmarks.coverage.worker import SIDES
from benchmarks.pages import table, write_page

PAGE = DOCS / "coverage_elsewhere.md"
HEADS = ("library", "model", "ss-pruning", "parameters removed", "fresh and default", "Torch-Pruning")
FRESH_HEADS = (
    *("library", "model", "fresh and default", "CPU s", "parameters kept", "difference", "excluded"),
    *("local 0.5", "parameters kept", "CPU s"),
)
Line = dict[str, Any]


def make_page(result: dict[str, Any], page: Path = PAGE) -> Path:
    """Write the page: side by side with Torch-Pruning, then fresh and by default."""
    lines, fresh, used = result["lines"], result.get("fresh", []), result["made_with"]
    ours = [line for line in lines if line["side"] == "ours"]
    known = {library: version for library, version in result["libraries"].items() if version}
    versions = known | {name: used[name] for name in ("torch", "torch-pruning")}
    codes = {line["code"].split()[0] for line in fresh}
    return write_page(
        page,
        "coverage_elsewhere",
        works={side: _works(lines, side=side) for side in SIDES},
        models=len(_names(lines)),
        worst=max((x["masked_error"] for x in ours if "masked_error" in x and not x["mixers"]), default=0),
        table=_side_by_side(lines, fresh),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        missing=[library for library in result["libraries"] if library not in known],
        older=bool(fresh) and result.get("code") not in codes,
        fresh=_fresh(fresh),
        fresh_models=len(_names(fresh)),
        fresh_works={way: _works(fresh, way=way) for way in WAYS},
        fresh_versions=dict.fromkeys(f"{x['library']} {x['version']}, torch {x['torch']}" for x in fresh),
        codes=len(codes),
        reasons=dict.fromkeys(_short(left["reason"]) for x in fresh for left in x.get("excluded", [])),
    )


def _names(lines: list[Line]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((line["library"], line["name"]) for line in lines))


def _works(lines: list[Line], **of: str) -> int:
    return sum(line["status"] == "ok" and of.items() <= line.items() for line in lines)


def _side_by_side(lines: list[Line], fresh: list[Line]) -> str:
    found = {(x["library"], x["name"], x["side"]): x for x in lines}
    default = {(x["library"], x["name"]): x for x in fresh if x["way"] == "default"}
    rows = []
    for key in _names(lines):
        ours, theirs = (found[(*key, side)] for side in ("ours", "tp"))
        removed = f"{ours['removed']:.0%}" if "removed" in ours else ""
        alone = _status(default[key]) if key in default else "not run"
        rows.append([*key, _status(ours), removed, alone, _status(theirs)])
    return table(HEADS, rows, "lllrll")


def _fresh(lines: list[Line]) -> str:
    found = {(x["library"], x["name"], x["way"]): x for x in lines}
    rows = []
    for key in _names(lines):
        default, local = (found[(*key, way)] for way in ("default", "local"))
        how = [_status(default), f"{default['seconds']:.1f}", _kept(default), _difference(default)]
        rows.append([*key, *how, _excluded(default), _status(local), _kept(local), f"{local['seconds']:.1f}"])
    return table(FRESH_HEADS, rows, "lllrrlllrr") if rows else ""


def _kept(line: Line) -> str:
    return f"{line['params_kept']:.0%}" if "params_kept" in line else ""


def _difference(line: Line) -> str:
    if "max_error" not in line:
        return ""
    return f"{line['max_error']:.0e}" + " by decisions" * line["by_decisions"]


def _excluded(line: Line) -> str:
    counts: dict[str, list[int]] = {}
    for left in line.get("excluded", []):
        count = counts.setdefault(_short(left["reason"]).partition(" (")[0], [0, 0])
        count[0] += len(left["paths"])
        count[1] += left["channels"]
    return "; ".join(f"{reason}: {layers}, {channels}" for reason, (layers, channels) in counts.items())


def _short(reason: str) -> str:
    """A reason without what is said of one layer."""
    return reason.partition(":")[0]


def _status(line: Line) -> str:
    first = line.get("error", "").split("\n")[0].replace("|", "/")[:100]
    return line["status"] + (f": {first}" if first else "")


if __name__ == "__main__":
    print(f"written: {make_page(read())}")

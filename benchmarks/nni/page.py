"""Put the table of benchmarks/results/nni_compaction.json into docs/nni.md: no figure is typed in by hand.

python -m benchmarks.nni.page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common import DOCS, RESULTS
from benchmarks.nni.run import MASKS, TIMM, TORCHVISION
from benchmarks.pages import render, table, write_part

PAGE = DOCS / "nni.md"
PRUNERS = {"ours": "SynapticStrengthPruner", "l1": "NNI's L1NormPruner"}
HEADS = (
    *(
        "model, masks, pruner",
        "params",
        "compact",
        "norms masked",
        "diff. float64",
        "diff. float32",
        "seconds",
    ),
    *("ModelSpeedup: params", "diff. float32 or error", "diff. norms masked"),
)


def make_page(result: dict[str, Any], page: Path = PAGE) -> Path:
    """Rewrite the tables between the markers."""
    order = [f"{n} {kind} {pruner}" for n in (*TORCHVISION, *TIMM) for kind in MASKS for pruner in PRUNERS]
    cases = sorted(result["cases"].items(), key=lambda item: order.index(item[0]))
    facts = {
        "size": result["size"],
        "versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        "cases": table(HEADS, (_row(key, case) for key, case in cases if "compact" in case), "lrrrrrrrlr"),
        "global_ratio": _global_ratio(result.get("global_ratio", {})),
    }
    return write_part(page, "results", render("nni", **facts))


def _global_ratio(rows: dict[str, dict[str, Any]]) -> str:
    found = [
        [PRUNERS[pruner], f"{row['cpu_seconds']:.1f}", f"{row['ratio']:.6f}", row["empty_layers"]]
        for pruner, row in rows.items()
    ]
    return table(["pruner", "CPU seconds", "ratio reached", "empty layers"], found) if found else ""


def _row(key: str, case: dict[str, Any]) -> list[str]:
    ours = case["compact"]
    star = " \\*" if "do not fit" in case["masks"] else ""
    differences = [f"{ours[f'difference_{precision}']:.0e}" for precision in ("float64", "float32")]
    sizes = [_thousands(n) for n in (case["params"], ours["params"], ours.get("params_norms_masked"))]
    return [key + star, *sizes, *differences, f"{ours['seconds']:.0f}", *_speedup(case.get("speedup"))]


def _speedup(found: dict[str, Any] | None) -> list[str]:
    """By NNI's ModelSpeedup: parameters, difference or error, difference with norms masked."""
    if found is None:
        return ["", "not run", ""]
    if "error" in found:
        return ["", found["error"], ""]
    differences = (f"{found[key]:.0e}" for key in ("difference_float32", "difference_norms_masked"))
    return [_thousands(found["params"]), *differences]


def _thousands(n: int | None) -> str:
    return "" if n is None else f"{n / 1e3:,.0f}"


if __name__ == "__main__":
    print(f"written: {make_page(json.loads((RESULTS / 'nni_compaction.json').read_text()))}")

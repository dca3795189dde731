"""What the benchmark scripts share: where the data is, which versions ran, and how results are written."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
DATA = ROOT / ".." / "shared" / "data"
MISSING = "not installed"


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    names = ("torch", "torchvision", "torch-pruning", "timm", "nni", "ss-pruning")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return MISSING


def made_on(lines: Iterable[dict[str, Any]]) -> str:
    """On what the results were computed, and with which versions, most of them first."""
    counts = Counter(
        (place(line), ", ".join(f"{k} {v}" for k, v in line["versions"].items() if v != MISSING))
        for line in lines
    )
    return "; ".join(f"on {where}: {installed}" for (where, installed), _ in counts.most_common())


def place(line: dict[str, Any]) -> str:
    """The GPU by its name, or a CPU; lines from before GPUs say nothing."""
    machine = line.get("machine", {"device": "cpu"})
    return "a CPU" if machine["device"] == "cpu" else f"one {machine['name']}"


def write(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write a result as JSON; a consumer never sees half of it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps({**result, "versions": versions()}, indent=2) + "\n")
    os.replace(part, path)
    return path

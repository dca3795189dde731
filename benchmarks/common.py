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


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The results so far; a last line that a killed run left unfinished is dropped from the file."""
    if not path.is_file():
        return []
    text = path.read_text()
    whole, _, rest = text.rpartition("\n")
    if rest:
        part = path.with_suffix(".part")
        part.write_text(f"{whole}\n" if whole else "")
        os.replace(part, path)
    return [json.loads(line) for line in whole.splitlines()]


def add_line(line: dict[str, Any], path: Path) -> None:
    """Append a result; it is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())

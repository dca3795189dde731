"""Fill the README's results from the files in `benchmarks/results`: no figure is typed in by hand.

python -m benchmarks.readme_results
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
COLUMNS = {"plain cut": "", "mean, no data": "_mean", "reconstruct, 512 unlabelled images": "_reconstruct"}


def load(name: str) -> dict[str, Any] | None:
    """One result file, or None if that benchmark was not run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def cell(result: dict[str, Any], criterion: str) -> str:
    """Accuracy of a criterion, with its standard deviation where it was run several times."""
    row = next((r for r in result["rows"] if r["criterion"] == criterion), None)
    if row is None:
        return ""
    values = row["top1"]
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def accuracy_table(model: str, macs: str) -> list[str]:
    """Top-1 by criterion and compensation, one net at one budget."""
    loaded = {title: load(f"cifar_criteria_{model}_{macs}{suffix}") for title, suffix in COLUMNS.items()}
    results = {title: result for title, result in loaded.items() if result is not None}
    plain = results.get("plain cut")
    if plain is None:
        return []
    images, dense = plain["settings"]["images"], plain["dense"]
    lines = [
        f"CIFAR-10 {model} at {float(macs):.0%} of its multiply-accumulates, no fine-tuning; top-1 in % on {images:,} "
        f"test images, dense {dense:.2f} (residual stream whole, for all criteria; ±: standard deviation over seeds):",
        "",
        f"| criterion | {' | '.join(results)} |",
        "|---|" + "---:|" * len(results),
    ]
    for row in plain["rows"]:
        name = row["criterion"]
        lines.append(f"| {name} | " + " | ".join(cell(result, name) for result in results.values()) + " |")
    versions = ", ".join(f"{key} {value}" for key, value in plain["versions"].items())
    command = f"`python -m benchmarks.cifar_criteria --model {model} --macs {macs}`"
    others = [
        f"`--compensation {suffix[1:]}`" for title, suffix in COLUMNS.items() if suffix and title in results
    ]
    return [*lines, "", f"{command}, and with {' and '.join(others)} ({versions}).", ""]


def coverage_lines() -> list[str]:
    """How many architectures work, from the coverage run's own summary."""
    page = README.parent / "docs" / "coverage.md"
    return [
        "Which of timm's and torchvision's architectures work: [docs/coverage.md](docs/coverage.md).",
        "",
    ] * page.is_file()


def main() -> None:
    """Rewrite what stands between the markers."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = [*accuracy_table("resnet56", "0.7"), *accuracy_table("resnet20", "0.7"), *coverage_lines()]
    README.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"{END}{after}")
    print(f"{README.name}: {len(lines)} lines between the markers")


if __name__ == "__main__":
    main()

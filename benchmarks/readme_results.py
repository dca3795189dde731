"""Fill the README's results from the files in `benchmarks/results`: no figure is typed in by hand.

python -m benchmarks.readme_results
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.accuracy import LINES, read_lines
from benchmarks.accuracy_page import table

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
#: Nets and shares of the MACs that are shown; docs/accuracy.md has the rest.
SHOWN = (("resnet56", 0.7), ("resnet56", 0.47), ("resnet20", 0.7))


def accuracy_table(net: str, macs: float, lines: list[dict[str, Any]]) -> list[str]:
    """Top-1 by criterion and compensation, one net at one budget, before fine-tuning."""
    settings = {"net": net, "macs": macs, "split": "test", "residual": False, "finetune": 0, "images": 10_000}
    chosen = [line for line in lines if all(line[name] == value for name, value in settings.items())]
    chosen = [line for line in chosen if not line.get("reestimate")]
    if not chosen:
        return []
    title = (
        f"CIFAR-10 {net} at {macs:.0%} of its multiply-accumulates, no fine-tuning; top-1 in % on 10,000 test images, "
        f"dense {chosen[0]['dense']:.2f} (residual stream whole, for all criteria; ±: standard deviation over seeds):"
    )
    command = f"`python -m benchmarks.accuracy --nets {net} --macs {macs:g}`"
    versions = ", ".join(f"{key} {value}" for key, value in chosen[-1]["versions"].items())
    return [title, "", *table(chosen), "", f"{command} ({versions}).", ""]


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
    results = read_lines(LINES)
    lines = [line for net, macs in SHOWN for line in accuracy_table(net, macs, results)]
    if results:
        lines += ["Other nets and budgets, with plots: [docs/accuracy.md](docs/accuracy.md).", ""]
    lines += coverage_lines()
    README.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"{END}{after}")
    print(f"{README.name}: {len(lines)} lines between the markers")


if __name__ == "__main__":
    main()

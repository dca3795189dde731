"""Fill the README's results from the files in `benchmarks/results`: no figure is typed in by hand.

python -m benchmarks.readme_results
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.accuracy import LINES, read_lines
from benchmarks.accuracy_criteria import CRITERIA, OURS
from benchmarks.accuracy_page import cells, spread, table
from benchmarks.common import made_on

README = Path(__file__).resolve().parent.parent / "README.md"
#: What stands first: net, share of the MACs, and rows as (criterion, column, words).
HEADLINE = ("resnet56", 0.47)
ROWS = (
    ("Magnitude L2", "none", "cut by weight magnitude"),
    (OURS, "none", "cut by the scores of ss-pruning, no image"),
    (OURS, "none, images", "cut by ss-pruning, damage measured on 512 unlabelled images"),
    (OURS, "reconstruct", "cut and compensated by ss-pruning, 512 unlabelled images"),
    (OURS, "reconstruct, distilled", "the same without any image"),
)
#: Nets and shares of the MACs that are shown; docs/accuracy.md has the rest.
SHOWN = (("resnet56", 0.47), ("resnet20", 0.7), ("vgg16bn", 0.5), ("densenet", 0.5))


def _before_tuning(net: str, macs: float, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    settings = {"net": net, "macs": macs, "split": "test", "residual": False, "images": 10_000}
    chosen = [line for line in lines if all(line[name] == value for name, value in settings.items())]
    chosen.sort(key=lambda line: not line["finetune"])  # those that were tuned were measured before it, too
    chosen = [line for line in chosen if not line.get("reestimate") and line["criterion"] in CRITERIA]
    return [{**line, "finetune": 0} for line in chosen]


def headline(lines: list[dict[str, Any]]) -> list[str]:
    """What is left right after the cut."""
    net, macs = HEADLINE
    chosen = _before_tuning(net, macs, lines)
    if not chosen:
        return []
    found = cells(chosen)
    rows = [f"| CIFAR-10 {net}, {macs:.0%} of its MACs, before any fine-tuning | top-1 % |", "|---|---:|"]
    rows.append(f"| dense | {chosen[0]['dense']:.2f} |")
    for criterion, column, words in ROWS:
        if (criterion, column) in found:
            rows.append(f"| {words} | {spread(found[criterion, column], column != 'none')} |")
    return [*rows, ""]


def accuracy_table(net: str, macs: float, lines: list[dict[str, Any]]) -> list[str]:
    """Top-1 by criterion and compensation, one net at one budget, before fine-tuning."""
    chosen = _before_tuning(net, macs, lines)
    if not chosen:
        return []
    stream = "residual stream whole, for all criteria; " if net.startswith("resnet") else ""
    title = (
        f"CIFAR-10 {net} at {macs:.0%} of its multiply-accumulates, no fine-tuning; top-1 in % on 10,000 test images, "
        f"dense {chosen[0]['dense']:.2f} ({stream}±: standard deviation over seeds):"
    )
    command = f"`python -m benchmarks.accuracy --nets {net} --macs {macs:g}`"
    command += ", once for each way to give images that it names"
    return [title, "", *table(chosen), "", f"{command} ({made_on(chosen)}).", ""]


def coverage_lines() -> list[str]:
    """Where it stands which architectures work."""
    pages = {
        "coverage": "Which of timm's and torchvision's architectures work",
        "coverage_elsewhere": "and of other libraries, YOLO and U-Nets among them",
    }
    there = [
        f"{words}: [docs/{name}.md](docs/{name}.md)"
        for name, words in pages.items()
        if (README.parent / "docs" / f"{name}.md").is_file()
    ]
    return [f"{'; '.join(there)}.", ""] * bool(there)


def main() -> None:
    """Rewrite what stands between the markers."""
    results = read_lines(LINES)
    lines = [line for net, macs in SHOWN for line in accuracy_table(net, macs, results)]
    if results:
        lines += ["Other nets and budgets, with plots: [docs/accuracy.md](docs/accuracy.md).", ""]
    lines += coverage_lines()
    text = README.read_text()
    for name, part in (("headline", headline(results)), ("results", lines)):
        before, begin, rest = text.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        text = before + begin + "\n" + "\n".join(part) + end + after
    README.write_text(text)
    print(f"{README.name}: {len(lines)} lines of results")


if __name__ == "__main__":
    main()

"""Fill the README's results from the files in `benchmarks/results`: no figure is typed in by hand.

python -m benchmarks.accuracy.readme
"""

from __future__ import annotations

from typing import Any

from benchmarks.accuracy.criteria import CRITERIA, OURS
from benchmarks.accuracy.lite0 import LINES as LITE0_LINES
from benchmarks.accuracy.lite0_page import spread as lite0_spread
from benchmarks.accuracy.page import cells, is_default, is_outdated, spread, table
from benchmarks.accuracy.run import LINES, read_lines
from benchmarks.common import ROOT, made_on
from benchmarks.latency.page import of_line, place_of, what_of
from benchmarks.latency.run import LINES as TIMES

README = ROOT / "README.md"
#: What stands first: net, share of the MACs, and rows as (criterion, compensation, calibrated on, words).
HEADLINE = ("resnet56", 0.47)
ROWS = (
    ("Magnitude L2", "none", "none", "cut by weight magnitude"),
    (OURS, "none", "none", "cut by the scores of ss-pruning, no image"),
    (OURS, "none", "mixed", "cut by ss-pruning, sensitivity measured on unlabelled images"),
    (OURS, "reconstruct", "mixed", "cut and compensated by ss-pruning, unlabelled images"),
    (OURS, "reconstruct", "synthetic", "the same without any image"),
)
#: The column of docs/accuracy.md for a compensation and what it is calibrated on.
COLUMNS = {
    ("none", "none"): "none",
    ("none", "mixed"): "none, images",
    ("reconstruct", "mixed"): "reconstruct",
    ("reconstruct", "synthetic"): "reconstruct, synthetic",
}
LITE0 = {"macs": 0.8, "side": 224, "all": False, "calibrated_on": 256}
#: Nets and shares of the MACs that are shown; docs/accuracy.md has the rest.
SHOWN = (("resnet56", 0.47), ("resnet20", 0.7), ("vgg16bn", 0.5), ("densenet", 0.5))


def _before_tuning(net: str, macs: float, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    settings = {"net": net, "macs": macs, "split": "test", "residual": False, "images": 10_000}
    chosen = [line for line in lines if all(line[name] == value for name, value in settings.items())]
    chosen.sort(key=lambda line: not line["finetune"])  # those that were tuned were measured before it, too
    chosen = [line for line in chosen if line["criterion"] in CRITERIA and is_default(line)]
    chosen = [line for line in chosen if not is_outdated(line)]
    return [{**line, "finetune": 0} for line in chosen]


def headline(lines: list[dict[str, Any]], lite0: list[dict[str, Any]]) -> list[str]:
    """What is left right after the cut, of a net for CIFAR-10 and of one for ImageNet."""
    net, macs = HEADLINE
    chosen = _before_tuning(net, macs, lines)
    others = [line for line in lite0 if all(line[name] == value for name, value in LITE0.items())]
    if not chosen or not others:
        return []
    found = cells(chosen)
    images = others[0]["imagenet"]["images"]
    rows = [
        f"| top-1 in %, before any fine-tuning | {net}, CIFAR-10, {macs:.0%} of its MACs "
        f"| EfficientNet-Lite0, ImageNet, {LITE0['macs']:.0%} of its MACs |",
        "|---|---:|---:|",
        f"| dense | {chosen[0]['dense']:.2f} | {others[0]['imagenet']['dense_top1']:.1f} |",
    ]
    for criterion, compensation, source, words in ROWS:
        column = COLUMNS[compensation, source]
        what = {"criterion": criterion, "compensation": compensation, "calibration": source}
        tops = [line["imagenet"]["top1"] for line in others if all(line[k] == v for k, v in what.items())]
        first = spread(found[criterion, column], column != "none") if (criterion, column) in found else ""
        second = lite0_spread(tops, 1) if source != "none" else f"{tops[0]:.1f}"
        rows.append(f"| {words} | {first} | {second} |")
    note = (
        f"512 images to calibrate on and 10,000 test images for {net}; {LITE0['calibrated_on']} images and only "
        f"{images} crops of 20 labelled photos for EfficientNet-Lite0, so that a point or two means nothing there "
        "([docs/lite0.md](docs/lite0.md)). ±: standard deviation over 3 draws."
    )
    return [*rows, "", note, ""]


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
    command = f"`python -m benchmarks.accuracy.run --nets {net} --macs {macs:g}`"
    command += ", once for each way to give images that it names"
    return [title, "", *table(chosen), "", f"{command} ({made_on(chosen)}).", ""]


def times(lines: list[dict[str, Any]], net: str = "resnet50") -> list[str]:
    """What was asked for and how much time is left, on each machine; of several runs the last."""
    latest = {what_of(line): line for line in lines if line["net"] == net}.values()
    rows = []
    for line in latest:
        if line["part"] == "budget" or (line["part"] == "settings" and line["machine"]["device"] == "cuda"):
            kept, time = line["facts"]["default"]["macs_kept"], line["comparison"]["ratios"]["default"]
            rows.append((place_of(line), str(of_line(line)), "`macs=0.5`", kept, time))
        elif line["part"] == "targets":
            asked = f"`latency={line['target']}`"
            rows.append((place_of(line), str(of_line(line)), asked, line["macs_kept"], line["again"]))
    if not rows:
        return []
    rows.sort(key=lambda row: row[:3])
    head = [f"| {net}, 224 pixels, on | in | asked for | MACs kept | time kept |", "|---|---|---|---:|---:|"]
    return [*head, *(f"| {a} | {b} | {c} | {d:.3f} | {e:.3f} |" for a, b, c, d, e in rows), ""]


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
    for name, part in (
        ("headline", headline(results, read_lines(LITE0_LINES))),
        ("times", times(read_lines(TIMES))),
        ("results", lines),
    ):
        before, begin, rest = text.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        text = before + begin + "\n" + "\n".join(part) + end + after
    README.write_text(text)
    print(f"{README.name}: {len(lines)} lines of results")


if __name__ == "__main__":
    main()

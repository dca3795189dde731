"""Does fine-tuning in two processes end where it ends in one? Same images, same global batch, accuracy over seeds.

    python -m benchmarks.sparse_training.two_processes --data FOLDER  # Fashion-MNIST; or --dataset cifar10
    python -m benchmarks.sparse_training.two_processes --page  # writes the table of docs/distributed.md

A subset of the images is written as folders. Each net is trained on it once, in one process; from there
`examples.finetune_timm` prunes and fine-tunes it for each seed, under `torchrun` with one process and with two (gloo,
on CPU). One line is one run; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import DATA, DOCS, RESULTS, ROOT, add_line, read_lines, versions
from benchmarks.data.cifar import draw, load_dataset
from benchmarks.pages import render, spread, table, write_part

LINES = RESULTS / "two_processes.jsonl"
PAGE = DOCS / "distributed.md"
NAME = "two processes"
HEADS = (
    *("model", "images", "dense", "one process", "two processes", "difference", "within noise"),
    *("same plan on both ranks", "same plan as one process", "seeds"),
)
NETS = ("resnet18", "mobilenetv3_small_050")
#: Images to train on and to test on.
COUNTS = {"train": 1500, "test": 1000}
BATCH, MACS = 64, 0.6
COMMON = ("--size", "32", "--crop", "0.7", "--batch", str(BATCH), "--workers", "0", "--cpu", "--ema", "0.9")
DENSE = ("--epochs", "6", "--rate", "0.05", "--warm-up", "1")
PRUNED = ("--epochs", "2", "--rate", "0.02", "--prune-epoch", "0", "--macs", str(MACS))


def write_folders(dataset: str, source: Path, target: Path) -> None:
    """Images of 32x32 as `target/train/LABEL/NUMBER.png` and `target/val/...`; whole, or not there."""
    if target.is_dir():
        return
    from PIL import Image

    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for split, count in COUNTS.items():
        pixels, labels = draw(
            load_dataset(dataset, source, "train" if split == "train" else "test"), count, 0
        )
        for number, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
            folder = part / ("train" if split == "train" else "val") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    part.rename(target)


def finetuned(net: str, data: Path, out: Path, processes: int, *options: str) -> dict[str, Any]:
    """Run the example under torchrun: top-1 at the end, and to what each process cut its model."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m")
    command = [sys.executable, "-m", *launcher, "examples.finetune_timm", net, *COMMON, *options]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | os.environ
    done = subprocess.run(
        [*command, "--data", str(data), "--out", str(out)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    # two processes may write at once, on one line
    cuts = dict(re.findall(r"process (\d+) was cut to ([0-9a-f]{16})", done.stdout))
    log = json.loads((out / "log.json").read_text("utf-8"))
    return {"top1": log[-1]["top1"], "loss": log[-1]["loss"], "cuts": [cuts[rank] for rank in sorted(cuts)]}


def measure(options: argparse.Namespace) -> None:
    """All runs that have no line yet."""
    data = options.runs / f"{options.dataset}-{COUNTS['train']}"
    write_folders(options.dataset, options.data, data)
    done = {(line["dataset"], line["net"], line["seed"], line["processes"]) for line in read_lines(LINES)}
    for net in options.nets:
        dense = options.runs / f"{options.dataset}-{net}"
        if not (dense / "final.safetensors").is_file():
            finetuned(net, data, dense, 1, *DENSE)
        start = json.loads((dense / "log.json").read_text("utf-8"))[-1]["top1"]
        for seed in options.seeds:
            for processes in (1, 2):
                what = {"dataset": options.dataset, "net": net, "seed": seed, "processes": processes}
                if tuple(what.values()) in done:
                    continue
                out = options.runs / f"{options.dataset}-{net}-seed{seed}-of{processes}"
                shutil.rmtree(out, ignore_errors=True)  # a run that was killed would not say how it cut
                weights = ("--weights", str(dense / "final.safetensors"), "--seed", str(seed))
                found = finetuned(net, data, out, processes, *PRUNED, *weights)
                line = {**what, "dense": start, **found, "images": COUNTS, "options": (*COMMON, *PRUNED)}
                add_line({**line, "versions": versions()}, LINES)
                print(what, found, flush=True)


def rows(lines: list[dict[str, Any]]) -> Iterator[list[str]]:
    """One row a net: mean and standard deviation over seeds, and whether the difference is more than noise."""
    for dataset, net in dict.fromkeys((line["dataset"], line["net"]) for line in lines):
        here = [line for line in lines if (line["dataset"], line["net"]) == (dataset, net)]
        by = {count: {line["seed"]: line for line in here if line["processes"] == count} for count in (1, 2)}
        seeds = sorted(by[1].keys() & by[2].keys())
        if len(seeds) < 2:
            continue
        one, two = ([by[count][seed]["top1"] for seed in seeds] for count in (1, 2))
        difference = statistics.mean(two) - statistics.mean(one)
        error = ((statistics.variance(one) + statistics.variance(two)) / len(seeds)) ** 0.5
        same = all(set(by[1][seed]["cuts"]) == set(by[2][seed]["cuts"]) for seed in seeds)
        alike = all(len(by[2][seed]["cuts"]) == 2 and len(set(by[2][seed]["cuts"])) == 1 for seed in seeds)
        yield [net, dataset, f"{here[0]['dense']:.2f}", spread(one, seeds=2), spread(two, seeds=2),
               f"{difference:+.2f} ± {error:.2f}", "yes" if abs(difference) <= 2 * error else "NO",
               "yes" if alike else "NO", "yes" if same else "no", ", ".join(map(str, seeds))]  # fmt: skip


def write_page(lines: list[dict[str, Any]], page: Path = PAGE) -> Path:
    """Rewrite the table between the markers."""
    versions = (
        ", ".join(f"{name} {version}" for name, version in lines[-1]["versions"].items()) if lines else ""
    )
    cells = table(HEADS, rows(lines), "llrrrrllll")
    return write_part(page, NAME, render("two_processes", table=cells, last=lines[-1:], versions=versions))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nets", nargs="+", default=list(NETS), help="names of timm models")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dataset", choices=("cifar10", "fashion-mnist"), default="fashion-mnist")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the images")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "two_processes", help="for what is in between"
    )
    parser.add_argument("--page", action="store_true", help="write the table, measure nothing")
    options = parser.parse_args()
    if options.page:
        print(f"written: {write_page(read_lines(LINES))}")
    else:
        measure(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())

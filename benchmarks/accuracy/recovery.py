"""How much accuracy `recover_` brings back: nets x budgets x seeds x lengths, without labels, on CIFAR-10.

A net is cut by `prune_` with `reconstruct` on 512 training images without labels, drawn by the seed, and recovered on
the same ones. With `--source synthetic` no image is used: images are made from batch norms, for the cut and for the
recovery. With `--source labels` the cut is fine-tuned with the labels of the 512 images instead, on no more of them
than that many steps see. The residual stream of the ResNets stays whole. Each length is a training of its own, from
the cut on.

    python -m benchmarks.accuracy.recovery resnet20:0.5 --steps 1000 --seeds 0 1 2
    python -m benchmarks.accuracy.recovery resnet20:0.5 --steps 60 125 250 500 --seeds 0 --source labels
    python -m benchmarks.accuracy.recovery resnet56:0.47 --steps 250 1000 --source synthetic
    python -m benchmarks.accuracy.recovery resnet56:0.47 --images 50000 --steps 7810 --dtype bfloat16
    python -m benchmarks.accuracy.recovery resnet20:0.5 --steps 200 --split train --rate 0.002
    python -m benchmarks.accuracy.recovery --page

Each run adds a line to benchmarks/results/recovery.jsonl; what is there is not run again. `--page` turns the lines into
docs/recovery.md. Choices are made on `--split train`: 3,000 training images that are not among the 512.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

import ss_pruning
from benchmarks.accuracy import recovery_curve
from benchmarks.accuracy.run import finetune
from benchmarks.common import DATA, DOCS, RESULTS, made_on, versions
from benchmarks.data.cifar import Images, as_input, draw, load, top1
from benchmarks.data.models import load_net, stream_layers
from ss_pruning.profiling.latency import machine

LINES = RESULTS / "recovery.jsonl"
#: Images that a net is cut on, and recovered on unless told.
COUNT = 512
#: Of the images of a recovery, so many at most are held out.
HELD_OUT = 1000
#: Images a step of recovery.
STEP = 64
#: What was hoped for before any of it was built, top-1 in %.
AIMS = {
    ("resnet20", 0.5, "images", COUNT): 89.6,
    ("resnet56", 0.47, "images", COUNT): 92.7,
    ("resnet56", 0.3, "images", COUNT): 89.5,
    ("vgg16bn", 0.5, "images", COUNT): 84.0,
    ("densenet", 0.3, "images", COUNT): 82.5,
    ("resnet56", 0.47, "synthetic", COUNT): 91.0,
    ("resnet56", 0.47, "images", 50_000): 93.0,
}
#: What lines from before there was a choice were run with.
_ONCE = {"images": COUNT, "dtype": None}
_ROW = ("net", "macs", "source", "images", "steps", "dtype")
_KEY = ("net", "macs", "source", "seed", "split", "rate", "images", "dtype", "steps")
Line = dict[str, Any]


def known() -> list[Line]:
    lines = LINES.read_text().splitlines() if LINES.is_file() else ()
    return [{**_ONCE, **json.loads(line)} for line in lines]


def scored(split: str, train: Images, data: Path, seed: int) -> Images:
    """The images that accuracy is measured on."""
    if split == "test":
        return load(data, "test")
    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed + 1))
    used = set(draw((torch.arange(len(train[0])), train[1]), COUNT, seed)[0].tolist())
    chosen = [i for i in order.tolist() if i not in used][:3000]
    return train[0][chosen], train[1][chosen]


def cut(dense: nn.Module, net: str, macs: float, images: Any, x: torch.Tensor) -> tuple[nn.Module, float]:
    """The pruned net, and the minutes that it took."""
    model, begin = copy.deepcopy(dense), time.perf_counter()
    ignore = stream_layers(model) if net.startswith("resnet") else ()  # type: ignore[arg-type]
    ss_pruning.prune_(model, x[:1], macs=macs, compensation="reconstruct", calibration=images, ignore=ignore)
    return model, (time.perf_counter() - begin) / 60


def runs(options: argparse.Namespace) -> Iterator[Line]:
    """One line a length, of those that are not known yet."""
    done = {tuple(line[name] for name in _KEY) for line in known()}
    train = load(options.data, "train")
    for seed, (net, macs) in ((s, n) for s in options.seeds for n in options.nets):
        setting = (
            net,
            macs,
            options.source,
            seed,
            options.split,
            options.rate,
            options.images,
            options.dtype,
        )
        lengths = [steps for steps in options.steps if (*setting, steps) not in done]
        if not lengths:
            continue
        drawn, test = draw(train, COUNT, seed), scored(options.split, train, options.data, seed)
        x = as_input(drawn[0])
        synthetic = ss_pruning.SyntheticImages(seed=seed) if options.source == "synthetic" else None
        more = synthetic or as_input(draw(train, options.images, seed)[0])
        settings = ss_pruning.Recovery(
            rate=options.rate,
            seed=seed,
            dtype=options.dtype,
            held_out=min(ss_pruning.Recovery().held_out, HELD_OUT / options.images),
        )
        dense = load_net(net, options.data, options.weights)
        pruned, minutes = cut(dense, net, macs, synthetic or x, x)
        before = {"dense": top1(dense, test), "cut": top1(pruned, test), "minutes_cut": minutes}
        for steps in lengths:
            model, begin, began = copy.deepcopy(pruned), time.perf_counter(), time.process_time()
            if options.source == "labels":
                finetune(model, drawn, steps * STEP, seed)
                noted = {}
            else:
                noted = recovered(model, dense, more, steps, settings)
            yield {
                **dict(zip(_KEY, (*setting, steps), strict=True)),
                **before,
                "minutes": (time.perf_counter() - begin) / 60,
                "cpu_minutes": (time.process_time() - began) / 60,
                "recovered": top1(model, test),
                **noted,
                "machine": machine(x.device),
                "versions": versions(),
            }


def recovered(
    model: nn.Module, dense: nn.Module, images: Any, steps: int, settings: ss_pruning.Recovery
) -> Line:
    """Recover the model, and say how that went."""
    report = ss_pruning.recover_(
        model, dense, images, example_inputs=torch.zeros(1, 3, 32, 32), steps=steps, settings=settings
    )
    errors = {"error_before": report.before.error, "error_after": report.after.error}
    return {"best_step": report.best_step, **errors}


def page(lines: Iterable[Line]) -> str:
    """docs/recovery.md: what was measured on test images."""
    lines = [line for line in lines if line["split"] == "test"]
    cells = defaultdict(list)
    for line in (line for line in lines if line["source"] != "labels"):
        cells[tuple(line[name] or "" for name in _ROW)].append(line)
    rows = [
        "| model | MACs kept | images | steps | minutes | dense | cut + reconstruct | recovered | aim | seeds |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (net, macs, source, images, steps, dtype), found in sorted(cells.items()):
        value = {name: mean(line[name] for line in found) for name in ("dense", "cut", "recovered")}
        minutes = mean(line.get("cpu_minutes", line["minutes"]) for line in found)
        aim = AIMS.get((net, macs, source, images))
        which = f"{images:,}, unlabelled" if source == "images" else "none (synthetic)"
        length = f"{steps:,}, {dtype}" if dtype else f"{steps:,}"
        reached = "-" if aim is None else f"{aim:.1f} ({value['recovered'] - aim:+.2f})"
        rows.append(
            f"| {net} | {macs:.2f} | {which} | {length} | {minutes:.1f} | {value['dense']:.2f} | "
            f"{value['cut']:.2f} | **{value['recovered']:.2f}** | {reached} | {len(found)} |"
        )
    return "\n".join(
        [
            "# Recovery, measured",
            "",
            "Top-1 in % on the 10,000 test images of CIFAR-10, mean over the seeds: after `prune_` with `reconstruct`, "
            "and after [`recover_`](recovery_how.md) on the same images. Each length is a training of its own, so the "
            "rows of a model are its accuracy against minutes. The aims were set beforehand. Rate and places were "
            "chosen on ResNet-20 and training images; the other nets had no say. Minutes are CPU "
            "time of one thread; of runs before it was noted they passed while other work shared the CPU.",
            "",
            *rows,
            "",
            *recovery_curve.section(lines),
            f"Made by `python -m benchmarks.accuracy.recovery`, {made_on(lines)}.",
            "",
        ]
    )


def net_and_macs(text: str) -> tuple[str, float]:
    name, _, macs = text.partition(":")
    return name, float(macs)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("nets", nargs="*", type=net_and_macs, metavar="NET:MACS")
    parser.add_argument("--steps", nargs="+", type=int, default=[1000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--source", choices=("images", "synthetic", "labels"), default="images")
    parser.add_argument("--images", type=int, default=COUNT, help="images to recover on")
    parser.add_argument("--dtype", choices=("bfloat16",), help="mixed precision in recovery's steps")
    parser.add_argument("--split", choices=("test", "train"), default="test")
    parser.add_argument("--rate", type=float, default=ss_pruning.Recovery().rate)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--weights", type=Path, default=Path("runs"))
    parser.add_argument("--page", action="store_true", help="write docs/recovery.md")
    options = parser.parse_args(argv)
    if options.split == "train" and options.images != COUNT:
        parser.error("--split train scores training images: it goes with no other --images")
    for line in runs(options) if options.nets else ():
        print({k: v for k, v in line.items() if k not in ("machine", "versions")}, flush=True)
        with LINES.open("a") as file:
            file.write(json.dumps(line) + "\n")
    if options.page:
        (DOCS / "recovery.md").write_text(page(known()))
        recovery_curve.draw(known(), DOCS / recovery_curve.PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())

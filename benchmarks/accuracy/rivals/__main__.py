"""Top-1 after compensations of others and ours, on the same channels and the same images, on CIFAR-10.

    OMP_NUM_THREADS=1 python -m benchmarks.accuracy.rivals resnet20:0.5 resnet56:0.47 vgg16bn:0.5
    OMP_NUM_THREADS=1 python -m benchmarks.accuracy.rivals vgg16bn:0.7 --seeds 0 --ways grail reconstruct

Each run is a line of benchmarks/results/rivals.jsonl, and what is there is not run again; docs/rivals.md is made of the
lines on test images. Every seed draws 512 training images, whose labels are not used; what needs none is run once. The
residual stream of the ResNets stays whole.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch_pruning as tp
from torch import Tensor, nn

import ss_pruning
from benchmarks.accuracy.recovery import net_and_macs, scored
from benchmarks.accuracy.rivals import page
from benchmarks.accuracy.rivals.ways import CHANNELS, PATH, POINTS, WAYS, Line, Way, key
from benchmarks.common import DATA, add_line, read_lines, versions
from benchmarks.data.cifar import Images, as_input, draw, load, top1
from benchmarks.data.models import CifarResNet, load_net, stream_layers
from ss_pruning._utils.copying import copied
from ss_pruning.compensation.batchnorm import recalibrate_
from ss_pruning.graph.traced import TracedModel
from ss_pruning.importance.calibration import Batch
from ss_pruning.profiling.latency import machine
from ss_pruning.profiling.macs import count_macs
from ss_pruning.surgery.plan import Plan

IMAGES = 512


def chosen(model: nn.Module, macs: float, channels: str, x: Tensor, images: Tensor | None) -> Plan:
    """Which channels stay.

    Args:
        model: The dense one.
        macs: Share of the multiply-accumulates to keep.
        channels: "magnitude": the filters of largest L1 norm, the same share in each layer; "ours": by default.
        x: An input.
        images: What ours may look at.
    """
    how: dict[str, object] = {"importance": _filter_norms(), "allocation": "local"}
    if channels == "ours":
        how = {"calibration": images, "compensation": "mean" if images is None else "reconstruct"}
    plan, _ = ss_pruning.plan(model, x, macs=macs, ignore=_stays(model), **how)
    return replace(plan, biases=())  # a repair may give some


def _stays(model: nn.Module) -> list[str]:
    """Layers whose outputs stay: those that write the residual stream."""
    return stream_layers(model) if isinstance(model, CifarResNet) else []


def _filter_norms() -> tp.importance.Importance:
    return tp.importance.GroupMagnitudeImportance(p=1, group_reduction="first", normalizer=None)


def repaired(traced: TracedModel, plan: Plan, way: Way, images: Batch | None) -> nn.Module:
    """The smaller model."""
    small = plan.cut_copy(copied(traced.model))
    way.repair(small, traced, plan, images)
    if way.recalibrates:
        recalibrate_(small, traced, plan, images, images is not None)
    return small


def runs(net: str, macs: float, seed: int, options: argparse.Namespace, train: Images) -> Iterator[Line]:
    """What is missing of one net, budget and draw of images."""
    done = {key(line) for line in read_lines(options.results)}
    point = {"net": net, "macs": macs, "seed": seed, "split": options.split}
    todo = [{**point, "channels": channels, "way": way} for channels in CHANNELS for way in options.ways]
    todo = [run for run in todo if key(run) not in done and (WAYS[run["way"]].images or not seed)]
    if not todo:
        return
    model = load_net(net, options.data, options.weights).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = as_input(draw(train, IMAGES, seed)[0])
    tested = draw(scored(options.split, train, options.data, seed), options.images, seed=0)
    traced = TracedModel.of(model, x[:1], _stays(model))
    dense, plans = top1(model, tested), {}
    for run in todo:
        way = WAYS[run["way"]]
        which = run["channels"], way.images
        if which not in plans:
            plans[which] = chosen(model, macs, run["channels"], x[:1], x if way.images else None)
        began = time.process_time()
        small = repaired(traced, plans[which], way, Batch.of(x) if way.images else None)
        seconds = time.process_time() - began
        kept = count_macs(small, x[:1])[0] / count_macs(model, x[:1])[0]
        found = {
            "top1": top1(small, tested),
            "dense": dense,
            "macs_kept": kept,
            "cpu_seconds": round(seconds, 2),
        }
        yield {**run, **found, "images": len(tested[1]), "machine": machine(x.device), "versions": versions()}


def main() -> int:
    """Run what is missing, and write the page."""
    options = _arguments()
    torch.set_num_threads(1)
    train = load(options.data, "train")
    for seed in options.seeds:
        for net, macs in options.nets:
            for line in runs(net, macs, seed, options, train):
                add_line(line, options.results)
                print({k: v for k, v in line.items() if k not in ("machine", "versions")}, flush=True)
    if options.results == PATH:
        page.write(read_lines(PATH))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("nets", nargs="*", type=net_and_macs, metavar="NET:MACS", default=list(POINTS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="draws of images")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="images to measure on")
    parser.add_argument("--images", type=int, default=10_000, help="measure on so many, from a fixed shuffle")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--weights", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=PATH)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

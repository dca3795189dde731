"""Top-1 of nets with attention after pruning, ours beside others at the same multiply-accumulates, on CIFAR-10.

    OMP_NUM_THREADS=1 python -m benchmarks.accuracy.attention --weights runs
    OMP_NUM_THREADS=1 python -m benchmarks.accuracy.attention --nets vit6 --macs 0.5 --ways recovered
    OMP_NUM_THREADS=1 python -m benchmarks.accuracy.attention --split train --seeds 0    # what choices are made on

Each run is a line of benchmarks/results/attention.jsonl, and what is there is not run again; docs/attention.md is made
of the lines on test images. Every seed draws 512 training images, whose labels are not used.
`benchmarks.data.small_nets` trains the nets.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ss_pruning
from benchmarks.accuracy.attention import page
from benchmarks.accuracy.attention.closed_form import prune_uniformly
from benchmarks.accuracy.attention.magnitude import prune_by_magnitude
from benchmarks.accuracy.attention.ways import BUDGETS, PATH, STEPS, WAYS, Line, OutOfReachError, key
from benchmarks.accuracy.recovery import scored
from benchmarks.common import DATA, add_line, read_lines, versions
from benchmarks.data.attention_nets import ATTENTION_NETS
from benchmarks.data.cifar import as_input, draw, load, top1
from benchmarks.data.models import load_net
from ss_pruning.profiling.latency import machine
from ss_pruning.profiling.macs import count_macs

IMAGES = 512
WHOLE = ss_pruning.Allocation(heads="whole")
Cut = Callable[[nn.Module, float, Tensor, int], nn.Module]


def ours(compensation: str, images: bool = True, **options: Any) -> Cut:
    """`prune_` on a copy."""

    def cut(model: nn.Module, macs: float, x: Tensor, seed: int) -> nn.Module:
        small = copy.deepcopy(model)
        given = x if images else None
        ss_pruning.prune_(small, x[:1], macs=macs, compensation=compensation, calibration=given, **options)
        return small

    return cut


def recovered(model: nn.Module, macs: float, x: Tensor, seed: int) -> nn.Module:
    """Solved anew, then trained on the same images to imitate the dense net."""
    small = CUTS["reconstruct, whole heads"](model, macs, x, seed)
    ss_pruning.recover_(
        small, model, x, example_inputs=x[:1], steps=STEPS, settings=ss_pruning.Recovery(seed=seed)
    )
    return small


CUTS: dict[str, Cut] = {
    "none": ours("none", images=False),
    "mean": ours("mean", images=False),
    "none, images": ours("none"),
    "mean, images": ours("mean"),
    "reconstruct, local": ours("reconstruct", allocation="local"),
    "reconstruct": ours("reconstruct"),
    "reconstruct, whole heads": ours("reconstruct", allocation=WHOLE),
    "recovered, whole heads": recovered,
    "closed form": lambda model, macs, x, seed: prune_uniformly(model, macs, x),
    "closed form, values": lambda model, macs, x, seed: prune_uniformly(model, macs, x, values=True),
    "magnitude, uniform": lambda model, macs, x, seed: prune_by_magnitude(
        model, macs, x[:1], everywhere=False
    ),
    "magnitude, global": lambda model, macs, x, seed: prune_by_magnitude(model, macs, x[:1], everywhere=True),
}


def run(model: nn.Module, macs: float, way: str, x: Tensor, seed: int) -> tuple[nn.Module, Line]:
    """The smaller net, and what it costs."""
    began, example = time.perf_counter(), x[:1]
    small = CUTS[way](model, macs, x, seed).eval()
    counts = [count_macs(net, example)[0] for net in (model, small)]
    sizes = [sum(p.numel() for p in net.parameters()) for net in (model, small)]
    attention = [module for module in small.modules() if hasattr(module, "qkv")]
    return small, {
        "macs_kept": counts[1] / counts[0],
        "params_kept": sizes[1] / sizes[0],
        "heads": [module.num_heads for module in attention],
        "widths": [module.qkv.out_features // (3 * module.num_heads) for module in attention],
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> int:
    """Run what is missing, and write the page."""
    options = _arguments()
    torch.set_num_threads(1)
    train = load(options.data, "train")
    done = {key(line) for line in read_lines(options.results)}
    models: dict[str, tuple[nn.Module, float]] = {}
    for seed, macs, net, way in itertools.product(options.seeds, options.macs, options.nets, options.ways):
        point = {"net": net, "macs": macs, "way": way, "seed": seed, "split": options.split}
        if key(point) in done or (seed and not WAYS[way].draws):
            continue
        tested = draw(scored(options.split, train, options.data, seed), options.images, seed=0)
        if net not in models or options.split == "train":
            model = load_net(net, options.data, options.weights)
            models[net] = model, top1(model, tested)
        model, dense = models[net]
        try:
            small, found = run(model, macs, way, as_input(draw(train, IMAGES, seed)[0]), seed)
        except OutOfReachError as error:
            print(f"{net}, {way}: {error}", flush=True)
            continue
        line = {**point, "top1": top1(small, tested), "dense": dense, **found, "images": len(tested[1])}
        line |= {"machine": machine(torch.device("cpu")), "versions": versions()}
        add_line(line, options.results)
        print(
            f"{net}, {macs:.0%}, {way}, seed {seed}: {line['top1']:.2f} of {dense:.2f}, {found['seconds']} s, "
            f"{found['macs_kept']:.1%}, heads {found['heads']}",
            flush=True,
        )
    if options.results == PATH:
        lines = read_lines(PATH)
        page.write(lines)
        page.write_summary(lines)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nets", nargs="+", choices=list(ATTENTION_NETS), default=list(ATTENTION_NETS))
    parser.add_argument("--macs", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="draws of images")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="images to measure on")
    parser.add_argument("--images", type=int, default=4000, help="measure on so many, from a fixed shuffle")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--weights", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=PATH)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

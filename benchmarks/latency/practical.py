"""What pruning costs in practice: processor time and memory of each stage, of nets of many kinds.

    python -m benchmarks.latency.practical --nets resnet50 mobilenetv3_large_100   # adds to results/practical.json
    python -m benchmarks.latency.practical --nets all --ways reconstruct           # what was run is run again
    python -m benchmarks.latency.practical --page                                  # docs/practical.md

Each run is a process of its own with one thread: `prune_` to half of the multiply-accumulates, one way to compensate,
IMAGES images of noise with the spectrum of photos, at the net's own size (CIFAR-10's training images for the net that
is made for them). Weights are random where none come with the benchmarks; cost hardly depends on them. Time is that of
the processor. Memory is the peak of resident memory above what the process held before, the model and the images
included in what it held.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.common import DATA, DOCS, RESULTS, ROOT, made_on, write
from benchmarks.data import cifar
from benchmarks.data.models import load_checkpoint
from benchmarks.latency.scale import Peaks, cpu_seconds, give_back, resident
from ss_pruning._utils.files import write_text
from ss_pruning.compensation.synthetic_data import _natural_noise

MACS, IMAGES, CIFAR_IMAGES = 0.5, 240, 512
WAYS = ("none", "mean", "linear", "reconstruct")
STAGES = ("trace", "score", "measure", "plan", "verify", "cut")
MIB = 2**20


class Net(NamedTuple):
    """What is pruned.

    Attributes:
        build: Makes the model.
        images: Makes calibration images, as the model takes them.
    """

    build: Callable[[], nn.Module]
    images: Callable[[], Tensor]


def timm_net(name: str, side: int = 224) -> Net:
    def build() -> nn.Module:
        made: nn.Module = importlib.import_module("timm").create_model(name, pretrained=False)
        return made

    return Net(build, lambda: pictures(side))


def yolov8n() -> nn.Module:
    tasks = importlib.import_module("ultralytics.nn.tasks")
    made: nn.Module = tasks.DetectionModel("yolov8n.yaml", verbose=False)
    return made


def pictures(side: int) -> Tensor:
    """Noise with the spectrum of photos, of deviation 1: what is in an image costs nothing."""
    return _natural_noise((IMAGES, 3, side, side), torch.Generator().manual_seed(0))


def cifar_images() -> Tensor:
    return cifar.as_input(cifar.draw(cifar.load(DATA, "train"), CIFAR_IMAGES, 0)[0])


NETS = {
    **{name: timm_net(name) for name in ("resnet50", "efficientnet_lite0", "mobilenetv3_large_100")},
    **{name: timm_net(name) for name in ("convnext_tiny", "regnety_080", "tf_efficientnetv2_s")},
    "yolov8n": Net(yolov8n, lambda: pictures(640)),
    "cifar_resnet56": Net(lambda: load_checkpoint("resnet56", DATA / "pretrained"), cifar_images),
}


def measured(net: str, way: str) -> dict[str, Any]:
    """Prune one net, in this process."""
    from ss_pruning import prune_

    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, model = NETS[net].images(), NETS[net].build().eval()
    give_back()
    before, peaks, used = resident("VmRSS"), Peaks(), cpu_seconds()
    calibration = None if way == "none" else images
    report = prune_(model, images[:1], macs=MACS, compensation=way, calibration=calibration, progress=peaks)
    peaks("")
    return {
        "images": len(images),
        "side": images.shape[-1],
        "macs": report.macs_after / report.macs_before,
        "seconds": peaks.seconds,
        "peaks": {stage: peak - before for stage, peak in peaks.peaks.items()},
        "cpu_seconds": cpu_seconds() - used,
    }


def in_child(net: str, way: str) -> dict[str, Any]:
    """Measured in a process of its own; one that dies is noted, not hidden."""
    command = [sys.executable, "-m", "benchmarks.latency.practical", "--worker", net, way]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"failed": f"exit code {done.returncode}: {last[:300]}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ---------------------------------------------------------------- page


def row(net: str, way: str, run: dict[str, Any]) -> str:
    if "failed" in run:
        return f"| {net} | {way} | {run['failed']} |" + " |" * (len(STAGES) + 2)
    seconds = " | ".join(f"{run['seconds'].get(stage, 0):.1f}" for stage in STAGES)
    peak = max(run["peaks"].values()) / MIB
    pixels = f"{run['images']} of {run['side']}"
    return f"| {net} | {way} | {pixels} | {seconds} | {run['cpu_seconds']:.0f} | {peak:,.0f} |"


def page(result: dict[str, Any]) -> str:
    """docs/practical.md."""
    head, rule = " | ".join(STAGES), "---:|" * (len(STAGES) + 2)
    runs = result["runs"]
    missing = [f"{net} {way}" for net in NETS for way in WAYS if way not in runs.get(net, {})]
    lines = [
        "# What pruning takes",
        "",
        "Written by `python -m benchmarks.latency.practical --page` from `benchmarks/results/practical.json`; how it "
        "is measured stands at the top of `benchmarks/latency/practical.py`.",
        "",
        f"| net | compensation | images of pixels | {head} | CPU s | peak, MiB |",
        f"|---|---|---:|{rule}",
        *(row(net, way, runs[net][way]) for net in NETS for way in WAYS if way in runs.get(net, {})),
        "",
        f"`prune_(macs={MACS})`, one thread. Columns of stages and *CPU s* are seconds of processor time, *peak* is "
        "resident memory above what the process held before. Plain cuts see no images. *Cut* is the cut with its "
        "compensation.",
        "",
        f"Made {made_on([result])}.",
        "",
        f"Not run yet: {', '.join(missing)}." if missing else "All was run.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", default=[], metavar="NET", help=f"{', '.join(NETS)}, or all")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--page", action="store_true", help="write docs/practical.md")
    parser.add_argument("--worker", nargs=2, metavar=("NET", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measured(*options.worker)))
        return
    path = RESULTS / "practical.json"
    runs = json.loads(path.read_text())["runs"] if path.is_file() else {}
    for net in NETS if options.nets == ["all"] else options.nets:
        for way in options.ways:
            runs.setdefault(net, {})[way] = in_child(net, way)
            print(net, way, json.dumps(runs[net][way]), flush=True)
            write("practical", {"runs": runs, "device": "CPU, one thread"})
    if options.page:
        write_text(DOCS / "practical.md", page(json.loads(path.read_text())))


if __name__ == "__main__":
    main()

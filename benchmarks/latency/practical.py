"""What pruning costs in practice: processor time and memory of each stage, of nets of many kinds.

    python -m benchmarks.latency.practical --nets resnet50 mobilenetv3_large_100   # adds to results/practical.json
    python -m benchmarks.latency.practical --nets all --ways reconstruct           # what was run is run again
    python -m benchmarks.latency.practical --nets resnet50 --killed                # killed before the cut, and again
    python -m benchmarks.latency.practical --page                                  # docs/practical.md

Each run is a process of its own with one thread: `prune_` to half of the multiply-accumulates, one way to compensate,
IMAGES images of noise with the spectrum of photos, at the net's own size (CIFAR-10's training images for the net that
is made for them). Weights are random where none come with the benchmarks; cost hardly depends on them. Time is that of
the processor; what was expected before the start, and after a tenth of the time, is compared with the clock on the
wall, which is what people look at. Memory is the peak of resident memory above what the process held before, the model
and the images included in what it held. Each run has a cache of its own, and finds it empty; with `--killed` one is
ended by SIGKILL when the cut begins, and the same runs once more on what it left.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.common import DATA, DOCS, RESULTS, ROOT, made_on, write
from benchmarks.data import cifar
from benchmarks.data.models import load_checkpoint
from benchmarks.latency.scale import Peaks, cpu_seconds, give_back, resident
from ss_pruning._utils.files import write_text
from ss_pruning._utils.progress import seconds_left, time_in_words
from ss_pruning.compensation.synthetic_data import _natural_noise

MACS, IMAGES, CIFAR_IMAGES = 0.5, 240, 512
BLIND = "mean-without-images"
WAYS = ("none", BLIND, "mean", "linear", "reconstruct")
STAGES = ("trace", "estimate", "score", "measure", "plan", "verify", "cut")
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


@dataclass
class Waiting:
    """What somebody who waits is told, moment by moment.

    Attributes:
        begin: When the work started.
        told: By moment since then, what was said to be left.
        since: When it was first said how long it takes.
    """

    begin: float
    told: list[tuple[float, float]] = field(default_factory=list)
    since: float | None = None

    def note(self, done: float, total: float) -> None:
        now = time.perf_counter()
        if total > 0.001:  # before that nothing is expected
            self.since = now if self.since is None else self.since
            self.told.append((now - self.begin, seconds_left(now - self.since, done, total)))

    def after(self, share: float) -> float:
        """What was said to be left when so much of the time was over, as a share of what was left then."""
        whole = time.perf_counter() - self.begin
        at, left = next(told for told in self.told if told[0] >= share * whole)
        return left / (whole - at)


def measured(net: str, way: str, die_at: str = "") -> dict[str, Any]:
    """Prune one net, in this process, which ends itself when that stage begins."""
    from ss_pruning import prune_

    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, model = NETS[net].images(), NETS[net].build().eval()
    give_back()
    before, peaks, used = resident("VmRSS"), Peaks(), cpu_seconds()
    waiting = Waiting(time.perf_counter())
    calibration, compensation = None if way in ("none", BLIND) else images, way.split("-")[0]

    def progress(stage: str, done: int, total: int) -> None:
        if die_at == stage:
            os.kill(os.getpid(), signal.SIGKILL)
        peaks(stage)
        waiting.note(done / 1000, total / 1000)

    report = prune_(
        model, images[:1], macs=MACS, compensation=compensation, calibration=calibration, progress=progress
    )
    peaks("")
    return {
        "made": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M}",
        "images": 0 if calibration is None else len(images),
        "side": images.shape[-1],
        "macs": report.macs_after / report.macs_before,
        "seconds": peaks.seconds,
        "peaks": {stage: peak - before for stage, peak in peaks.peaks.items()},
        "cpu_seconds": cpu_seconds() - used,
        "wall_seconds": time.perf_counter() - waiting.begin,
        "expected_seconds": report.seconds_expected,
        "wall_by_stage": report.seconds,
        "told_after_a_tenth": waiting.after(0.1),
    }


def in_child(net: str, way: str, cache: str, die_at: str = "") -> dict[str, Any]:
    """Measured in a process of its own; one that dies is noted, not hidden."""
    command = [sys.executable, "-m", "benchmarks.latency.practical", "--worker", net, way, die_at]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SS_PRUNING_CACHE": cache}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"failed": f"exit code {done.returncode}: {last[:300]}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(net: str, way: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        return in_child(net, way, cache)


def killed(net: str, way: str) -> dict[str, Any]:
    """What the same takes once more, after it was killed when the cut began."""
    with tempfile.TemporaryDirectory() as cache:
        begin = time.perf_counter()
        first = in_child(net, way, cache, "cut")
        before = time.perf_counter() - begin
        again = in_child(net, way, cache)
    keys = ("failed", "cpu_seconds", "wall_seconds")
    return {"ended": first["failed"], "seconds_before": before} | {k: again[k] for k in keys if k in again}


# ---------------------------------------------------------------- page


def row(net: str, way: str, run: dict[str, Any]) -> str:
    if "failed" in run:
        return f"| {net} | {way} | {run['failed']} |" + " |" * (len(STAGES) + 3)
    seconds = " | ".join(f"{run['seconds'].get(stage, 0):.1f}" for stage in STAGES)
    peak = max(run["peaks"].values()) / MIB
    pixels = f"{run['images']} of {run['side']}"
    made = run.get("made", "earlier")
    return f"| {net} | {way} | {pixels} | {seconds} | {run['cpu_seconds']:.0f} | {peak:,.0f} | {made} |"


def expectations(runs: dict[str, Any]) -> list[str]:
    """What was expected, and how right that was."""
    found = [
        (net, way, run) for net in NETS for way, run in runs.get(net, {}).items() if "expected_seconds" in run
    ]
    if not found:
        return []
    rows = []
    for net, way, run in found:
        expected, took = sum(run["expected_seconds"].values()), run["wall_seconds"]
        rows.append(
            f"| {net} | {way} | {time_in_words(expected)} | {expected:.0f} | {took:.0f} | {took / expected:.2f} | "
            f"{run['told_after_a_tenth']:.2f} |"
        )
    return [
        "## How long it will take",
        "",
        "Before the work starts: what was said, the seconds behind it, and what it took by the clock on the wall, with "
        "other processes on the same processors. *Told after a tenth* is what was said to be left after a tenth of the "
        "time, as a share of what was left.",
        "",
        "| net | compensation | said | expected, s | took, s | took / expected | told after a tenth / true |",
        "|---|---|---|---:|---:|---:|---:|",
        *rows,
        "",
    ]


def interruptions(runs: dict[str, Any], kills: dict[str, Any]) -> list[str]:
    """What a killed run takes once more."""
    found = [
        (net, way, again)
        for net in NETS
        for way, again in kills.get(net, {}).items()
        if way in runs.get(net, {})
    ]
    if not found:
        return []
    rows = []
    for net, way, again in found:
        whole = runs[net][way]["cpu_seconds"]
        rows.append(
            f"| {net} | {way} | {whole:.0f} | {again['cpu_seconds']:.0f} | {again['cpu_seconds'] / whole:.2f} |"
        )
    return [
        "## Killed, and run again",
        "",
        "By SIGKILL when the cut began. What was measured is kept by content, so that the same command measures "
        "nothing again; what is left is the cut itself.",
        "",
        "| net | compensation | whole, CPU s | again, CPU s | share |",
        "|---|---|---:|---:|---:|",
        *rows,
        "",
    ]


def page(result: dict[str, Any]) -> str:
    """docs/practical.md."""
    head, rule = " | ".join(STAGES), "---:|" * (len(STAGES) + 3)
    runs = result["runs"]
    missing = [net for net in NETS if "reconstruct" not in runs.get(net, {})]
    lines = [
        "# What pruning takes",
        "",
        f"You get from this page how long `prune_(macs={MACS})` takes on one thread of a CPU, and how much memory. "
        + slowest(runs),
        "",
        f"| net | compensation | images of pixels | {head} | CPU s | peak, MiB | made |",
        f"|---|---|---:|{rule}",
        *(row(net, way, runs[net][way]) for net in NETS for way in WAYS if way in runs.get(net, {})),
        "",
        "Columns of stages and *CPU s* are seconds of processor time, *peak* is resident memory above what the process "
        "held before, the images that it was given among that. *Cut* is the cut with its compensation. What was made "
        "earlier is of the code as it was then.",
        "",
        *expectations(runs),
        *interruptions(runs, result.get("killed", {})),
        *([f"Not run with `reconstruct` yet: {', '.join(missing)}.", ""] if missing else ()),
        f"Made by `python -m benchmarks.latency.practical --nets all`, then `--page`, {made_on([result])}.",
    ]
    return "\n".join(lines) + "\n"


def slowest(runs: dict[str, Any]) -> str:
    """The most that any net took, with compensation and without."""
    sentences = []
    for way, words in (("reconstruct", "A cut with `reconstruct` and its images"), ("none", "A plain cut")):
        seconds = {net: s for net, ways in runs.items() if (s := ways.get(way, {}).get("cpu_seconds"))}
        if not seconds:
            continue
        most = max(seconds, key=seconds.__getitem__)
        sentences.append(f"{words} takes {min(seconds.values()):.0f} to {seconds[most]:.0f} s (`{most}`).")
    return " ".join(sentences)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", default=[], metavar="NET", help=f"{', '.join(NETS)}, or all")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--page", action="store_true", help="write docs/practical.md")
    parser.add_argument("--killed", action="store_true", help="kill it when the cut begins, and run it again")
    parser.add_argument("--worker", nargs=3, metavar=("NET", "WAY", "DIE_AT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measured(*options.worker)))
        return
    path = RESULTS / "practical.json"
    stored = json.loads(path.read_text()) if path.is_file() else {}
    runs, kills = stored.get("runs", {}), stored.get("killed", {})
    for net in NETS if options.nets == ["all"] else options.nets:
        for way in options.ways:
            where, how = (kills, killed) if options.killed else (runs, run)
            where.setdefault(net, {})[way] = how(net, way)
            print(net, way, json.dumps(where[net][way]), flush=True)
            write("practical", {"runs": runs, "killed": kills, "device": "CPU, one thread"})
    if options.page:
        write_text(DOCS / "practical.md", page(json.loads(path.read_text())))


if __name__ == "__main__":
    main()

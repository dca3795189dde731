"""What the C library's memory does to a compensated cut on a CPU: as it comes, and told to keep what is freed.

glibc gives large tensors back to the system when they are freed, and the system clears every page that it hands out
again: a network that runs layer by layer pays that for each layer. Two variables of the environment make it keep them.

    OMP_NUM_THREADS=1 python -m benchmarks.allocator --models resnet18 mobilenet_v2 densenet121
    python -m benchmarks.allocator --page

Each run is a process of its own: a model of torchvision with random weights, `prune_` to 70 % of its
multiply-accumulates by reconstruct with measured damage, on 32 images of noise. Settings take turns. Time is that of
the processor; memory is the peak of resident memory, less what the process held before. Means and standard deviations
over --rounds go to results/allocator.json, and from there to docs/faster_on_cpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

import torch

from benchmarks.common import HERE, RESULTS, write
from benchmarks.scale import GIB, cpu_seconds, give_back, resident
from ss_pruning._atomic import write_text

PAGE = HERE.parent / "docs" / "faster_on_cpu.md"
KEEPING = {"MALLOC_TRIM_THRESHOLD_": "10000000000", "MALLOC_MMAP_THRESHOLD_": "10000000000"}
SETTINGS: dict[str, dict[str, str]] = {"as it comes": {}, "keeping": KEEPING}
MACS, IMAGES, SIDE = 0.7, 32, 64
Runs = dict[str, dict[str, list[dict[str, float]]]]


def measure(name: str) -> dict[str, float]:
    """One compensated cut, in this process."""
    from ss_pruning import prune_
    from ss_pruning.models import build_model

    torch.manual_seed(0)
    model = build_model(f"torchvision:{name}")
    images = torch.randn(IMAGES, 3, SIDE, SIDE)
    give_back()
    held, used = resident("VmRSS"), cpu_seconds()
    prune_(model, images[:1], macs=MACS, compensation="reconstruct", calibration=images)
    return {"seconds": cpu_seconds() - used, "bytes": float(resident("VmHWM") - held)}


def in_child(name: str, environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.allocator", "--worker", name]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=HERE.parent, env=os.environ | environment
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def page(models: Runs, versions: dict[str, str]) -> str:
    """docs/faster_on_cpu.md."""
    setting = " ".join(f"{name}={value}" for name, value in KEEPING.items())
    rows = []
    for name, runs in models.items():
        seconds = {s: [run["seconds"] for run in runs[s]] for s in SETTINGS}
        share = [b / a for a, b in zip(*seconds.values(), strict=True)]
        texts = [spread(values, 1) for values in seconds.values()]
        memory = [f"{max(run['bytes'] for run in runs[s]) / GIB:.2f}" for s in SETTINGS]
        rows.append(f"| {name} | {' | '.join(texts)} | {spread(share, 2)} | {' | '.join(memory)} |")
    lines = [
        "# Faster on a CPU",
        "",
        "On Linux, glibc gives the memory of large tensors back to the system when they are freed, and takes it again "
        "for the next layer, page by page. Told to keep it, the same work takes less time:",
        "",
        "```console",
        f"$ {setting} ss-prune prune ...",
        "```",
        "",
        "It is the process that keeps it: set them where nothing else wants the memory. What was measured, for a "
        f"cut to {MACS:.0%} of the multiply-accumulates with `reconstruct` on {IMAGES} images of {SIDE} pixels, one "
        f"thread, mean ± standard deviation over {len(next(iter(models.values()))['keeping'])} runs that took turns:",
        "",
        "| model | CPU s as it comes | keeping | share of the time | peak, GiB, as it comes | keeping |",
        "|---|---:|---:|---:|---:|---:|",
        *rows,
        "",
        "The peak is that of the process, less what it held before the cut. Made by `python -m benchmarks.allocator` "
        "and `--page` from `benchmarks/results/allocator.json` ("
        + ", ".join(f"{name} {text}" for name, text in versions.items())
        + ").",
    ]
    return "\n".join(lines) + "\n"


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation, or the one value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=[], help="names of torchvision")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--page", action="store_true", help="write docs/faster_on_cpu.md")
    parser.add_argument("--worker", metavar="MODEL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.worker)))
        return
    path = RESULTS / "allocator.json"
    models: Runs = json.loads(path.read_text())["models"] if path.is_file() else {}
    for name in options.models:
        runs: dict[str, list[dict[str, float]]] = {setting: [] for setting in SETTINGS}
        for _ in range(options.rounds):
            for setting, environment in SETTINGS.items():
                runs[setting].append(in_child(name, environment))
                print(name, setting, runs[setting][-1], flush=True)
        models[name] = runs
        write("allocator", {"models": models})
    if options.page:
        result = json.loads(path.read_text())
        write_text(PAGE, page(result["models"], result["versions"]))


if __name__ == "__main__":
    main()

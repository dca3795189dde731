"""What pruning costs, by model size: seconds and peak memory of tracing, scoring, planning, verifying and cutting.

    OMP_NUM_THREADS=1 python -m benchmarks.latency.scale --models resnet18 resnet50   # adds to results/scale.json
    python -m benchmarks.latency.scale --models all    # up to what fits 24 GiB; what was run is not run again
    python -m benchmarks.latency.scale_page            # docs/scale.md and its plot

Each model gets a process of its own, random weights, one image of --size pixels, and `prune_` to 70 % of its
multiply-accumulates. Small models of timm are pruned first, so that the code and the tables of PyTorch that pruning
loads do not count. Time is that of the processor, so that a busy machine does not show. Memory is resident memory of
the process as Linux counts it, its peak reset before each stage; what the process held before, the model aside, is
taken off, and the model itself is not: 1 is the model alone. The C library keeps much of what is freed to hand it out
again; so each model runs a second time with MALLOC_MMAP_THRESHOLD_ set, which makes it give tensors back at once, and
shows what is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, ROOT, write

MODELS = (
    "resnet18", "resnet50", "convnext_tiny", "efficientnet_b5", "resnet152", "dm_nfnet_f0", "convnext_base",
    "regnety_320", "convnext_large", "dm_nfnet_f3", "regnety_640", "convnext_xlarge", "dm_nfnet_f6", "regnety_1280",
    "convnext_xxlarge", "resnetv2_152x4_bit",
)  # fmt: skip
WARM = ("test_resnet", "test_convnext", "test_nfnet")
STAGES = ("trace", "score", "plan", "verify", "cut")
MACS = 0.7
GOAL = 2
#: Tensors of so many bytes or more get memory of their own, which goes back to the system with them (glibc).
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
GIB = 2**30


class Peaks:
    """A progress callback that notes the peak of resident memory in each stage, in bytes, and its processor time."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.stage, self.since = "", cpu_seconds()

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        if self.stage:
            self.peaks[self.stage] = max(self.peaks.get(self.stage, 0), resident("VmHWM"))
            passed = cpu_seconds() - self.since
            self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + passed
        with contextlib.suppress(OSError):  # where this is not allowed, the peak is that of all stages so far
            Path("/proc/self/clear_refs").write_text("5")
        self.stage, self.since = stage, cpu_seconds()


def resident(what: str) -> int:
    """Bytes: "VmRSS", now, or "VmHWM", the peak."""
    (kibibytes,) = re.findall(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(kibibytes)


def measure(name: str, size: int) -> dict[str, Any]:
    """Prune one model, in this process."""
    from ss_pruning import prune_
    from ss_pruning.sources.models import build_model

    torch.manual_seed(0)
    for small in WARM:
        prune_(build_model(f"timm:{small}"), torch.randn(1, 3, size, size), macs=MACS)
    model = build_model(f"timm:{name}")
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    give_back()
    before, peaks, used = resident("VmRSS"), Peaks(), cpu_seconds()
    report = prune_(model, torch.randn(1, 3, size, size), macs=MACS, progress=peaks)
    peaks("")
    return {
        "size": size,
        "params": report.params_before,
        "params_after": report.params_after,
        "model_bytes": held,
        "resident_before": before,
        "peaks": peaks.peaks,
        # what is there besides the model before pruning (Python, PyTorch) does not count
        "peak_to_model": (max(peaks.peaks.values()) - before + held) / held,
        "seconds": peaks.seconds,
        "cpu_seconds": cpu_seconds() - used,
        "max_error": report.max_error,
        "threads": torch.get_num_threads(),
    }


def give_back() -> None:
    """Give memory that is free back to the system: what it does not count, pruning could take unseen."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def both(name: str, size: int) -> dict[str, Any]:
    """Measured as it is, and once more for the memory that is needed."""
    found = in_child(name, size, {})
    if "failed" not in found:
        again = in_child(name, size, GIVING_BACK)
        found["needed"] = {key: again[key] for key in ("failed", "peaks", "peak_to_model") if key in again}
    return found


def in_child(name: str, size: int, environment: dict[str, str]) -> dict[str, Any]:
    """Measured in a process of its own; one that dies (out of memory, say) is noted, not hidden."""
    command = [sys.executable, "-m", "benchmarks.latency.scale", "--worker", name, "--size", str(size)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | environment
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"size": size, "failed": f"exit code {done.returncode}: {last[:300]}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def stored() -> dict[str, Any]:
    path = RESULTS / "scale.json"
    return json.loads(path.read_text())["models"] if path.is_file() else {}


# ---------------------------------------------------------------- page


# ---------------------------------------------------------------- command line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=[], help=f"names of timm, or 'all': {', '.join(MODELS)}"
    )
    parser.add_argument("--size", type=int, default=64, help="side of the image [%(default)s]")
    parser.add_argument("--worker", metavar="MODEL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.worker, options.size)))
        return
    models = stored()
    for name in [n for n in MODELS if n not in models] if options.models == ["all"] else options.models:
        models[name] = both(name, options.size)
        print(name, json.dumps(models[name]), flush=True)
        machine = f"{platform.machine()}, {torch.get_num_threads()} thread(s) of PyTorch"
        write("scale", {"models": models, "machine": machine, "load": load()})


def load() -> float:
    """Processes that wanted the processor in the last minute."""
    with open("/proc/loadavg") as file:
        return float(file.read().split()[0])


if __name__ == "__main__":
    main()

"""Are SynapticStrengthPruner's masks what was asked for, and the same in every process?

    python -m benchmarks.nni.masks                      # all models, under four hash seeds, in fresh processes
    python -m benchmarks.nni.masks --only resnet18 --seeds 0 1

For each model and granularity: the ratio of every layer to within one block, of the global group to within one kernel.
Exits with an error where one is off, or where two seeds give different masks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys

import torch

from benchmarks.nni.run import MASKS, SIZE, TIMM, TORCHVISION, build
from ss_pruning.integrations.nni.pruner import SynapticStrengthPruner

GRAIN = {
    "kernel": lambda w: w[0, 0].numel(),
    "in_channel": lambda w: w[:, 0].numel(),
    "out_channel": lambda w: w[0].numel(),
}


def digest(name: str) -> str:
    """Check all masks of one model; a hash of them."""
    hashed = hashlib.sha256()
    for kind, (granularity, ratio) in {**MASKS, "global": MASKS["kernel"]}.items():
        group = {"global_group_id": 1} if kind == "global" else {}
        config = [{"op_types": ["Conv2d"], "sparse_ratio": ratio, "granularity": granularity, **group}]
        images = torch.zeros(2, 3, SIZE, SIZE)
        _, masks = SynapticStrengthPruner(build(name), config, images).compress()
        counts = {path: (int((m["weight"] == 0).sum()), m["weight"].numel()) for path, m in masks.items()}
        if kind == "global":
            gone, total = (sum(column) for column in zip(*counts.values(), strict=True))
            largest = max(GRAIN["kernel"](m["weight"]) for m in masks.values())
            if not ratio * total - largest <= gone <= ratio * total:
                sys.exit(f"{name}: {gone} of {total} weights for a global ratio of {ratio}")
        for path, (gone, size) in counts.items() if kind != "global" else ():
            if not size * ratio - GRAIN[kind](masks[path]["weight"]) <= gone <= size * ratio + 1e-6:
                sys.exit(f"{name}, {kind}, {path}: {gone} of {size} weights for a ratio of {ratio}")
        for path, targets in masks.items():
            hashed.update(path.encode() + targets["weight"].to(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[*TORCHVISION, *TIMM], help="models to run")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2", "3"], help="values of PYTHONHASHSEED")
    parser.add_argument("--one", action="store_true", help="in this process, print hashes as JSON")
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(1)
        print(json.dumps({name: digest(name) for name in options.only}))
        return
    found = {}
    for seed in options.seeds:
        command = [sys.executable, "-m", "benchmarks.nni.masks", "--one", "--only", *options.only]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            sys.exit(done.returncode)
        found[seed] = json.loads(done.stdout)
        print(
            f"PYTHONHASHSEED={seed}:",
            *(f"{name} {value[:8]}" for name, value in found[seed].items()),
            flush=True,
        )
    if any(hashes != found[options.seeds[0]] for hashes in found.values()):
        sys.exit("masks differ between processes")
    print("the same masks in every process, of the sparsity that was asked for")


if __name__ == "__main__":
    main()

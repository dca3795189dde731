"""What docs/distributed.md says of FSDP2: cut or mask first, shard then; two processes against unsharded training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from ss_pruning import prune_, synaptic_strength
from ss_pruning import plan
from ss_pruning.sparsity.masks import mask_, merge_masks_, synapse_masks, zero_masks
from ss_pruning.sparsity.penalty import StrengthPenalty

dist.init_process_group("gloo")
mesh, x = init_device_mesh("cpu", (2,)), torch.zeros(1, 3, 8, 8)

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )

def cut():
    model = net()
    prune_(model, x, macs=0.7)
    return model

def masked():
    model = net()
    mask_(model, synapse_masks({"3": synaptic_strength(model, x)["3"]}, fraction=0.5))
    return mask_(merge_masks_(model), zero_masks(model))

def train(model, penalty=None):
    torch.manual_seed(1)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        loss = model(torch.randn(4, 3, 8, 8)).logsumexp(1).mean()
        sgd.zero_grad()
        (loss + 0.1 * penalty() if penalty else loss).backward()
        sgd.step()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]

def shard(model, nested):
    for layer in model if nested else ():
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)

def attempt(what, run):
    try:
        found = run()
    except Exception as error:
        found = f"{type(error).__name__}: {error}".splitlines()[0]
    if not dist.get_rank():
        print(f"{what}|{found}", file=sys.stderr, flush=True)

def same(make, nested):
    pairs = zip(train(shard(make(), nested)), train(make()), strict=True)
    return all(torch.allclose(one, two, atol=1e-6) for one, two in pairs)

def penalised(nested):
    one, two = net(), net()
    penalties = [StrengthPenalty(model, x) for model in (one, two)]
    pairs = zip(train(shard(one, nested), penalties[0]), train(two, penalties[1]), strict=True)
    return all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)

def zeros():
    model = shard(masked(), True)
    train(model)
    weight = model[3].parametrizations.weight.original.full_tensor()
    return (weight.flatten(2).abs().sum(2) == 0).float().mean().item()

for nested in (False, True):
    attempt(f"cut {nested}", lambda: same(cut, nested))
    attempt(f"masked {nested}", lambda: same(masked, nested))
    attempt(f"penalty {nested}", lambda: penalised(nested))
attempt("zeros", zeros)
attempt("prune_", lambda: prune_(shard(net(), False), x, macs=0.7))
attempt("apply_", lambda: plan(net(), x, macs=0.7)[0].apply_(shard(net(), False)))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_cut_or_mask_first_and_shard_then(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = dict(line.split("|") for line in done.stderr.splitlines() if line.count("|") == 1)
    for what in ("cut False", "cut True", "masked False", "masked True", "penalty False"):
        assert said[what] == "True", what
    assert said["zeros"] == "0.5"
    assert "mixed torch.Tensor and DTensor" in said["penalty True"]  # once this works, say so in the docs
    assert "is sharded over several devices (FSDP)" in said["prune_"]
    assert "is sharded over several devices (FSDP)" in said["apply_"]

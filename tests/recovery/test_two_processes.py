"""`recover_` under a launcher: each process does all of it, and all end with the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import copy
import sys

import torch
import torch.distributed as dist
from safetensors.torch import load_file

import ss_pruning
from ss_pruning.io.checkpoint import checksum_of_weights
from ss_pruning.io.distributed import broadcast_plan, check_agreement
from ss_pruning.sources.demo import digits_data, digits_resnet, digits_weights

dist.init_process_group("gloo")
rank, folder = dist.get_rank(), sys.argv[1]
torch.manual_seed(rank)  # what else a process draws is its own affair
dense = digits_resnet().eval()
dense.load_state_dict(load_file(digits_weights()))
model, images = copy.deepcopy(dense), digits_data("calibration").tensors[0]
broadcast_plan(lambda: ss_pruning.plan(model, images[:1], macs=0.3)[0]).apply_(model)
check_agreement(model)
file = f"{folder}/{rank}.safetensors"
report = ss_pruning.recover_(model, dense, images, steps=6, checkpoint=file)
found = [None, None]
dist.all_gather_object(found, (checksum_of_weights(model), report.history, report.best_step))
assert found[0] == found[1], found
assert report.best_step
print(f"process {rank} agrees", file=sys.stderr)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_end_with_the_same_weights(tmp_path: Path) -> None:
    script = tmp_path / "recovering.py"
    script.write_text(SCRIPT)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(f"process {rank} agrees" in done.stderr for rank in (0, 1))

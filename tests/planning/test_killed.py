"""A run that was killed when all was measured goes on from there: by SIGKILL, in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Prints what pruning has taken of the processor, and what is left of each layer.
RUN = """
import os, signal, sys, time
import torch
from benchmarks.data.models import cifar_resnet
from ss_pruning import prune_

torch.manual_seed(0)
model, images = cifar_resnet("resnet56").eval(), torch.randn(96, 3, 32, 32)

def progress(stage, done, total):
    if stage == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)

begin = time.process_time()
report = prune_(model, images[:1], macs=0.5, compensation="linear", calibration=images, progress=progress)
print(time.process_time() - begin, [layer.outputs_after for layer in report.layers])
"""


def run(cache: Path, die_at: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "SS_PRUNING_CACHE": str(cache),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", RUN, die_at]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_after_measuring_the_rest_takes_less_than_a_third(tmp_path: Path) -> None:
    assert run(tmp_path, "cut").returncode == -signal.SIGKILL
    files = list(tmp_path.iterdir())
    assert all(file.suffix == ".safetensors" for file in files)  # nothing half-written
    again = run(tmp_path)
    whole = run(tmp_path / "empty")
    (left, *widths), (all_of_it, *expected) = (done.stdout.split(maxsplit=1) for done in (again, whole))
    assert widths == expected
    assert float(left) < float(all_of_it) / 3

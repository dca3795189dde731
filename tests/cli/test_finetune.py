"""`ss-prune finetune`: one command from a dense model to a file for another runtime, killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("accelerate", reason="an optional extra: pip install 'ss-pruning[train]'")
pytest.importorskip("tensorboard", reason="an optional extra: pip install 'ss-pruning[train]'")

import ss_pruning
from ss_pruning.sources.models import build_model
from tests.support.labelled_images import write_labelled_images

SPEC = "timm:test_resnet,num_classes=3"
OPTIONS = ("--macs", "0.6", "--distill", "0.5", "--epochs", "4", "--export", "onnx",
           "--size", "32", "--batch", "16", "--workers", "0", "--rate", "0.005", "--cpu")  # fmt: skip


def start(folder: Path, out: Path) -> subprocess.Popen[str]:
    command = ("finetune", SPEC, "--weights", folder / "dense.safetensors", "--data", folder, "--out", out)
    return subprocess.Popen(
        [sys.executable, "-m", "ss_pruning.cli", *map(str, command), *OPTIONS],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def epochs_done(out: Path) -> int:
    log = out / "log.json"
    return len(json.loads(log.read_text())) if log.exists() else 0


def finished(run: subprocess.Popen[str]) -> str:
    said, _ = run.communicate()
    assert run.returncode == 0, said
    return said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_and_resumed_it_ends_in_another_runtime(tmp_path: Path) -> None:
    """Killed between the cut and the end; the ONNX file computes what a run that nothing disturbed has trained."""
    runtime = pytest.importorskip("onnxruntime", reason="an optional extra: pip install 'ss-pruning[onnx]'")
    pytest.importorskip("onnxscript", reason="an optional extra: pip install 'ss-pruning[onnx]'")
    write_labelled_images(tmp_path)
    torch.manual_seed(0)
    dense = build_model(SPEC)
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")

    out, whole = tmp_path / "killed", tmp_path / "whole"
    run = start(tmp_path, out)
    while epochs_done(out) < 2 and run.poll() is None:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    assert not (out / "final.safetensors").exists()
    said = finished(start(tmp_path, out))
    assert "going on after epoch" in said
    assert f"exported: {out / 'final.onnx'}" in " ".join(said.split())
    assert epochs_done(out) == 4

    finished(start(tmp_path, whole))
    first, second = (load_file(folder / "final.safetensors") for folder in (whole, out))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    small, x = ss_pruning.load(whole / "final.safetensors"), torch.randn(5, 3, 32, 32)
    assert sum(p.numel() for p in small.parameters()) < 0.9 * sum(p.numel() for p in dense.parameters())
    session = runtime.InferenceSession(out / "final.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), small(x).detach(), rtol=1e-3, atol=1e-4)

"""The sparse-training example on tiny images: it runs to the end, and a killed run ends as if nothing had happened."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.common import read_lines
from benchmarks.data.training import Recipe, train
from benchmarks.sparse_training import page as study_page
from benchmarks.sparse_training import paper
from ss_pruning.errors import InputError, ModelError

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("--dataset", "fashion-mnist", "--net", "vgg16bn", "--width", "0.0625", "--epochs", "3", "--finetune-epochs",
           "2", "--sparsity", "0.8", "--no-bf16")  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return like_fashion_mnist(tmp_path / "data")


def like_fashion_mnist(folder: Path) -> Path:
    """Files like Fashion-MNIST's, with 256 images to train on and 64 to test, bright where the label says."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 256), ("t10k", 64)):
        labels = torch.randint(10, (count,), generator=generator).to(torch.uint8)
        pixels = torch.randint(60, (count, 28, 28), generator=generator).to(torch.uint8)
        for image, label in zip(pixels, labels.tolist(), strict=True):
            image[2 * label : 2 * label + 4] += 150
        sizes = struct.pack(">IIII", 2051, count, 28, 28), struct.pack(">II", 2049, count)
        for name, head, body in zip(("images-idx3", "labels-idx1"), sizes, (pixels, labels), strict=True):
            content = gzip.compress(head + body.numpy().tobytes())
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(content)
    return folder


def result_of(out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    (report,) = out.glob("*/*.json")
    (weights,) = out.glob("*/*.compact.pt")
    return json.loads(report.read_text()), torch.load(weights, weights_only=True)


def test_it_trains_prunes_tunes_and_compacts(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, noted = tmp_path / "out", tmp_path / "noted.jsonl"
    monkeypatch.setattr(paper, "LARGER", noted)
    assert paper.main([*OPTIONS, "--data", str(data), "--out", str(out), "--note"]) == 0
    report, weights = result_of(out)
    assert read_lines(noted) == [report]
    assert report["finetune_epochs"] == 2
    found = study_page.at_a_larger_size([report])
    assert found is not None
    assert f"| {report['top1']['pruned']:.2f} | {report['top1']['fine-tuned']:.2f} |" in found["table"]
    assert f"| {100 * report['after']['params'] / report['before']['params']:.1f} |" in found["table"]
    assert set(report["top1"]) == {"trained", "pruned", "fine-tuned", "compacted"}
    assert report["top1"]["compacted"] == report["top1"]["fine-tuned"]
    assert report["max_error"] < 1e-10
    assert report["seconds_a_batch"]["ratio"] > 0
    assert report["after"]["params"] < report["before"]["params"]
    assert (
        sum(t.numel() for n, t in weights.items() if "running" not in n and "num" not in n)
        == report["after"]["params"]
    )
    assert "zero kernels in what is left save none" in " ".join(capsys.readouterr().out.split())


def test_missing_images_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert paper.main([*OPTIONS, "--data", str(tmp_path)]) == 2
    assert "train-images-idx3-ubyte.gz" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_killed_at_any_moment_end_with_the_same_numbers(data: Path, tmp_path: Path) -> None:
    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "benchmarks.sparse_training.paper",
            *OPTIONS,
            "--data",
            str(data),
            "--out",
            str(out),
        ]
        return subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    def newest(out: Path) -> float:
        return max((path.stat().st_mtime for path in out.rglob("*.pt")), default=0.0)

    assert start(tmp_path / "whole").wait() == 0
    out, statistics = tmp_path / "killed", random.Random(0)
    for _ in range(4):  # each is killed a moment after it has written its next checkpoint
        last, run = newest(out), start(out)
        while newest(out) == last and run.poll() is None:
            time.sleep(0.005)
        time.sleep(statistics.uniform(0, 0.1))
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    assert start(out).wait() == 0
    (report, weights), (again, same) = result_of(tmp_path / "whole"), result_of(tmp_path / "killed")
    assert again["top1"] == report["top1"]
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def tiny() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    images = torch.randint(255, (64, 3, 8, 8), dtype=torch.uint8), torch.randint(4, (64,))
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    ), images


class Stop:
    """Ends a run in the middle of an epoch."""

    def __init__(self, at: int) -> None:
        self.at = at

    def loss(self, step: int) -> float:
        if step == self.at:
            raise KeyboardInterrupt
        return 0.0

    def after(self, step: int, rate: float) -> None:
        pass


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    recipe = Recipe(epochs=4, batch=16)
    model, images = tiny()
    log = train(model, images, recipe, tmp_path / "a.pt", lambda _: None)
    assert [entry["epoch"] for entry in log] == [1, 2, 3, 4]
    for at in (6, 13):
        other, _ = tiny()
        with pytest.raises(KeyboardInterrupt):
            train(other, images, recipe, tmp_path / "b.pt", lambda _: None, Stop(at))
    other, _ = tiny()
    said: list[str] = []
    train(other, images, recipe, tmp_path / "b.pt", said.append)
    assert said[0] == "going on after epoch 3"
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_another_recipe_does_not_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    model, images = tiny()
    recipe = Recipe(epochs=1, batch=16)
    train(model, images, recipe, tmp_path / "a.pt", lambda _: None)
    with pytest.raises(InputError, match="of another recipe"):
        train(model, images, replace(recipe, epochs=2), tmp_path / "a.pt", lambda _: None)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    model, images = tiny()
    with torch.no_grad():
        model[4].weight.fill_(torch.inf)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(ModelError, match=r"the loss is .* in epoch 1, step 1: lower the learning rate"):
        train(model, images, Recipe(epochs=1, batch=16), tmp_path / "a.pt", lambda _: None)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_norms_keep_their_statistics_and_are_trained(frozen: bool, tmp_path: Path) -> None:
    model, images = tiny()
    norm = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    train(model, images, Recipe(epochs=1, batch=16, frozen_norms=frozen), tmp_path / "a.pt", lambda _: None)
    same = {name: torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items()}
    assert same["running_mean"] == same["running_var"] == frozen
    assert not same["weight"]

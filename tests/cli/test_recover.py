"""`ss-prune recover`: finds the dense weights, writes a better file, refuses what it cannot do."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("typer", reason="an optional extra: pip install 'ss-pruning[cli]'")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from typer.testing import CliRunner

import ss_pruning
from ss_pruning.cli.app import app
from ss_pruning.sources.demo import digits_data
from ss_pruning.sources.models import build_model


def invoke(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else " ".join(done.stderr.replace("│", " ").split())


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    options = ("--macs", 0.2, "--compensation", "mean", "--out", folder)
    invoke("prune", "demo:digits", *options)
    return folder / "model.safetensors"


def error(model: nn.Module) -> float:
    images = digits_data("test").tensors[0]
    with torch.no_grad():
        x, y = model(images), build_model("demo:digits")(images)
    return float(((x - y) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def test_it_writes_a_better_file(pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "better.safetensors"
    before = pruned.read_bytes()
    printed = invoke("recover", pruned, "--data", "digits", "--steps", 20, "--out", out)
    assert "accuracy before: " in printed
    assert f"written: {out}" in printed
    assert pruned.read_bytes() == before
    assert error(ss_pruning.load(out)) < 0.7 * error(ss_pruning.load(pruned))


def test_minutes_of_training_are_not_lost_to_a_disk_that_has_no_room(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = SimpleNamespace(free=pruned.stat().st_size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    monkeypatch.setattr("ss_pruning.cli.delivery.recover", lambda *_: pytest.fail("it has begun to train"))
    out = tmp_path / "better.safetensors"
    said = invoke("recover", pruned, "--data", "digits", "--steps", 2, "--out", out, code=2)
    assert "the disk is full; free some space" in said
    assert not out.exists()


def test_it_is_said_how_an_interrupted_training_would_go_on(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: str, done: int, __: int) -> None:
        if done > 1:
            raise KeyboardInterrupt

    def recovered(*given: Any, **named: Any) -> Any:
        return ss_pruning.recover_(*given, **named | {"progress": interrupt})

    monkeypatch.setattr("ss_pruning.cli.delivery.recover_", recovered)
    out, checkpoint = tmp_path / "out.safetensors", tmp_path / "kept.safetensors"
    words = ("recover", pruned, "--data", "digits", "--steps", 8, "--out", out)
    assert "with --checkpoint FILE it is" in invoke(*words, code=130)
    said = invoke(*words, "--checkpoint", checkpoint, code=130)
    assert "The same command goes on from" in said
    assert "kept.safetensors" in "".join(said.split())  # the path may be long, and folded
    assert checkpoint.exists()
    assert not out.exists()
    monkeypatch.undo()
    invoke(*words, "--checkpoint", checkpoint)
    assert out.exists()


def test_the_model_is_no_checkpoint_that_may_be_deleted(pruned: Path) -> None:
    said = invoke("recover", pruned, "--data", "digits", "--steps", 2, "--checkpoint", pruned, code=2)
    assert "is read from" in said
    assert "delete" not in said


def test_json_synthetic_and_a_checkpoint(pruned: Path, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "out.safetensors", tmp_path / "checkpoint.safetensors"
    options = ("--calibration", "synthetic", "--calibration-images", 16, "--steps", 2, "--json")
    said = json.loads(
        invoke("recover", pruned, *options, "--out", out, "--checkpoint", checkpoint, "--no-flip")
    )
    assert said["steps"] == 2
    assert said["calibration"] == "synthetic"
    assert said["places"] == ["layer1", "layer2", "layer3"]
    assert checkpoint.is_file()


def test_it_writes_beside_the_file_unless_told_otherwise(pruned: Path) -> None:
    invoke("recover", pruned, "--data", "digits", "--steps", 1)
    assert (pruned.parent / "recovered.safetensors").is_file()


NET = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
"""


def test_a_model_of_a_file_is_run_only_when_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    spec, weights = f"{tmp_path / 'net.py'}:build", tmp_path / "dense.safetensors"
    save_file(build_model(spec).state_dict(), weights)
    sizes = ("--input-size", "1x8x8")
    invoke("prune", spec, "--weights", weights, *sizes, "--ratio", 0.3, "--out", tmp_path / "run")
    file = tmp_path / "run" / "model.safetensors"
    options = ("--data", "digits", "--steps", 1)
    assert "does not name its architecture" in invoke("recover", file, *options, code=2)
    invoke("recover", file, *options, "--model", spec)  # its weights and its size are in the report
    (tmp_path / "run" / "report.json").unlink()
    assert "give --weights" in invoke("recover", file, *options, "--model", spec, code=2)
    invoke("recover", file, *options, "--model", spec, "--weights", weights, *sizes)


def test_the_dense_weights_are_known_by_their_checksum(tmp_path: Path) -> None:
    """Those of a model that brings its own are taken; others are refused, whoever names them."""
    seeded = NET.replace("    return", "    torch.manual_seed(5)\n    return")
    (tmp_path / "net.py").write_text(f"import torch\n{seeded}")
    spec, run = f"{tmp_path / 'net.py'}:build", tmp_path / "run"
    invoke("prune", spec, "--input-size", "1x8x8", "--ratio", 0.3, "--out", run)
    file = run / "model.safetensors"
    options = ("--data", "digits", "--steps", 1, "--model", spec)
    invoke("recover", file, *options)
    invoke("recover", run / "recovered.safetensors", *options, "--out", run / "more.safetensors")
    (run / "report.json").unlink()
    invoke("recover", file, *options, "--input-size", "1x8x8")
    torch.manual_seed(1)
    other = {name: torch.randn_like(tensor) for name, tensor in build_model(spec).state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    said = invoke("recover", file, *options, "--weights", tmp_path / "other.safetensors", code=2)
    assert "not the dense weights that" in said


def test_weights_are_fetched_only_where_the_user_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may say that its dense model is a pretrained one; that alone fetches nothing."""
    timm = pytest.importorskip("timm", reason="an optional extra: pip install 'ss-pruning[timm]'")
    asked, create = [], timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *_, **o: (asked.append(o["pretrained"]), create("test_resnet"))[1]
    )
    spec, file = "timm:test_resnet,pretrained=True", tmp_path / "pruned.safetensors"
    torch.manual_seed(7)
    dense = create("test_resnet").eval()
    model = copy.deepcopy(dense)
    ss_pruning.prune_(model, torch.zeros(1, 3, 32, 32), macs=0.6)
    ss_pruning.save(model, file, spec, dense)
    options = ("--calibration", "synthetic", "--steps", 1, "--input-size", "3x32x32")
    assert "give --weights, or a --model" in invoke("recover", file, *options, code=2)
    assert asked
    assert not any(asked)
    invoke("recover", file, *options, "--model", spec, code=2)  # it is fetched, and is another one here
    assert asked[-1]


def test_what_it_refuses(pruned: Path, tmp_path: Path) -> None:
    digits = ("--data", "digits", "--steps", 1)
    assert "recover trains on images" in invoke("recover", pruned, "--steps", 1, code=2)
    assert "no folder" in invoke("recover", pruned, "--calibration", tmp_path / "none", code=2)
    assert "steps=0" in invoke("recover", pruned, "--data", "digits", "--steps", 0, code=2)
    assert str(pruned.name) in invoke("recover", pruned, *digits, "--out", pruned, code=2)
    assert "no file" in invoke("recover", tmp_path / "none.safetensors", *digits, code=2)
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    assert "holds no plan" in invoke("recover", other, *digits, code=2)

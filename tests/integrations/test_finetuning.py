"""What a fine-tuning run refuses, before it trains, in a sentence that says what to do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ss_pruning.errors import InputError, ModelError
from ss_pruning.integrations.finetuning.options import Options
from tests.support.labelled_images import write_labelled_images

NET = """
from torch import nn
def net(classes=3, channels=3):
    return nn.Sequential(nn.Conv2d(channels, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, classes))
"""


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"epochs": 0}, "--epochs 0: give a number, 1 or more"),
        ({"batch": 0}, "--batch 0"),
        ({"size": 0}, "--size 0"),
        ({"workers": -1}, "--workers -1: give a number, 0 or more"),
        ({"rate": float("nan")}, "--rate nan"),
        ({"rate": float("inf")}, "--rate inf"),
        ({"weight_decay": -1.0}, "--weight-decay -1.0"),
        ({"penalty": -1.0}, "--penalty -1.0"),
        ({"smoothing": 3.0}, "--smoothing 3.0: give a number, from 0 to 1"),
        ({"crop": 2.0}, "--crop 2.0"),
        ({"ema": 2.0}, "--ema 2.0"),
        ({"warm_up": -1}, "--warm-up -1"),
        ({"seed": -1}, "seed=-1"),
        ({"macs": 1.5}, "macs=1.5"),
        ({"macs": 0.0}, "macs=0.0"),
        ({"latency": 0.0}, "latency=0.0"),
        ({"macs": 0.5, "latency": 0.5}, "not both"),
        ({"macs": 0.5, "round_to": 0}, "round_to=0"),
        ({"sparsity": 1.0}, "--sparsity 1.0"),
        ({"macs": 0.5, "epochs": 2, "prune_epoch": 2}, "--prune-epoch 2 is never reached in --epochs 2"),
        ({"macs": 0.5, "prune_epoch": -1}, "--prune-epoch -1"),
    ],
)
def test_numbers_out_of_range_are_refused_at_once(named: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Options(model="resnet18", data=Path("images"), **named)


def test_a_path_where_no_file_is_is_no_name_of_timms(tmp_path: Path) -> None:
    from ss_pruning.integrations.finetuning.inputs import with_file_opened

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").touch()
    for model, said in (
        ("run", "is a folder: name the file in it"),
        ("run/mode.safetensors", "Did you mean"),
    ):
        with pytest.raises(InputError, match=said):
            with_file_opened(Options(model=str(tmp_path / model), data=tmp_path))
    options = Options(model="resnet18", data=tmp_path)
    assert with_file_opened(options) is options


def test_a_model_that_reads_one_channel_gets_grey_images(tmp_path: Path) -> None:
    from ss_pruning.integrations.finetuning.inputs import loaders, preprocess_of

    write_labelled_images(tmp_path)
    options = Options(model="nets.py:net", data=tmp_path, batch=4, size=16, workers=0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3))
    preprocess = preprocess_of(options, options.model, model)
    assert preprocess.size == (1, 16, 16)
    for loader in loaders(options, preprocess):
        images, _ = next(iter(loader))
        assert images.shape == (4, 1, 16, 16)
        assert 0 <= images.min() < images.max() <= 1


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Calls a run of one epoch on images in three classes; a file of the folder is changed before."""
    pytest.importorskip("accelerate", reason="an optional extra: pip install 'ss-pruning[train]'")
    pytest.importorskip("tensorboard", reason="an optional extra: pip install 'ss-pruning[train]'")
    from ss_pruning.integrations.finetuning.run import finetune

    write_labelled_images(tmp_path)
    (tmp_path / "nets.py").write_text(NET)

    def call(factory: str = "net", **options: Any) -> Any:
        model = f"{tmp_path / 'nets.py'}:{factory}"
        given: dict[str, Any] = {"epochs": 1, "batch": 8, "size": 16, "workers": 0, "cpu": True}
        given |= {"out": tmp_path / "out"} | options
        return finetune(Options(model=model, data=tmp_path, **given))

    return call


def test_a_model_of_other_classes_is_refused(run: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has 3 classes.*shape \[1, 2\].*num_classes=3"):
        run("net,classes=2")
    with pytest.raises(ModelError, match="does not run"):
        run("net,channels=2")
    assert not (tmp_path / "out" / "last.pt").exists()


def test_an_unknown_optimiser_is_refused(run: Any) -> None:
    with pytest.raises(InputError, match=r"--opt fastest: .*list_optimizers"):
        run(opt="fastest")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(run: Any, tmp_path: Path, workers: int) -> None:
    image = next((tmp_path / "train").rglob("*.png"))
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(InputError) as raised:
        run(workers=workers)
    assert str(raised.value).startswith(f"cannot decode the image {str(image)!r}")


def test_hidden_folders_are_no_classes(run: Any, tmp_path: Path) -> None:
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    assert len(run()) == 1


def test_a_full_disk_is_named(run: Any, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="only Unix limits the size of files")
    run()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    half = (tmp_path / "out" / "last.pt").stat().st_size // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (half, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write '.*last\.pt': File too large"):
            run(out=tmp_path / "small")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["tensorboard"]


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:10], lambda b: b[: len(b) // 2], lambda b: None]
)
def test_a_damaged_checkpoint_is_named(run: Any, tmp_path: Path, damage: Any) -> None:
    run()
    last = tmp_path / "out" / "last.pt"
    content = damage(last.read_bytes())
    torch.save({"weights": 1}, last) if content is None else last.write_bytes(content)
    with pytest.raises(InputError, match=r"last\.pt' is no checkpoint of a run, or damaged .*delete it"):
        run()
    shutil.rmtree(tmp_path / "out")
    assert len(run()) == 1

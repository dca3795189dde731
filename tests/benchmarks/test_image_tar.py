"""CIFAR-10 from a tar: decoded as stored, once, never extracted; damaged ones are named."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.data import image_tar
from benchmarks.data.cifar import load
from ss_pruning.errors import InputError

CLASSES = ("bird", "cat")


def pixels(split: str, label: int) -> np.ndarray:
    """A picture that tells where it belongs."""
    return np.random.default_rng([len(split), label]).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def write(path: Path, images: dict[str, np.ndarray]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, image in images.items():
            content = io.BytesIO()
            Image.fromarray(image).save(content, "PNG")
            info = tarfile.TarInfo(name)
            info.size = len(content.getvalue())
            archive.addfile(info, io.BytesIO(content.getvalue()))
        link = tarfile.TarInfo("test/cat/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return path


@pytest.fixture
def tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SS_PRUNING_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    images = {
        f"../{split}/{name}/0.png": pixels(split, label)
        for split in ("train", "test")
        for label, name in reversed(list(enumerate(CLASSES)))
    }
    return write(tmp_path / "data" / "cifar10-png.tar", images)


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_and_labels_are_as_stored(tar: Path, split: str) -> None:
    images, labels = load(tar.parent, split)  # type: ignore[arg-type]
    wanted = np.stack([pixels(split, label) for label in range(2)]).transpose(0, 3, 1, 2)
    assert np.array_equal(images.numpy(), wanted)
    assert labels.tolist() == [0, 1]
    assert {path.name for path in tar.parent.parent.iterdir()} == {"data", "cache"}  # nothing was extracted


def test_a_tar_is_decoded_once_and_known_by_what_it_holds(tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(tar.parent, "test")[0]
    with monkeypatch.context() as patch:
        patch.setattr(image_tar, "_decoded", lambda *_: pytest.fail("decoded again"))
        assert torch.equal(load(tar.parent, "test")[0], first)
    write(tar, {"test/cat/0.png": np.zeros((8, 8, 3), np.uint8)})
    assert load(tar.parent, "test")[0].sum() == 0


@pytest.mark.parametrize("left", [0, 100, 700])
def test_what_is_no_whole_tar_is_refused(tar: Path, left: int) -> None:
    tar.write_bytes(tar.read_bytes()[:left])
    with pytest.raises(InputError, match=r"cannot read .*cifar10-png\.tar' as a tar of test/<class>/<image>"):
        load(tar.parent, "test")


def test_without_any_both_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no cifar10-png\.tar and no CIFAR-10 of torchvision's in"):
        load(tmp_path, "test")

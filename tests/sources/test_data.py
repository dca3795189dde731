"""Images from every source come out equal, damaged ones are named, and accuracy counts right."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ss_pruning.errors import InputError, ModelError
from ss_pruning.sources import data
from ss_pruning.sources import image_files as _decode
from ss_pruning.sources.data import (
    CIFAR10_CLASSES,
    Preprocess,
    accuracy,
    cifar10,
    normalise,
    open_data,
    open_photos,
)

EACH = 2  # images of each class and split


def pixels(split: str, label: int, index: int) -> np.ndarray:
    """A picture that tells where it belongs."""
    seed = {"train": 1000, "test": 2000}[split] + 10 * label + index
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def files() -> dict[str, bytes]:
    return {
        f"{split}/{name}/{index}.png": png(pixels(split, label, index))
        for split in ("train", "test")
        for label, name in enumerate(CIFAR10_CLASSES)
        for index in range(EACH)
    }


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_folder(root: Path, members: dict[str, bytes]) -> Path:
    for name, content in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ss_pruning"


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "cifar.tar", files())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "folder", files())


@pytest.fixture
def torchvision_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A miniature of what torchvision downloads, with checksums to match."""
    from torchvision.datasets import CIFAR10

    base = tmp_path / "root" / "cifar-10-batches-py"
    base.mkdir(parents=True)

    def write(name: str, content: object) -> list[str]:
        blob = pickle.dumps(content)
        (base / name).write_bytes(blob)
        return [name, hashlib.md5(blob).hexdigest()]

    def batch(split: str) -> dict[str, object]:
        images = [pixels(split, label, index) for label in range(10) for index in range(EACH)]
        labels = [label for label in range(10) for _ in range(EACH)]
        return {"data": np.stack(images).transpose(0, 3, 1, 2).reshape(-1, 3072), "labels": labels}

    meta = write("batches.meta", {"label_names": list(CIFAR10_CLASSES)})
    monkeypatch.setattr(CIFAR10, "train_list", [write("data_batch_1", batch("train"))])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch("test"))])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return tmp_path / "root"


def tensors(dataset: TensorDataset) -> tuple[Tensor, Tensor]:
    images, labels = dataset.tensors
    return images, labels


def expected(split: str) -> tuple[Tensor, Tensor]:
    images = [pixels(split, label, index) for label in range(10) for index in range(EACH)]
    labels = torch.arange(10).repeat_interleave(EACH)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), labels


# ---------------------------------------------------------------- cifar10


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("source", ["tar", "folder", "torchvision_root"])
def test_every_source_gives_the_same_images(request: pytest.FixtureRequest, source: str, split: str) -> None:
    images, labels = tensors(cifar10(request.getfixturevalue(source), split))
    wanted, wanted_labels = expected(split)
    assert images.dtype == torch.uint8
    assert torch.equal(images, wanted)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, wanted_labels)


def test_a_tar_is_decoded_once(tar: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tensors(cifar10(tar, "test"))
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(_decode, "_decode_tar", lambda *_: pytest.fail("decoded again"))
    again = tensors(cifar10(tar.rename(tar.with_name("cifar.moved")), "test"))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_another_tar_of_the_same_name_is_decoded_anew(tar: Path) -> None:
    cifar10(tar, "test")
    changed = {name: png(np.zeros((32, 32, 3), np.uint8)) for name in files()}
    assert tensors(cifar10(write_tar(tar, changed), "test"))[0].sum() == 0


def test_a_damaged_cache_is_written_anew(tar: Path, cache: Path) -> None:
    cifar10(tar, "test")
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:100])
    assert torch.equal(tensors(cifar10(tar, "test"))[0], expected("test")[0])
    assert kept.read_bytes() == whole


def test_an_unwritable_cache_costs_only_time(tar: Path, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder would be")
    assert torch.equal(tensors(cifar10(tar, "test"))[0], expected("test")[0])


def test_progress_ends_at_the_total(tar: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    cifar10(tar, "test", lambda *call: calls.append(call))
    assert calls[-1] == ("decoding cifar.tar (test)", 20, 20)


def test_nothing_is_extracted_whatever_the_names(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    members = {f"../../{name}": content for name, content in files().items()}
    members |= {"/etc/ss_pruning_test": b"x", "../outside.txt": b"x"}
    path = write_tar(inside / "evil.tar", members)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("test/airplane/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    images, _ = tensors(cifar10(path, "test"))
    assert len(images) == 20
    assert [entry for entry in sorted(tmp_path.rglob("*")) if "cache" not in entry.parts] == before
    assert not Path("/etc/ss_pruning_test").exists()


def test_what_is_not_cifar10_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)no CIFAR-10 at .*CIFAR10\('.*absent', download=True\)"):
        cifar10(tmp_path / "absent")
    with pytest.raises(InputError, match="split must be 'train' or 'test', not 'val'"):
        cifar10(tmp_path, "val")


def test_damaged_torchvision_root_says_how_to_get_it(torchvision_root: Path) -> None:
    (torchvision_root / "cifar-10-batches-py" / "test_batch").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"(?s)damaged or incomplete.*download=True"):
        cifar10(torchvision_root, "test")


def test_other_classes_are_not_cifar10(tmp_path: Path) -> None:
    few = {name: content for name, content in files().items() if "/cat/" not in name}
    with pytest.raises(InputError, match=r"holds the classes 'airplane', .* and 4 more, not CIFAR-10's ten"):
        cifar10(write_tar(tmp_path / "few.tar", few))


# ---------------------------------------------------------------- damaged tars


def test_truncated_tar(tar: Path) -> None:
    whole = tar.read_bytes()
    for left in (0, 100, 700, len(whole) // 2):
        tar.write_bytes(whole[:left])
        with pytest.raises(InputError, match=r"cannot read .*cifar\.tar|no images under|holds the classes"):
            cifar10(tar, "test")


def test_tar_without_the_layout(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "flat.tar", {"a.png": png(pixels("test", 0, 0)), "test/b.png": b"x"})
    with pytest.raises(
        InputError, match=r"no images under test/, val/.*<class>/.*layout needed is train/<class>"
    ):
        cifar10(path)


def test_damaged_image_is_named(tmp_path: Path) -> None:
    members = files()
    members["test/cat/0.png"] = members["test/cat/0.png"][:60]
    with pytest.raises(InputError, match=r"cannot decode the image '.*test/cat/0\.png'"):
        cifar10(write_tar(tmp_path / "a.tar", members))


def test_images_of_several_sizes_need_a_folder(tmp_path: Path) -> None:
    members = files()
    members["test/cat/0.png"] = png(np.zeros((16, 8, 3), np.uint8))
    with pytest.raises(InputError, match=r"is 8x16 where the images before it are 32x32.*unpack them"):
        cifar10(write_tar(tmp_path / "a.tar", members))


# ---------------------------------------------------------------- normalise


def test_normalise_by_hand() -> None:
    images = torch.tensor([[[[0, 255]], [[51, 102]]]], dtype=torch.uint8)
    found = normalise(images, (0.5, 0.2), (0.25, 0.1))
    assert torch.allclose(found, torch.tensor([[[[-2.0, 2.0]], [[0.0, 2.0]]]]), atol=1e-6)
    assert torch.equal(normalise(images[0], (0.5, 0.2), (0.25, 0.1)), found[0])
    assert images.dtype == torch.uint8


@pytest.mark.parametrize(
    ("images", "mean", "std", "message"),
    [
        (torch.zeros(1, 3, 2, 2), (0, 0, 0), (1, 1, 1), "takes uint8 images"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), (0,), (1, 1, 1), "have 3 channels, but mean has 1"),
        (torch.zeros(2, 2, dtype=torch.uint8), (0,), (1,), "have 0 channels"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), (0,), (0,), "std must be positive"),
    ],
)
def test_normalise_refuses(images: Tensor, mean: tuple[float], std: tuple[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        normalise(images, mean, std)


# ---------------------------------------------------------------- open_data

SMALL = Preprocess(size=(3, 32, 32), crop=1.0)


def batches(loader: DataLoader[object]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize(
    "form", ["cifar10:tar", "tar", "cifar10:folder", "folder", "cifar10:torchvision_root"]
)
def test_open_data_gives_normalised_test_images(request: pytest.FixtureRequest, form: str) -> None:
    name = form.removeprefix("cifar10:")
    place = request.getfixturevalue(name)
    opened = open_data(f"cifar10:{place}" if form != name else str(place), SMALL, calibration_size=7)
    images, labels = batches(opened.evaluation)
    wanted, wanted_labels = expected("test")
    assert torch.allclose(images, normalise(wanted, SMALL.mean, SMALL.std), atol=1e-6)
    assert torch.equal(labels, wanted_labels)
    assert opened.classes == 10
    calibration = torch.cat(list(opened.calibration_images()))
    assert calibration.shape == (7, 3, 32, 32)
    known = normalise(expected("train")[0], SMALL.mean, SMALL.std)
    assert all(any(torch.allclose(image, other, atol=1e-6) for other in known) for image in calibration)


def test_calibration_images_follow_the_seed(folder: Path) -> None:
    drawn = [
        torch.cat(list(open_data(str(folder), SMALL, calibration_size=5, seed=seed).calibration_images()))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def as_set(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


@pytest.mark.parametrize(("size", "held_out"), [(7, 7), (1000, 10), (0, 0)])
def test_without_a_training_split_calibration_images_are_held_out(
    folder: Path, size: int, held_out: int
) -> None:
    opened = open_data(str(folder / "test"), SMALL, calibration_size=size)
    evaluated, labels = batches(opened.evaluation)
    calibrated = torch.cat([torch.zeros(0, 3, 32, 32), *opened.calibration_images()])
    assert (len(evaluated), len(calibrated), opened.held_out) == (20 - held_out, held_out, held_out)
    assert as_set(evaluated) | as_set(calibrated) == as_set(
        normalise(expected("test")[0], SMALL.mean, SMALL.std)
    )
    assert not as_set(evaluated) & as_set(calibrated)
    assert len(opened.evaluated_files()) == 20 - held_out
    assert opened.classes == 10
    whole, wanted = (normalise(expected("test")[0], SMALL.mean, SMALL.std), expected("test")[1])
    for image, label in zip(evaluated, labels, strict=True):
        assert any(torch.equal(image, x) and label == y for x, y in zip(whole, wanted, strict=True))


def test_a_training_split_alone_is_held_out_of_too(folder: Path) -> None:
    (folder / "test").rename(folder.parent / "elsewhere")
    opened = open_data(str(folder), SMALL, calibration_size=4)
    assert (opened.classes, opened.held_out) == (10, 4)
    assert all("/train/" in path for path in opened.evaluated_files())


def test_one_image_cannot_be_both(tmp_path: Path) -> None:
    place = str(write_folder(tmp_path / "f", {"a/0.png": png(pixels("test", 0, 0))}))
    with pytest.raises(InputError, match="one image, which cannot be evaluated and calibrated on"):
        open_data(place, SMALL)
    assert open_data(place, SMALL, calibration_size=0).held_out == 0


# ---------------------------------------------------------------- photos without labels


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Six photos of several sizes in a folder and below it, beside what is none."""
    place = tmp_path / "flat"
    for index, name in enumerate(["a.png", "b.PNG", "c.jpeg", "x/d.bmp", "x/y/e.webp", "z/f.png"]):
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((30 + index, 40, 3), 40 * index, np.uint8)).save(path)
    for name in ("notes.txt", ".hidden.png", ".cache/g.png", "a.png.part"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(b"no picture")
    return place


def test_photos_are_found_anywhere_below(flat: Path) -> None:
    found = open_photos(flat, SMALL)
    images = torch.cat(list(found.images))
    assert (found.used, found.found, found.evaluated) == (6, 6, 0)
    assert images.shape == (6, 3, 32, 32)
    levels = (images * torch.tensor(SMALL.std)[:, None, None] + torch.tensor(SMALL.mean)[:, None, None]) * 255
    assert sorted(levels.mean((1, 2, 3)).round().int().tolist()) == pytest.approx(
        [0, 40, 80, 120, 160, 200], abs=2
    )


def test_photos_are_drawn_by_the_seed(flat: Path) -> None:
    drawn = [torch.cat(list(open_photos(flat, SMALL, size=3, seed=seed).images)) for seed in (0, 0, 1)]
    assert len(drawn[0]) == 3
    assert torch.equal(drawn[0], drawn[1])
    assert as_set(drawn[0]) != as_set(drawn[2])


def test_what_is_evaluated_on_is_not_calibrated_on(flat: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(flat)
    evaluated = {str(flat / "a.png"), str(flat / "x" / "d.bmp")}
    found = open_photos(tmp_path / "link", SMALL, evaluated=evaluated)
    assert (found.used, found.found, found.evaluated) == (4, 4, 2)
    paths = {os.path.realpath(path) for path in found.images.dataset.paths}  # type: ignore[attr-defined]
    assert len(paths) == 4
    assert not paths & evaluated
    with pytest.raises(InputError, match=r"all images below .* are evaluated on.*leave out --calibration"):
        open_photos(flat, SMALL, evaluated={os.path.realpath(path) for path in flat.rglob("*")})


def test_folders_without_photos_and_broken_photos_are_named(flat: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no folder '.*absent'"):
        open_photos(tmp_path / "absent", SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no images below '.*empty'; give a folder that holds some \(\.bmp"):
        open_photos(tmp_path / "empty", SMALL)
    (flat / "x" / "broken.jpg").write_bytes((flat / "c.jpeg").read_bytes()[:200])
    with pytest.raises(InputError, match=r"cannot decode the image '.*x/broken\.jpg'"):
        list(data.batches(open_photos(flat, SMALL).images))
    with pytest.raises(InputError, match="images are channels x height x width; this model takes 1x64"):
        open_photos(flat, Preprocess(size=(1, 64)))


def test_val_is_a_test_split(tmp_path: Path) -> None:
    members = {name.replace("test/", "val/"): content for name, content in files().items()}
    opened = open_data(str(write_folder(tmp_path / "f", members)), SMALL)
    assert torch.equal(batches(opened.evaluation)[1], expected("test")[1])


def test_folder_images_are_resized_and_cropped(tmp_path: Path) -> None:
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 255  # the middle square is white
    folder = write_folder(tmp_path / "f", {"a/0.png": png(image)})
    small = Preprocess(size=(3, 20, 20), mean=(0.0,) * 3, std=(1.0,) * 3, crop=1.0)
    images, _ = batches(open_data(str(folder), small, calibration_size=0).evaluation)
    assert images.shape == (1, 3, 20, 20)
    assert images[..., 1:-1].min() > 0.99
    gray = Preprocess(size=(1, 16, 24), mean=(0.5,), std=(0.5,), crop=0.8)
    assert batches(open_data(str(folder), gray, calibration_size=0).evaluation)[0].shape == (1, 1, 16, 24)


def test_stored_images_are_resized(tar: Path) -> None:
    large = Preprocess(size=(3, 48, 40), crop=1.0)
    images, _ = batches(open_data(str(tar), large).evaluation)
    assert images.shape == (20, 3, 48, 40)
    wanted = normalise(expected("test")[0], large.mean, large.std)
    assert torch.allclose(images.mean(), wanted.mean(), atol=0.02)


def test_digits() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    opened = open_data("digits", Preprocess(size=(1, 8, 8), mean=(0.0,), std=(1.0,)))
    assert next(iter(opened.evaluation))[0].shape[1:] == (1, 8, 8)
    with pytest.raises(InputError, match="digits are 1x8x8 images; this model takes 3x224x224"):
        open_data("digits", Preprocess())


def test_channels_must_agree(tar: Path) -> None:
    with pytest.raises(InputError, match="the images have 3 channels; this model takes 1x32x32"):
        open_data(str(tar), Preprocess(size=(1, 32, 32), mean=(0.5,), std=(0.5,)))


def test_places_that_hold_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no data at '.*absent'\. Give digits, cifar10:PATH, a folder"):
        open_data(str(tmp_path / "absent"), SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no images by class in .*One folder of images per class is needed"):
        open_data(str(tmp_path / "empty"), SMALL)
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(InputError, match="say where it is with cifar10:PATH"):
        open_data("cifar10", SMALL)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_photo_is_named_even_from_a_worker(
    folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    (folder / "test" / "cat" / "1.png").write_bytes(b"no picture")
    monkeypatch.setattr(data, "_workers", lambda: workers)
    opened = open_data(str(folder), SMALL)
    assert opened.evaluation.num_workers == workers
    with pytest.raises(InputError) as caught:
        accuracy(Flat(), opened.evaluation)
    assert str(caught.value).startswith("cannot decode the image")
    assert "cat/1.png" in str(caught.value)
    assert "Traceback" not in str(caught.value)


# ---------------------------------------------------------------- accuracy


class Flat(nn.Module):
    """Says class 0 of ten to everything, or what its only input says."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), 10)


def loader(outputs: Tensor, labels: list[int], batch_size: int = 2) -> DataLoader[object]:
    return DataLoader(TensorDataset(outputs, torch.tensor(labels)), batch_size=batch_size)


def test_accuracy_counts_over_uneven_batches() -> None:
    outputs = torch.eye(5)
    assert accuracy(nn.Identity(), loader(outputs, [0, 1, 2, 0, 0])) == pytest.approx(0.6)
    assert accuracy(nn.Identity(), loader(outputs, [0, 1, 2, 3, 4], batch_size=3)) == 1.0


def test_accuracy_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5))
    model.train()
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    accuracy(model, loader(torch.randn(6, 5), [0] * 6))
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_accuracy_restores_the_model_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 2)).train()
    with pytest.raises(ModelError, match=r"does not run on images of shape \[2, 5\].*--input-size"):
        accuracy(model, loader(torch.zeros(2, 5), [0, 0]))
    assert model.training


def test_accuracy_reports_progress() -> None:
    calls: list[tuple[str, int, int]] = []
    accuracy(nn.Identity(), loader(torch.eye(5), [0] * 5), lambda *call: calls.append(call))
    assert calls == [("accuracy", 2, 5), ("accuracy", 4, 5), ("accuracy", 5, 5)]


def test_accuracy_refuses_what_it_cannot_count() -> None:
    with pytest.raises(InputError, match=r"needs a classifier with outputs \[n, classes\].*\[2, 3, 4, 4\]"):
        accuracy(nn.Identity(), loader(torch.zeros(2, 3, 4, 4), [0, 0]))
    with pytest.raises(InputError, match="labels up to 7, but the model has 5 outputs"):
        accuracy(nn.Identity(), loader(torch.eye(5), [0, 1, 2, 3, 7]))
    with pytest.raises(InputError, match="no images to measure"):
        accuracy(nn.Identity(), loader(torch.zeros(0, 5), []))

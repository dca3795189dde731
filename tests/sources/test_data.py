"""Images from every source come out equal, damaged ones are named, and accuracy counts right."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ss_pruning._utils.progress import listening
from ss_pruning.errors import InputError, ModelError
from ss_pruning.sources import data
from ss_pruning.sources.accuracy import accuracy
from ss_pruning.sources.data import open_data, open_photos
from ss_pruning.sources.image_files import open_rgb
from ss_pruning.sources.preprocessing import Preprocess, transform

CLASSES = (  # alphabetical, which is the order of the labels
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
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
        for label, name in enumerate(CLASSES)
        for index in range(EACH)
    }


def write_folder(root: Path, members: dict[str, bytes]) -> Path:
    for name, content in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


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

    meta = write("batches.meta", {"label_names": list(CLASSES)})
    monkeypatch.setattr(CIFAR10, "train_list", [write("data_batch_1", batch("train"))])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch("test"))])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return tmp_path / "root"


def expected(split: str) -> tuple[Tensor, Tensor]:
    images = [pixels(split, label, index) for label in range(10) for index in range(EACH)]
    labels = torch.arange(10).repeat_interleave(EACH)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), labels


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Channel by channel, from the definition."""
    found = torch.empty(images.shape)
    for channel, (centre, scale) in enumerate(zip(mean, std, strict=True)):
        found[:, channel] = (images[:, channel] / 255 - centre) / scale
    return found


# ---------------------------------------------------------------- open_data

SMALL = Preprocess(size=(3, 32, 32), crop=1.0)


def batches(loader: DataLoader[object]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("source", ["folder", "torchvision_root"])
def test_open_data_gives_normalised_test_images(request: pytest.FixtureRequest, source: str) -> None:
    place = request.getfixturevalue(source)
    spec = str(place) if source == "folder" else f"cifar10:{place}"
    opened = open_data(spec, SMALL, calibration_size=7)
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


def test_hidden_files_and_folders_are_no_images_and_no_classes(tmp_path: Path) -> None:
    for name in ("a/0.png", "b/0.png", "b/1.PNG"):
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_bytes(png(pixels("test", 0, 0)))
    for name in ("a/._0.png", "a/.thumbs/0.png", "b/notes.txt", ".cache/0.png", "Thumbs.db"):
        (tmp_path / "x" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "x" / name).write_bytes(b"no image")
    opened = open_data(str(tmp_path / "x"), Preprocess(size=(3, 4, 4)), calibration_size=0)
    _, labels = batches(opened.evaluation)
    assert opened.classes == 2
    assert sorted(labels.tolist()) == [0, 1, 1]
    (tmp_path / "x" / "c").mkdir()
    with pytest.raises(InputError, match=r"no images by class in .*classes c\b"):
        open_data(str(tmp_path / "x"), Preprocess())


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


def test_stored_images_are_resized_whole(torchvision_root: Path) -> None:
    large = Preprocess(size=(3, 64, 64), crop=0.5)
    images, _ = batches(open_data(f"cifar10:{torchvision_root}", large).evaluation)
    assert images.shape == (20, 3, 64, 64)
    wanted = normalise(expected("test")[0], large.mean, large.std)
    means = nn.functional.avg_pool2d(images, 2)  # of what each pixel has become
    assert torch.corrcoef(torch.stack([means.flatten(), wanted.flatten()]))[0, 1] > 0.9


def test_cifar10_says_how_to_get_it(
    torchvision_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"(?s)no CIFAR-10 at 'data'.*CIFAR10\('data', download=True\)"):
        open_data("cifar10", SMALL)
    torchvision_root.rename(tmp_path / "data")
    assert open_data("cifar10", SMALL).classes == 10


def test_files_that_are_not_the_published_ones_are_never_unpickled(torchvision_root: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(torchvision_root / "sprung"),)

    (torchvision_root / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InputError, match=r"(?s)damaged one.*download=True"):
        open_data(f"cifar10:{torchvision_root}", SMALL)
    assert not (torchvision_root / "sprung").exists()


def test_photos_are_turned_as_they_were_taken(tmp_path: Path) -> None:
    upright = np.zeros((40, 20, 3), np.uint8)
    upright[:10] = 255  # the sky
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the camera lay on its side, turn it clockwise by a quarter
    Image.fromarray(np.rot90(upright)).save(tmp_path / "phone.png", exif=exif)
    assert np.array_equal(np.asarray(open_rgb(str(tmp_path / "phone.png"))), upright)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_timm_prepares_its_own_models_images(mode: str) -> None:
    timm_data = pytest.importorskip("timm.data", reason="timm is an extra")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))
    config = {"input_size": (3, 64, 64), "crop_pct": 0.9, "crop_mode": mode, "interpolation": "bicubic"}
    wanted = timm_data.create_transform(**config, mean=(0.5,) * 3, std=(0.5,) * 3)(image)
    ours = Preprocess((3, 64, 64), (0.5,) * 3, (0.5,) * 3, 0.9, "bicubic", mode)
    assert torch.equal(transform(ours)(image), wanted)


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b3", "mobilenet_v3_large"])
def test_images_are_prepared_as_torchvision_does(name: str) -> None:
    from torchvision.models import get_model_weights

    from ss_pruning.sources.models import input_of

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    wanted = next(iter(get_model_weights(name))).transforms()(image)
    assert torch.equal(transform(input_of(f"torchvision:{name}", nn.Identity()))(image), wanted)


def test_digits() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    opened = open_data("digits", Preprocess(size=(1, 8, 8), mean=(0.0,), std=(1.0,)))
    assert next(iter(opened.evaluation))[0].shape[1:] == (1, 8, 8)
    with pytest.raises(InputError, match="digits are 1x8x8 images; this model takes 3x224x224"):
        open_data("digits", Preprocess())


def test_places_that_hold_no_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no data at '.*absent'\. Give digits, cifar10:ROOT or a folder"):
        open_data(str(tmp_path / "absent"), SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no images by class in .*One folder of images per class is needed"):
        open_data(str(tmp_path / "empty"), SMALL)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_photo_is_named_even_from_a_worker(
    folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    (folder / "test" / "cat" / "1.png").write_bytes(b"no picture")
    monkeypatch.setattr(data, "_workers", lambda: workers)
    opened = open_data(str(folder), SMALL, batch_size=4)
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
    calls: list[tuple[float, float]] = []
    with listening(lambda *call: calls.append(call)):
        accuracy(nn.Identity(), loader(torch.eye(5), [0] * 5))
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_accuracy_refuses_what_it_cannot_count() -> None:
    with pytest.raises(InputError, match=r"needs a classifier with outputs \[n, classes\].*\[2, 3, 4, 4\]"):
        accuracy(nn.Identity(), loader(torch.zeros(2, 3, 4, 4), [0, 0]))
    with pytest.raises(InputError, match="labels up to 7, but the model has 5 outputs"):
        accuracy(nn.Identity(), loader(torch.eye(5), [0, 1, 2, 3, 7]))
    with pytest.raises(InputError, match="no images to measure"):
        accuracy(nn.Identity(), loader(torch.zeros(0, 5), []))

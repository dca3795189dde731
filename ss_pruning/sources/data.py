"""Images to measure on: digits, CIFAR-10 and folders of images, as loaders to evaluate and to calibrate on.

torchvision does the loading; it is imported when called.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ss_pruning.errors import InputError
from ss_pruning.sources.accuracy import batches
from ss_pruning.sources.image_files import image_files, open_rgb, split_folder, suffixes
from ss_pruning.sources.preprocessing import Preprocess, times, transform

if TYPE_CHECKING:
    Loader = DataLoader[Any]


@dataclass(frozen=True)
class Data:
    """What `open_data` returns.

    Attributes:
        name: as the user gave it.
        evaluation: labelled batches to measure accuracy on.
        calibration: images to read statistics from, none of them evaluated on; labels come along but need not be used.
        classes: number of classes.
        held_out: how many of the images that could be evaluated on are calibrated on instead; 0 where there is a
            training split.
    """

    name: str
    evaluation: Loader
    calibration: Loader
    classes: int
    held_out: int = 0

    def calibration_images(self) -> Iterator[Tensor]:
        """Yield the batches of calibration images."""
        for images, _ in batches(self.calibration):
            yield images

    def evaluated_files(self) -> frozenset[str]:
        """The image files that accuracy is measured on; empty where images are not files of their own."""
        return frozenset(map(os.path.realpath, _files(self.evaluation.dataset)))


@dataclass(frozen=True)
class Photos:
    """What `open_photos` returns.

    Attributes:
        images: batches of images, without labels.
        used: how many there are in the batches.
        found: how many there were to draw from.
        evaluated: how many more there are that were left out because accuracy is measured on them.
    """

    images: Loader
    used: int
    found: int
    evaluated: int


def open_data(
    spec: str,
    preprocess: Preprocess,
    *,
    batch_size: int = 64,
    calibration_size: int = 512,
    evaluation_size: int | None = None,
    seed: int = 0,
) -> Data:
    """Open a set of images.

    Args:
        spec: `digits`; `cifar10:ROOT`, where torchvision has put it (`data` unless said otherwise); or a folder
            `PATH/<class>/*` or `PATH/{train,test or val}/<class>/*`.
        preprocess: size and normalisation; digits come normalised.
        batch_size: images a batch.
        calibration_size: how many images to calibrate on, drawn from the training split; where there is none, held
            out of the images, at most half of them, and not evaluated on.
        evaluation_size: how many images to evaluate on, drawn at random; all of them by default.
        seed: draws the images.

    Raises:
        InputError: nothing usable there; the message names what is missing and how to get it.
    """
    evaluation, calibration, classes = _datasets(spec, preprocess)
    generator = torch.Generator().manual_seed(seed)
    held_out = 0
    if calibration is None:
        evaluation, calibration = _held_out(evaluation, calibration_size, generator, spec)
        held_out = len(calibration)  # type: ignore[arg-type]
    return Data(
        name=spec,
        evaluation=_loader(_drawn(evaluation, evaluation_size, generator), batch_size),
        calibration=_loader(_drawn(calibration, calibration_size, generator), batch_size),
        classes=classes,
        held_out=held_out,
    )


def open_photos(
    root: str | os.PathLike[str],
    preprocess: Preprocess,
    *,
    size: int = 512,
    seed: int = 0,
    evaluated: Collection[str] = (),
    batch_size: int = 64,
) -> Photos:
    """Open images without labels: those of a folder and of all folders below it, hidden ones left out.

    Args:
        root: the folder.
        preprocess: size and normalisation.
        size: how many of the images to use at most, drawn at random.
        seed: draws the images.
        evaluated: files, by their real paths, that are evaluated on and therefore left out.
        batch_size: images a batch.

    Raises:
        InputError: there is no such folder, no image in it, or none but those that are evaluated on.
    """
    paths = list(image_files(root))
    free = [path for path in paths if os.path.realpath(path) not in evaluated]
    if not free:
        why = (
            f"all images below {str(root)!r} are evaluated on, and are therefore not calibrated on; leave out "
            "--calibration, which holds some of them out, or give a folder of other images"
            if paths
            else f"no images below {str(root)!r}; give a folder that holds some ({', '.join(suffixes())})"
        )
        raise InputError(f"{why}.")
    drawn = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))[:size].tolist()
    dataset = _Unlabelled([free[index] for index in drawn], transform(preprocess))
    return Photos(_loader(dataset, batch_size), len(drawn), len(free), len(paths) - len(free))


class _Unlabelled(Dataset[Tensor]):
    """Image files, decoded when asked for."""

    def __init__(self, paths: Sequence[str], change: Callable[[Any], Tensor]) -> None:
        self.paths, self.change = paths, change

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.change(open_rgb(self.paths[index]))


def _files(dataset: Any) -> list[str]:
    """Paths of the images of a dataset; none where they are not files of their own."""
    if isinstance(dataset, _Unlabelled):
        return list(dataset.paths)
    if isinstance(dataset, Subset):
        known = _files(dataset.dataset)
        return [known[index] for index in dataset.indices] if known else []
    return [path for path, _ in getattr(dataset, "samples", [])]


def _held_out(
    dataset: Dataset[Any], size: int, generator: torch.Generator, spec: str
) -> tuple[Dataset[Any], Dataset[Any]]:
    """Part a set that has no training split into images to evaluate and images to calibrate on."""
    total = len(dataset)  # type: ignore[arg-type]
    chosen = torch.randperm(total, generator=generator).tolist()
    if size and total < 2:
        raise InputError(
            f"{spec!r} holds one image, which cannot be evaluated and calibrated on; give more, or calibrate on others."
        )
    size = min(size, total // 2)
    return Subset(dataset, sorted(chosen[size:])), Subset(dataset, sorted(chosen[:size]))


def _drawn(dataset: Dataset[Any], size: int | None, generator: torch.Generator) -> Dataset[Any]:
    """Return so many of the images, drawn without order; the set itself where all are wanted."""
    total = len(dataset)  # type: ignore[arg-type]
    chosen = torch.randperm(total, generator=generator)
    return dataset if size is None else Subset(dataset, chosen[:size].tolist())


def _datasets(spec: str, preprocess: Preprocess) -> tuple[Dataset[Any], Dataset[Any] | None, int]:
    """Return evaluation images, calibration images (None: to be held out) and the number of classes."""
    if spec == "digits":
        return (*_digits(preprocess), 10)
    kind, _, root = spec.partition(":")
    if kind == "cifar10":
        return (*_cifar10(root or "data", preprocess), 10)
    if Path(spec).is_dir():
        return _folders(Path(spec), preprocess)
    raise InputError(
        f"no data at {spec!r}. Give digits, cifar10:ROOT or a folder with one folder of images per class; "
        "archives are to be unpacked first."
    )


def _cifar10(root: str, preprocess: Preprocess) -> tuple[Dataset[Any], Dataset[Any]]:
    """Test and training images. The files are pickles: torchvision opens those whose checksums are the published."""
    from torchvision.datasets import CIFAR10

    whole = transform(replace(preprocess, crop=1.0))  # the objects fill these images
    try:
        return CIFAR10(root, train=False, transform=whole), CIFAR10(root, train=True, transform=whole)
    except RuntimeError as error:
        raise InputError(
            f"no CIFAR-10 at {root!r}, or a damaged one; say where it is with cifar10:ROOT, or download it with\n"
            f'  python -c "from torchvision.datasets import CIFAR10; CIFAR10({root!r}, download=True)"\n'
            "A folder of images, one folder a class, is given without the name cifar10."
        ) from error


def _digits(preprocess: Preprocess) -> tuple[Dataset[Any], Dataset[Any]]:
    from ss_pruning.sources.demo import digits_data

    if preprocess.size != (1, 8, 8):
        raise InputError(f"digits are 1x8x8 images; this model takes {times(preprocess.size)}.")
    return digits_data("test"), digits_data("calibration")


def _folders(root: Path, preprocess: Preprocess) -> tuple[Dataset[Any], Dataset[Any] | None, int]:
    from ss_pruning.sources.labelled_folder import LabelledFolder

    testing, training = (split_folder(root, split) for split in ("test", "train"))
    change = transform(preprocess)
    test = LabelledFolder(testing or training or root, change)
    train = LabelledFolder(training, change) if testing and training else None
    return test, train, len(test.classes)


def _loader(dataset: Dataset[Any], batch_size: int) -> Loader:
    # Decoding many files is worth processes of its own; a few are read sooner than those start.
    workers = min(_workers(), len(_files(dataset)) // batch_size)
    return DataLoader(dataset, batch_size=batch_size, num_workers=workers)


def _workers() -> int:
    """Count the processors that this process may use, up to four."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return min(4, len(allowed(0)) if allowed is not None else os.cpu_count() or 1)

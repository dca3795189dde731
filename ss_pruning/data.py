"""Images to measure on: named sets, folders and tars of images, as evaluation and calibration loaders.

torchvision does the loading; it is imported when called.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from ss_pruning._decode import Progress, open_rgb, tar_images
from ss_pruning.cifar import CIFAR10_CLASSES, cifar10, find_cifar10, split_folder
from ss_pruning.errors import InputError
from ss_pruning.measuring import accuracy, batches
from ss_pruning.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Normalised,
    Preprocess,
    normalise,
    times,
    transform,
)

if TYPE_CHECKING:
    Loader = DataLoader[Any]

__all__ = [
    "CIFAR10_CLASSES",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Data",
    "Preprocess",
    "accuracy",
    "cifar10",
    "normalise",
    "open_data",
]


@dataclass(frozen=True)
class Data:
    """What `open_data` returns.

    Attributes:
        name: as the user gave it.
        evaluation: labelled batches to measure accuracy on.
        calibration: images to read statistics from; labels come along but need not be used.
        classes: number of classes.
    """

    name: str
    evaluation: Loader
    calibration: Loader
    classes: int

    def calibration_images(self) -> Iterator[Tensor]:
        """Yield the batches of calibration images."""
        for images, _ in batches(self.calibration):
            yield images


def open_data(
    spec: str,
    preprocess: Preprocess,
    *,
    batch_size: int = 64,
    calibration_size: int = 512,
    evaluation_size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Data:
    """Open a set of images.

    Args:
        spec: `digits`; `cifar10:PATH` (a torchvision root, a folder or a tar; `cifar10` alone looks in the
            usual places); a folder `PATH/<class>/*` or `PATH/{train,test or val}/<class>/*`; or a `.tar` of
            the latter layout.
        preprocess: size and normalisation; digits come normalised.
        batch_size: images a batch.
        calibration_size: how many images to calibrate on, drawn from the training split, or from the
            evaluation images where there is none.
        evaluation_size: how many images to evaluate on, drawn at random; all of them by default.
        seed: draws the images.
        progress: called while a tar is decoded for the first time.

    Raises:
        InputError: nothing usable there; the message names what is missing and how to get it.
    """
    evaluation, calibration, classes = _datasets(spec, preprocess, progress)
    generator = torch.Generator().manual_seed(seed)
    return Data(
        name=spec,
        evaluation=_loader(_drawn(evaluation, evaluation_size, generator), batch_size),
        calibration=_loader(_drawn(calibration, calibration_size, generator), batch_size),
        classes=classes,
    )


def _drawn(dataset: Dataset[Any], size: int | None, generator: torch.Generator) -> Dataset[Any]:
    """Return so many of the images, drawn without order; the set itself where all are wanted."""
    total = len(dataset)  # type: ignore[arg-type]
    chosen = torch.randperm(total, generator=generator)
    return dataset if size is None else Subset(dataset, chosen[:size].tolist())


def _datasets(
    spec: str, preprocess: Preprocess, progress: Progress | None
) -> tuple[Dataset[Any], Dataset[Any], int]:
    """Return evaluation images, calibration images and the number of classes."""
    if spec == "digits":
        return (*_digits(preprocess), 10)
    if spec == "cifar10" or spec.startswith("cifar10:"):
        place = spec.partition(":")[2] or find_cifar10()
        test, train = (Normalised(cifar10(place, split, progress), preprocess) for split in ("test", "train"))
        return test, train, 10
    path = Path(spec)
    if path.is_file() and path.suffix == ".tar":
        stored, classes = tar_images(path, "test", progress)
        train = Normalised(tar_images(path, "train", progress)[0], preprocess)
        return Normalised(stored, preprocess), train, len(classes)
    if path.is_dir():
        return _folders(path, preprocess)
    raise InputError(
        f"no data at {spec!r}. Give digits, cifar10:PATH, a folder with one folder of images per class, "
        "or a .tar with train/<class>/* and test/<class>/*."
    )


def _digits(preprocess: Preprocess) -> tuple[Dataset[Any], Dataset[Any]]:
    from ss_pruning.demo import digits_data

    if preprocess.size != (1, 8, 8):
        raise InputError(f"digits are 1x8x8 images; this model takes {times(preprocess.size)}.")
    return digits_data("test"), digits_data("calibration")


def _folders(root: Path, preprocess: Preprocess) -> tuple[Dataset[Any], Dataset[Any], int]:
    from torchvision.datasets import ImageFolder

    evaluation = split_folder(root, "test") or root
    training = split_folder(root, "train")
    change = transform(preprocess)
    try:
        test = ImageFolder(str(evaluation), transform=change, loader=open_rgb)
        train = (
            ImageFolder(str(training), transform=change, loader=open_rgb) if training is not None else test
        )
    except FileNotFoundError as error:
        raise InputError(
            f"no images by class in {str(evaluation)!r}: {error}. One folder of images per class is needed."
        ) from error
    return test, train, len(test.classes)


def _loader(dataset: Dataset[Any], batch_size: int) -> Loader:
    # Decoding photos is worth processes of its own; tensors in memory are not.
    in_memory = isinstance(dataset, TensorDataset | Normalised) or (
        isinstance(dataset, Subset) and isinstance(dataset.dataset, TensorDataset | Normalised)
    )
    return DataLoader(dataset, batch_size=batch_size, num_workers=0 if in_memory else _workers())


def _workers() -> int:
    """Count the processors that this process may use, up to four."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return min(4, len(allowed(0)) if allowed is not None else os.cpu_count() or 1)

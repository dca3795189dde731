"""Calibration images, brought to a YOLO's form as Ultralytics itself does."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from ultralytics.data.augment import LetterBox, classify_transforms
from ultralytics.data.utils import check_det_dataset

from ss_pruning.config import is_count
from ss_pruning.errors import InputError
from ss_pruning.sources.image_files import image_files, open_rgb

if TYPE_CHECKING:
    from PIL import Image


def calibration_images(
    source: str | os.PathLike[str], imgsz: int, *, task: str = "detect", count: int = 64, seed: int = 0
) -> Tensor:
    """Draw images and letterbox them (cut the middle out for the task "classify").

    Args:
        source: A data.yaml, of which the training images are drawn from, a folder, or a text file of paths.
        imgsz: Their new height and width.
        task: Of the model.
        count: How many; all where there are fewer. One of 640 x 640 takes 5 MB.
        seed: Which.

    Returns:
        [images, 3, imgsz, imgsz], RGB in [0, 1].

    Raises:
        InputError: There are none, one is damaged, or a number is not positive.
    """
    if not is_count(imgsz) or not is_count(count):
        raise InputError(f"imgsz={imgsz!r} and count={count!r} must be positive whole numbers")
    files = list(_files(Path(source)))
    if not files:
        raise InputError(f"there is no image in '{source}'")
    drawn = random.Random(seed).sample(files, min(count, len(files)))
    form = classify_transforms(imgsz) if task == "classify" else _letterbox(imgsz)
    return torch.stack([form(open_rgb(file)) for file in sorted(drawn)])


def _letterbox(imgsz: int) -> Callable[[Image.Image], Tensor]:
    box = LetterBox(imgsz, auto=False)

    def form(image: Image.Image) -> Tensor:
        pixels = box(image=np.asarray(image))
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 255

    return form


def _files(source: Path) -> Iterator[str]:
    if source.suffix in (".yaml", ".yml"):
        places: Any = _dataset(source)["train"]
        for place in [places] if isinstance(places, (str, Path)) else places:
            yield from _files(Path(place))
    elif source.suffix == ".txt":
        yield from (str(source.parent / line.strip()) for line in _lines(source) if line.strip())
    else:
        yield from image_files(source)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{file}' is no list of images ({error})") from error


def _dataset(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = check_det_dataset(str(file), autodownload=False)
    except Exception as error:
        raise InputError(f"'{file}' describes no data that is here ({error})") from error
    return found

"""Image files: which there are, and their pixels as people see them. PIL is imported when called."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ss_pruning.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

SPLITS = {"train": ("train",), "test": ("test", "val", "validation", "valid")}
"""The folder names that a split goes by."""


def split_folder(root: Path, split: str) -> Path | None:
    """The folder of a split, under any of its names; None if there is none."""
    return next((root / name for name in SPLITS[split] if (root / name).is_dir()), None)


def suffixes() -> tuple[str, ...]:
    """Suffixes of image files: those that torchvision's `ImageFolder` takes, sorted."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return tuple(sorted(IMG_EXTENSIONS))


def image_files(root: str | os.PathLike[str]) -> Iterator[str]:
    """Paths of the images below `root`, hidden ones left out; by name, so that the same seed draws the same.

    Raises:
        InputError: There is no such folder.
    """
    if not Path(root).is_dir():
        raise InputError(f"there is no folder {str(root)!r} of images to calibrate on.")
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(suffixes()):
                yield os.path.join(folder, name)


def open_rgb(path: str) -> Image.Image:
    """Decode one image file to RGB, turned the way its camera noted that it was held (EXIF).

    Raises:
        InputError: It is damaged, missing or no image.
    """
    from PIL import Image, ImageOps

    if os.path.exists(path) and not os.path.isfile(path):  # a FIFO would wait forever
        raise InputError(f"cannot decode the image {path!r}: it is no regular file.")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(_eight_bits(image)).convert("RGB")
    except (
        OSError,
        ValueError,
        SyntaxError,
        struct.error,
        Image.DecompressionBombError,
        ImportError,
    ) as error:
        # ImportError: Ultralytics, once imported, has Pillow ask for a plugin where it knows no format.
        why = "it is damaged, or no image" if isinstance(error, ImportError) else error
        raise InputError(f"cannot decode the image {path!r}: {why}. Take it out of the folder.") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Images of 16 bits scaled down: Pillow itself would clip them, to white."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its numbers ({image.mode}) have no known range; store 8 or 16 bits")
    return image

"""Images by class: a folder for each class. Imported by who reads some, as it needs torchvision."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.datasets import ImageFolder

from ss_pruning.errors import InputError
from ss_pruning.sources.image_files import open_rgb, suffixes


class LabelledFolder(ImageFolder):  # type: ignore[misc]
    """torchvision's `ImageFolder` without hidden files and folders, with pixels as `open_rgb` decodes them."""

    def __init__(self, root: str | os.PathLike[str], change: Callable[[Any], Tensor]) -> None:
        """Find the images in the folders in `root`; `change` makes a tensor of an RGB image.

        Raises:
            InputError: There are no classes, or one of them has no image.
        """
        try:
            super().__init__(str(root), change, loader=open_rgb, is_valid_file=self._is_image)
        except FileNotFoundError as error:
            raise InputError(
                f"no images by class in {str(root)!r}: {error}. One folder of images per class is needed; images "
                "without classes can be calibrated on (--calibration)."
            ) from error

    def _is_image(self, path: str) -> bool:
        hidden = any(part.startswith(".") for part in Path(path).relative_to(self.root).parts)
        return not hidden and path.lower().endswith(suffixes())

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Names of the classes, and their numbers."""
        names = class_names(directory)
        if not names:
            raise FileNotFoundError("it holds no folder")
        return names, {name: number for number, name in enumerate(names)}


def class_names(root: str | os.PathLike[str]) -> list[str]:
    """The folders in `root`, hidden ones left out."""
    return sorted(
        entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")
    )

"""CIFAR-10 as it is stored, from torchvision's files, a folder of images or a tar of one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from ss_pruning.errors import InputError
from ss_pruning.sources.image_files import SPLITS, Progress, check_split, stack, tar_images

CIFAR10_CLASSES = (  # alphabetical, which is the order of the labels
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def find_cifar10() -> Path:
    """Look in the usual places.

    Raises:
        InputError: it is in none of them.
    """
    for place in (Path("data"), Path("../shared/data/cifar10-png.tar")):
        if place.is_file() or (place / "cifar-10-batches-py").is_dir():
            return place
    raise InputError(
        f"no CIFAR-10 found; say where it is with cifar10:PATH. {_how_to_download(Path('data'))}"
    )


def cifar10(
    root_or_tar: str | os.PathLike[str], split: str = "test", progress: Progress | None = None
) -> TensorDataset:
    """Return one split of CIFAR-10 as it is stored: no scaling, no normalisation.

    Args:
        root_or_tar: the root of torchvision's own CIFAR-10 (it holds `cifar-10-batches-py`), or a folder or
            `.tar` in ImageFolder layout (`train/<class>/*.png`, `test/<class>/*.png`).
        split: `"train"` or `"test"`.
        progress: called while a tar or folder is decoded.

    Returns:
        `TensorDataset` of images `[n, 3, 32, 32]` uint8 and labels `[n]` int64, the labels in alphabetical
        order of the class names, which is CIFAR-10's own.

    Raises:
        InputError: nothing there that is CIFAR-10; the message says how to get it.
    """
    path = Path(root_or_tar)
    check_split(split)
    if path.is_file():
        dataset, classes = tar_images(path, split, progress)
    elif (path / "cifar-10-batches-py").is_dir():
        return _torchvision_cifar10(path, split)
    elif path.is_dir() and split_folder(path, split) is not None:
        dataset, classes = _folder_images(path, split, progress)
    else:
        raise InputError(f"no CIFAR-10 at {str(path)!r}. {_how_to_download(path)}")
    if tuple(classes) != CIFAR10_CLASSES:
        raise InputError(
            f"{str(path)!r} holds the classes {_some(classes)}, not CIFAR-10's ten. "
            "Give it as an image folder instead, without the name cifar10."
        )
    return dataset


def _folder_images(root: Path, split: str, progress: Progress | None) -> tuple[TensorDataset, list[str]]:
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(str(split_folder(root, split)))
    opened = ((path, path) for path, _ in folder.samples)
    images = stack(opened, len(folder.samples), f"decoding {root.name} ({split})", progress)
    return TensorDataset(images, torch.tensor(folder.targets, dtype=torch.int64)), list(folder.classes)


def _torchvision_cifar10(root: Path, split: str) -> TensorDataset:
    from torchvision.datasets import CIFAR10

    try:
        stored = CIFAR10(str(root), train=split == "train", download=False)
    except RuntimeError as error:
        raise InputError(
            f"the CIFAR-10 at {str(root)!r} is damaged or incomplete. {_how_to_download(root)}"
        ) from error
    images = torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous()
    return TensorDataset(images, torch.tensor(stored.targets, dtype=torch.int64))


def _how_to_download(root: Path) -> str:
    return (
        "Download torchvision's copy with\n"
        f'  python -c "from torchvision.datasets import CIFAR10; CIFAR10({str(root)!r}, download=True)"\n'
        "or give a folder or .tar with train/<class>/*.png and test/<class>/*.png."
    )


def split_folder(root: Path, split: str) -> Path | None:
    """The folder of a split, under any of its names; None if there is none."""
    return next((root / name for name in SPLITS[split] if (root / name).is_dir()), None)


def _some(names: Sequence[str], most: int = 5) -> str:
    listed = ", ".join(repr(name) for name in names[:most])
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed

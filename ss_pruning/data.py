"""Images to measure on: named sets, folders and tars of images, as evaluation and calibration loaders.

torchvision does the loading; it is imported when called. A tar is decoded once, straight from the archive,
and kept as one tensor file in the user's cache folder; nothing is ever extracted to disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ss_pruning._atomic import make_writable_folder, replacing
from ss_pruning.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)`."""

CIFAR10_CLASSES = (  # alphabetical, which is the order of the labels
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
_SPLITS = {"train": ("train",), "test": ("test", "val", "validation", "valid")}


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
    _check_split(split)
    if path.is_file():
        dataset, classes = tar_images(path, split, progress)
    elif (path / "cifar-10-batches-py").is_dir():
        return _torchvision_cifar10(path, split)
    elif path.is_dir() and _split_folder(path, split) is not None:
        dataset, classes = _folder_images(path, split, progress)
    else:
        raise InputError(f"no CIFAR-10 at {str(path)!r}. {_how_to_download(path)}")
    if tuple(classes) != CIFAR10_CLASSES:
        raise InputError(
            f"{str(path)!r} holds the classes {_some(classes)}, not CIFAR-10's ten. "
            "Give it as an image folder instead, without the name cifar10."
        )
    return dataset


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale uint8 images to [0, 1], then to zero mean and unit deviation per channel.

    Args:
        images: `[n, channels, height, width]` or `[channels, height, width]`, uint8.
        mean: one per channel, for images in [0, 1].
        std: one per channel, positive.

    Returns:
        The images as float32, same shape and device.

    Raises:
        InputError: the images are not uint8, or the channels differ in number.
    """
    if images.dtype != torch.uint8:
        raise InputError(f"normalise() takes uint8 images (0 to 255), not {images.dtype}.")
    channels = images.shape[-3] if images.ndim >= 3 else 0
    if len(mean) != channels or len(std) != channels:
        raise InputError(
            f"images of shape {tuple(images.shape)} have {channels} channels, but mean has {len(mean)} "
            f"values and std {len(std)}; give one per channel."
        )
    if min(std) <= 0:
        raise InputError(f"std must be positive in every channel, not {tuple(std)}.")
    shape = (channels, 1, 1)
    centre = torch.tensor(mean, dtype=torch.float32, device=images.device).view(shape)
    scale = torch.tensor(std, dtype=torch.float32, device=images.device).view(shape)
    return images.float().div_(255).sub_(centre).div_(scale)


def tar_images(
    path: str | os.PathLike[str], split: str, progress: Progress | None = None
) -> tuple[TensorDataset, list[str]]:
    """Decode `split` of a tar in ImageFolder layout, or read it from the cache if that was done before.

    The cache is `~/.cache/ss_pruning` (`$XDG_CACHE_HOME` is respected) and is keyed by the tar's content;
    where it cannot be written, the tar is decoded anew each time.

    Args:
        path: the tar; its members are `[anything/]<split>/<class>/<image>`.
        split: `"train"` or `"test"` (`val` and `validation` count as test).
        progress: called while images are decoded.

    Returns:
        `TensorDataset` of uint8 images `[n, 3, height, width]` and int64 labels, and the class names, sorted.

    Raises:
        InputError: not a tar, truncated, without that split, or with images of several sizes.
    """
    path = Path(path)
    _check_split(split)
    cached = cache_folder() / f"{path.stem[:40]}-{split}-{_digest(path)}.safetensors"
    found = _read_cache(cached)
    if found is None:
        images, labels, classes = _decode_tar(path, split, progress)
        _write_cache(cached, images, labels, classes)
    else:
        images, labels, classes = found
    return TensorDataset(images, labels), classes


def cache_folder() -> Path:
    """Return the folder where decoded tars are kept; it need not exist."""
    chosen = os.environ.get("XDG_CACHE_HOME")
    return (Path(chosen) if chosen else Path.home() / ".cache") / "ss_pruning"


def _decode_tar(path: Path, split: str, progress: Progress | None) -> tuple[Tensor, Tensor, list[str]]:
    try:
        with tarfile.open(path) as archive:
            members = _members(archive, split)
            if not members:
                raise InputError(
                    f"{str(path)!r} has no images under {'/, '.join(_SPLITS[split])}/<class>/. "
                    "The layout needed is train/<class>/*.png and test/<class>/*.png."
                )
            classes = sorted({name for name, _ in members})
            opened = (
                (f"{path}:{member.name}", io.BytesIO(_member_bytes(archive, member))) for _, member in members
            )
            images = _stack(opened, len(members), f"decoding {path.name} ({split})", progress)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"cannot read {str(path)!r} as a tar of images: {error}.") from error
    labels = torch.tensor([classes.index(name) for name, _ in members], dtype=torch.int64)
    return images, labels, classes


def _members(archive: tarfile.TarFile, split: str) -> list[tuple[str, tarfile.TarInfo]]:
    """List (class, member) of one split in ImageFolder's order: by class, then by name."""
    found = []
    for member in archive:
        parts = PurePosixPath(member.name).parts
        is_image = member.isreg() and PurePosixPath(member.name).suffix.lower() in _IMAGE_SUFFIXES
        if is_image and len(parts) >= 3 and parts[-3] in _SPLITS[split]:
            found.append((parts[-2], member))
    return sorted(found, key=lambda pair: (pair[0], pair[1].name))


def _member_bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    data = file.read() if file is not None else b""
    if len(data) != member.size:
        raise EOFError(f"{member.name} is cut off (the file is truncated)")
    return data


def _folder_images(root: Path, split: str, progress: Progress | None) -> tuple[TensorDataset, list[str]]:
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(str(_split_folder(root, split)))
    opened = ((path, path) for path, _ in folder.samples)
    images = _stack(opened, len(folder.samples), f"decoding {root.name} ({split})", progress)
    return TensorDataset(images, torch.tensor(folder.targets, dtype=torch.int64)), list(folder.classes)


def _stack(
    files: Iterator[tuple[str, str | io.BytesIO]], total: int, what: str, progress: Progress | None
) -> Tensor:
    """Decode named image files of one size into `[n, 3, height, width]` uint8."""
    from PIL import Image

    images: Tensor | None = None
    for index, (name, file) in enumerate(files):
        try:
            with Image.open(file) as image:
                pixels = _pixels(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"cannot decode the image {name!r}: {error}.") from error
        if images is None:
            images = torch.empty((total, *pixels.shape), dtype=torch.uint8)
        if pixels.shape != images.shape[1:]:
            raise InputError(
                f"{name!r} is {pixels.shape[2]}x{pixels.shape[1]} where the images before it are "
                f"{images.shape[3]}x{images.shape[2]}. Images of several sizes are read from a folder: "
                "unpack them and give that folder."
            )
        images[index] = pixels
        if progress is not None and (index % 256 == 0 or index + 1 == total):
            progress(what, index + 1, total)
    if images is None:
        raise InputError(f"no images found while {what}.")
    return images


def _pixels(image: Image.Image) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


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


def _check_split(split: str) -> None:
    if split not in _SPLITS:
        raise InputError(f"split must be 'train' or 'test', not {split!r}.")


def _split_folder(root: Path, split: str) -> Path | None:
    return next((root / name for name in _SPLITS[split] if (root / name).is_dir()), None)


def _some(names: Sequence[str], most: int = 5) -> str:
    listed = ", ".join(repr(name) for name in names[:most])
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed


def _digest(path: Path) -> str:
    """Digest the file's content: the same tar at another path or with another date is decoded only once."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror or error}.") from error
    return digest.hexdigest()[:20]


def _read_cache(path: Path) -> tuple[Tensor, Tensor, list[str]] | None:
    """Return what is cached, or None where there is nothing or it is damaged (it is then written anew)."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            classes = (file.metadata() or {})["classes"].split("\n")
            images, labels = file.get_tensor("images"), file.get_tensor("labels")
    except (SafetensorError, KeyError, OSError):
        return None
    return images, labels, classes


def _write_cache(path: Path, images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    from safetensors.torch import save_file

    # A cache that cannot be written costs time, not the result: decoding again is right, failing is not.
    with contextlib.suppress(InputError):
        make_writable_folder(path.parent)
        with replacing(path) as temporary:
            save_file({"images": images, "labels": labels}, temporary, {"classes": "\n".join(classes)})

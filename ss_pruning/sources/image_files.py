"""Decode image files into tensors: from an open file, or from a tar, once, with a cache.

Nothing is ever extracted to disk; PIL is imported when called.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ss_pruning._utils import cache as _cache
from ss_pruning.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)`."""

SPLITS = {"train": ("train",), "test": ("test", "val", "validation", "valid")}
"""The folder names that a split goes by."""

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
"""The names of image files end so."""


def tar_images(
    path: str | os.PathLike[str], split: str, progress: Progress | None = None
) -> tuple[TensorDataset, list[str]]:
    """Decode `split` of a tar in ImageFolder layout, or read it from the cache if that was done before.

    The cache (see `ss_pruning._utils.cache`) is keyed by the tar's content; where it cannot be written, the tar is
    decoded anew each time.

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
    check_split(split)
    name = f"{path.stem[:40]}-{split}-{_digest(path)}"
    tensors, texts = _cache.read(name) or ({}, {})
    if not {"images", "labels"} <= tensors.keys() or "classes" not in texts:
        images, labels, classes = _decode_tar(path, split, progress)
        tensors, texts = {"images": images, "labels": labels}, {"classes": "\n".join(classes)}
        _cache.write(name, tensors, texts)
    return TensorDataset(tensors["images"], tensors["labels"]), texts["classes"].split("\n")


def _decode_tar(path: Path, split: str, progress: Progress | None) -> tuple[Tensor, Tensor, list[str]]:
    try:
        with tarfile.open(path) as archive:
            members = _members(archive, split)
            if not members:
                raise InputError(
                    f"{str(path)!r} has no images under {'/, '.join(SPLITS[split])}/<class>/. "
                    "The layout needed is train/<class>/*.png and test/<class>/*.png."
                )
            classes = sorted({name for name, _ in members})
            opened = (
                (f"{path}:{member.name}", io.BytesIO(_member_bytes(archive, member))) for _, member in members
            )
            images = stack(opened, len(members), f"decoding {path.name} ({split})", progress)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"cannot read {str(path)!r} as a tar of images: {error}.") from error
    labels = torch.tensor([classes.index(name) for name, _ in members], dtype=torch.int64)
    return images, labels, classes


def _members(archive: tarfile.TarFile, split: str) -> list[tuple[str, tarfile.TarInfo]]:
    """List (class, member) of one split in ImageFolder's order: by class, then by name."""
    found = []
    for member in archive:
        parts = PurePosixPath(member.name).parts
        is_image = member.isreg() and PurePosixPath(member.name).suffix.lower() in IMAGE_SUFFIXES
        if is_image and len(parts) >= 3 and parts[-3] in SPLITS[split]:
            found.append((parts[-2], member))
    return sorted(found, key=lambda pair: (pair[0], pair[1].name))


def _member_bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    data = file.read() if file is not None else b""
    if len(data) != member.size:
        raise EOFError(f"{member.name} is cut off (the file is truncated)")
    return data


def check_split(split: str) -> None:
    """Raise unless `split` is one of ours."""
    if split not in SPLITS:
        raise InputError(f"split must be 'train' or 'test', not {split!r}.")


def stack(
    files: Iterator[tuple[str, str | io.BytesIO]], total: int, what: str, progress: Progress | None
) -> Tensor:
    """Decode named image files of one size.

    Args:
        files: a name for messages, and a path or an open file, of each image.
        total: how many there are.
        what: told to `progress`.
        progress: called every few hundred images.

    Returns:
        `[n, 3, height, width]` uint8.

    Raises:
        InputError: an image is damaged or of another size, or there is none.
    """
    images: Tensor | None = None
    for index, (name, file) in enumerate(files):
        pixels = _pixels(open_rgb(file, name))
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


def open_rgb(file: str | io.BytesIO, name: str | None = None) -> Image.Image:
    """Decode one image file to RGB.

    Raises:
        InputError: it is damaged, missing or no image.
    """
    from PIL import Image

    if isinstance(file, str) and os.path.exists(file) and not os.path.isfile(file):
        raise InputError(
            f"cannot decode the image {file!r}: it is no regular file."
        )  # a FIFO would wait forever
    try:
        with Image.open(file) as image:
            return _eight_bits(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot decode the image {name or str(file)!r}: {error}.") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Images of 16 bits scaled down: Pillow itself would clip them, to white."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its numbers ({image.mode}) have no known range; store 8 or 16 bits")
    return image


def _pixels(image: Image.Image) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


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

"""Images of one size out of a tar of `<split>/<class>/<image>`, decoded once, never extracted."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ss_pruning._utils import cache
from ss_pruning.errors import InputError


def tar_images(path: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images of a split, `[n, 3, height, width]` uint8, by class and name, and labels `[n]`, classes in their order.

    Kept in the cache under what the tar holds, not what it is called.

    Raises:
        InputError: It is no tar, cut off, or has no such split.
    """
    name = f"{path.stem}-{split}-{_digest(path)}"
    tensors = cache.read(name) or {}
    if not {"images", "labels"} <= tensors.keys():
        try:
            with tarfile.open(path) as archive:
                tensors = dict(zip(("images", "labels"), _decoded(archive, split), strict=True))
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            raise InputError(
                f"cannot read {str(path)!r} as a tar of {split}/<class>/<image>: {error}"
            ) from error
        cache.write(name, tensors)
    return tensors["images"], tensors["labels"]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:20]


def _decoded(archive: tarfile.TarFile, split: str) -> tuple[Tensor, Tensor]:
    found = []
    for member in archive:
        parts = PurePosixPath(member.name).parts
        if member.isreg() and len(parts) >= 3 and parts[-3] == split:
            found.append((parts[-2], member.name, member))
    found.sort(key=lambda entry: entry[:2])
    classes = sorted({label for label, _, _ in found})
    images = np.stack([_pixels(archive, member) for _, _, member in found])
    labels = torch.tensor([classes.index(label) for label, _, _ in found])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def _pixels(archive: tarfile.TarFile, member: tarfile.TarInfo) -> np.ndarray:
    with Image.open(archive.extractfile(member)) as image:  # type: ignore[arg-type]
        return np.array(image.convert("RGB"))

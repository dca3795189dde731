"""CIFAR-10 and Fashion-MNIST for the benchmarks: images in memory, accuracy, and the usual augmentation."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data.image_tar import tar_images
from ss_pruning.errors import InputError

#: Images are scaled to [0, 1], then normalised with these.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: uint8 images `[n, 3, 32, 32]` and labels `[n]`.
Images = tuple[Tensor, Tensor]
Split = Literal["train", "test"]


def load(folder: Path, split: Split) -> Images:
    """All images of one split, from `cifar10-png.tar` in `folder` or from torchvision's copy there.

    Raises:
        InputError: They are not there.
    """
    tar = folder / "cifar10-png.tar"
    if tar.is_file():
        return tar_images(tar, split)
    from torchvision.datasets import CIFAR10

    try:
        stored = CIFAR10(str(folder), train=split == "train")
    except RuntimeError as error:
        raise InputError(f"no cifar10-png.tar and no CIFAR-10 of torchvision's in {str(folder)!r}") from error
    return torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(stored.targets)


def load_dataset(name: str, folder: Path, split: Split) -> Images:
    """`cifar10`, or `fashion-mnist`: grey images, padded to 32x32 and repeated over three channels.

    Raises:
        InputError: They are not there; the message says what is looked for.
    """
    if name == "cifar10":
        return load(folder, split)
    part = "train" if split == "train" else "t10k"
    files = [folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz"]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise InputError(
            f"no {', '.join(missing)}: give the folder of Fashion-MNIST's idx.gz files, as in "
            "github.com/zalandoresearch/fashion-mnist or Debian's package dataset-fashion-mnist"
        )
    # Each file starts with 16 (images) or 8 (labels) bytes of sizes.
    raw = [
        torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8) for path in files
    ]
    pixels, labels = raw[0][16:].reshape(-1, 1, 28, 28), raw[1][8:].long()
    return F.pad(pixels, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous(), labels


def draw(images: Images, count: int, seed: int) -> Images:
    """So many of the images, drawn by `seed` without repetition."""
    pixels, labels = images
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return pixels[chosen], labels[chosen]


def as_input(pixels: Tensor) -> Tensor:
    """What a net takes: normalised, channels last, which is the faster layout on a CPU."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((pixels.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def top1(model: nn.Module, images: Images, batch: int = 100) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    right = sum(
        int((model(as_input(pixels)).argmax(1) == labels).sum())
        for pixels, labels in zip(*(part.split(batch) for part in images), strict=True)
    )
    return 100 * right / len(images[0])


def augmented(images: Images, batch: int, generator: torch.Generator) -> Iterator[Images]:
    """One epoch of shuffled whole batches; each image is shifted by up to 4 pixels and, or not, flipped."""
    pixels, labels = images
    order = torch.randperm(len(pixels), generator=generator)
    for chosen in order.split(batch):
        if len(chosen) == batch or len(order) < batch:
            yield _augment(pixels[chosen], generator), labels[chosen]


def _augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    n, _, height, width = pixels.shape
    padded = F.pad(pixels, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, n, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    image = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

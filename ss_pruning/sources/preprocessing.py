"""How images become a model's input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ss_pruning.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """How images become a model's input.

    Attributes:
        size: channels, height and width of the input; of inputs that are no images, channels and what else there is.
        mean: subtracted from images in [0, 1], one per channel.
        std: divides them then.
        crop: side of the centre crop relative to the resized image's shorter side.
        interpolation: `"bilinear"`, `"bicubic"` or `"nearest"`.
    """

    size: tuple[int, ...] = (3, 224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop: float = 0.875
    interpolation: str = "bilinear"


def random_inputs(batch: int, size: Sequence[int], seed: int = 0) -> Tensor:
    """So many random inputs, `[batch, *size]`, the same for the same seed.

    Raises:
        InputError: they do not fit into memory.
    """
    try:
        return torch.randn(batch, *size, generator=torch.Generator().manual_seed(seed))
    except RuntimeError as error:
        raise InputError(
            f"{batch} inputs of size {times(size)} do not fit into memory; take fewer or smaller ones."
        ) from error


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


def transform(preprocess: Preprocess) -> Callable[[Image.Image], Tensor]:
    """Resize the shorter side, crop the centre, scale to [0, 1] and normalise.

    Raises:
        InputError: the model takes no images.
    """
    if len(preprocess.size) != 3:
        raise InputError(f"images are channels x height x width; this model takes {times(preprocess.size)}.")
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    channels, height, width = preprocess.size
    resized = [round(side / preprocess.crop) for side in (height, width)]
    steps = [
        transforms.Resize(
            resized[0] if height == width else resized, InterpolationMode(preprocess.interpolation)
        ),
        transforms.CenterCrop((height, width)),
        *([transforms.Grayscale()] if channels == 1 else []),
        transforms.ToTensor(),
        transforms.Normalize(preprocess.mean, preprocess.std),
    ]
    composed: Callable[[Image.Image], Tensor] = transforms.Compose(steps)
    return composed


class Normalised(Dataset[tuple[Tensor, Tensor]]):
    """Stored uint8 images, normalised and resized when asked for.

    Args:
        stored: uint8 images and labels.
        preprocess: the size and normalisation to bring them to.
    """

    def __init__(self, stored: TensorDataset, preprocess: Preprocess) -> None:
        channels = stored.tensors[0].shape[1]
        if preprocess.size[0] != channels:
            size = times(preprocess.size)
            raise InputError(f"the images have {channels} channels; this model takes {size}.")
        self.stored, self.preprocess = stored, preprocess

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.stored[index]
        image = normalise(image, self.preprocess.mean, self.preprocess.std)
        size = self.preprocess.size[1:]
        if image.shape[1:] != size:
            mode = self.preprocess.interpolation
            image = nn.functional.interpolate(image[None], size, mode=mode, antialias=mode != "nearest")[0]
        return image, label


def times(size: Sequence[int]) -> str:
    """A size as people write it: `3x32x32`."""
    return "x".join(map(str, size))

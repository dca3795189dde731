"""How images become a model's input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ss_pruning.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """How images become a model's input.

    Attributes:
        size: Channels, height and width of the input; of inputs that are no images, channels and what else there is.
        mean: Subtracted from images in [0, 1], one per channel.
        std: Divides them then.
        crop: Side of the centre crop relative to the resized image's shorter side.
        interpolation: `"bilinear"`, `"bicubic"` or `"nearest"`; of timm's models whatever timm calls it.
        timm_crop: timm's `crop_mode`: timm makes the transform then; None for torchvision's.
    """

    size: tuple[int, ...] = (3, 224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop: float = 0.875
    interpolation: str = "bilinear"
    timm_crop: str | None = None


def transform(preprocess: Preprocess) -> Callable[[Image.Image], Tensor]:
    """Resize the shorter side, crop the centre, scale to [0, 1] and normalise.

    Returns:
        A function of an RGB image that returns `[channels, height, width]`, float32.

    Raises:
        InputError: The model takes no images.
    """
    if len(preprocess.size) != 3:
        raise InputError(f"images are channels x height x width; this model takes {times(preprocess.size)}.")
    from torchvision import transforms

    change = _torchvision(preprocess) if preprocess.timm_crop is None else _timm(preprocess)
    return transforms.Compose([transforms.Grayscale(), change]) if preprocess.size[0] == 1 else change


def _torchvision(preprocess: Preprocess) -> Callable[[Image.Image], Tensor]:
    """What `weights.transforms()` does, for inputs that are not square, too."""
    from torchvision import transforms

    _, height, width = preprocess.size
    resized = [round(side / preprocess.crop) for side in (height, width)]
    composed: Callable[[Image.Image], Tensor] = transforms.Compose(
        [
            transforms.Resize(
                resized[0] if height == width else resized,
                transforms.InterpolationMode(preprocess.interpolation),
            ),
            transforms.CenterCrop((height, width)),
            transforms.ToTensor(),
            transforms.Normalize(preprocess.mean, preprocess.std),
        ]
    )
    return composed


def _timm(preprocess: Preprocess) -> Callable[[Image.Image], Tensor]:
    from timm.data import create_transform

    made: Callable[[Image.Image], Tensor] = create_transform(
        preprocess.size,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        crop_pct=preprocess.crop,
        crop_mode=preprocess.timm_crop,
    )
    return made


def times(size: Sequence[int]) -> str:
    """A size as people write it: `3x32x32`."""
    return "x".join(map(str, size))

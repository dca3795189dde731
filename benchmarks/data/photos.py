"""Photos that Python packages ship, for nets that were trained on photos: no download, no account.

    pip install scikit-image scikit-learn && pip install --no-deps ai-benchmark foolbox

Of ai-benchmark and foolbox only the pictures are read, nothing is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SKIMAGE = (
    *("astronaut", "brick", "camera", "cat", "clock", "coffee", "coins", "grass", "gravel"),
    *("hubble_deep_field", "immunohistochemistry", "moon", "retina", "rocket", "stereo_motorcycle"),
)


def few() -> Iterator[Tensor]:
    """17 pictures of scikit-image and scikit-learn, `[3, height, width]` in [-1, 1]; not all are photos of things."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    for name in _SKIMAGE:
        found = getattr(skimage.data, name)()
        yield _as_tensor(found[0] if isinstance(found, tuple) else found)
    for image in load_sample_images().images:
        yield _as_tensor(image)


def things() -> Iterator[Tensor]:
    """100 photos of animals and objects, one of each kind, that ai-benchmark ships for classifiers."""
    for path in _pictures("ai-benchmark", "data/classification/*.jpg"):
        yield _read(path)


def scenes() -> Iterator[Tensor]:
    """130 photos of streets, parks and cats that ai-benchmark ships for other nets."""
    for path in _pictures("ai-benchmark", "data/enhancement/*.jpg", "data/segmentation/*.jpg"):
        if not path.stem.endswith("_segmented"):
            yield _read(path)


def labelled() -> Iterator[tuple[Tensor, int]]:
    """20 ImageNet photos that foolbox ships, each with its class."""
    for path in _pictures("foolbox", "data/imagenet_*.jpg"):
        yield _read(path), int(path.stem.rpartition("_")[2])


def _pictures(name: str, *patterns: str) -> list[Path]:
    package = find_spec(name.replace("-", "_"))
    if package is None or package.origin is None:
        raise SystemExit(f"these photos come with {name}: pip install --no-deps {name}")
    folder = Path(package.origin).parent
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def _read(path: Path) -> Tensor:
    from PIL import Image

    return _as_tensor(np.array(Image.open(path).convert("RGB")))


def _as_tensor(image: np.ndarray[Any, Any]) -> Tensor:
    colours = np.stack([image] * 3, 2) if image.ndim == 2 else image[..., :3]
    return torch.from_numpy(colours.copy()).permute(2, 0, 1).float() / 127.5 - 1


def crops(photo: Tensor, count: int, side: int, generator: torch.Generator) -> Tensor:
    """Squares of half to all of the shorter side, mirrored or not, resized."""
    made = []
    for _ in range(count):
        shorter = min(photo.shape[1:])
        size = int(shorter * (0.5 + 0.5 * float(torch.rand((), generator=generator))))
        top, left = (int(torch.randint(n - size + 1, (), generator=generator)) for n in photo.shape[1:])
        square = photo[None, :, top : top + size, left : left + size]
        square = square.flip(3) if float(torch.rand((), generator=generator)) < 0.5 else square
        made.append(torch.nn.functional.interpolate(square, (side, side), mode="bicubic", antialias=True))
    return torch.cat(made).clamp(-1, 1)


def crops_of(photos: Sequence[Tensor], count: int, side: int, generator: torch.Generator) -> Tensor:
    """So many crops in all, of each photo as many as of any other, or one more."""
    each, more = divmod(count, len(photos))
    longer = set(torch.randperm(len(photos), generator=generator)[:more].tolist())
    parts = [
        crops(p, each + (n in longer), side, generator) for n, p in enumerate(photos) if each or n in longer
    ]
    return torch.cat(parts)

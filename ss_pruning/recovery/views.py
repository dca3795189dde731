"""Shifted and mirrored images: from a few, many."""

from __future__ import annotations

import torch
from torch import Tensor

from ss_pruning.importance.calibration import Batch
from ss_pruning.recovery.settings import Recovery


def another_view(batch: Batch, settings: Recovery, generator: torch.Generator) -> Batch:
    """The same images, each shifted and mirrored in its own way; inputs that are no images as they are.

    Where a model takes several images at once, such as one and its mask, they move together.
    """
    begin = generator.get_state()
    return batch.mapped(lambda x: _moved(x, settings, generator.set_state(begin)) if _are_images(x) else x)


def _are_images(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_floating_point() and x.shape[1] in (1, 3)


def _moved(images: Tensor, settings: Recovery, generator: torch.Generator) -> Tensor:
    """`[n, channels, height, width]`: pixels that come in from outside mirror those inside."""
    n, _, height, width = images.shape
    rows, columns = (_lines(n, size, settings.shift, generator) for size in (height, width))
    if settings.flip:
        mirrored = torch.rand(n, 1, generator=generator, dtype=torch.float32) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    number = torch.arange(n)[:, None, None]
    at = (number, rows[:, :, None], columns[:, None, :])
    where = tuple(index.to(images.device) for index in at)
    return images.permute(0, 2, 3, 1)[where].permute(0, 3, 1, 2)


def _lines(n: int, size: int, share: float, generator: torch.Generator) -> Tensor:
    """`[n, size]`: which line of each image comes where."""
    most = min(int(share * size + 0.5), size - 1)
    shift = torch.randint(-most, most + 1, (n, 1), generator=generator)
    inside = (torch.arange(size) + shift).abs()
    return (size - 1) - ((size - 1) - inside).abs()

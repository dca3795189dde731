"""Sizes and layouts that run are told from those that do not, and the model stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ss_pruning.compensation.batch_sizes import channels_last, sizes_that_run
from ss_pruning.importance.calibration import Batch
from tests.importance.test_calibration import IMAGES, Frames, Net, OneImage, Unbatched, made
from tests.support.snapshot import snapshot


@pytest.mark.parametrize(
    ("model", "example", "sizes"),
    [
        (made(Net), IMAGES[:1], (1, None)),
        (made(Net), {"image": IMAGES[:5]}, (1, None)),
        (made(OneImage), IMAGES[:1], (1, 1)),
        (made(Frames), IMAGES[:4], (4, None)),
        (made(Frames), (IMAGES[:8],), (8, None)),
        (made(Unbatched), IMAGES[0], (3, 3)),
    ],
)
def test_sizes_that_run_are_found_by_running(model: nn.Module, example: Any, sizes: Any) -> None:
    before = snapshot(model)
    assert sizes_that_run(model, example) == sizes
    assert snapshot(model) == before


def test_images_are_laid_out_as_they_run() -> None:
    def layout(batch: Batch) -> bool:
        return bool(batch.inputs.is_contiguous(memory_format=torch.channels_last))

    batch = Batch.of(IMAGES)
    ready = channels_last(Net(), batch)
    assert ready.source is IMAGES
    assert layout(ready[torch.tensor([4, 1])])
    assert not layout(batch)
    assert torch.equal(ready.inputs, IMAGES)
    flat = nn.Sequential(nn.Conv2d(3, 2, 3), Viewed())
    assert not layout(channels_last(flat, batch))
    moved = ready[torch.tensor([4, 1])].mapped(lambda x: x + 1)
    assert layout(moved)
    assert torch.equal(moved.inputs, IMAGES[[4, 1]] + 1)


class Viewed(nn.Module):
    """Does not run on what lies channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)

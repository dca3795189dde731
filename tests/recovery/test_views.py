"""Shifted and mirrored images against loops over pixels."""

from __future__ import annotations

import torch

from ss_pruning.importance.calibration import Batch
from ss_pruning.recovery.settings import Recovery
from ss_pruning.recovery.views import another_view


def moved(image: torch.Tensor, down: int, right: int, flip: bool) -> torch.Tensor:
    """What leaves an edge is mirrored in it."""
    _, height, width = image.shape
    out = torch.empty_like(image)
    for i in range(height):
        for j in range(width):
            row, column = i + down, (width - 1 - j if flip else j) + right
            row = -row if row < 0 else 2 * (height - 1) - row if row >= height else row
            column = -column if column < 0 else 2 * (width - 1) - column if column >= width else column
            out[:, i, j] = image[:, row, column]
    return out


def view(x: torch.Tensor, settings: Recovery, seed: int = 0) -> torch.Tensor:
    found: torch.Tensor = another_view(Batch.of(x), settings, torch.Generator().manual_seed(seed)).inputs
    return found


def test_each_image_is_one_of_its_shifts() -> None:
    x = torch.randn(40, 3, 8, 6)
    seen = set()
    for image, now in zip(x, view(x, Recovery(shift=0.25)), strict=True):
        shifts = [(d, r, f) for d in range(-2, 3) for r in range(-2, 3) for f in (False, True)]
        (which,) = [shift for shift in shifts if torch.equal(moved(image, *shift), now)]
        seen.add(which)
    assert {d for d, _, _ in seen} == {r for _, r, _ in seen} == set(range(-2, 3))
    assert {f for _, _, f in seen} == {False, True}


def test_an_image_and_its_mask_move_together() -> None:
    x = torch.randn(30, 3, 8, 6)
    pair = Batch.of({"image": x, "mask": x[:, :1].clone()})
    now = another_view(pair, Recovery(shift=0.25), torch.Generator().manual_seed(0)).inputs
    assert not torch.equal(now["image"], x)
    assert torch.equal(now["mask"], now["image"][:, :1])


def test_what_is_drawn_does_not_depend_on_the_usual_precision() -> None:
    x = torch.randn(30, 3, 8, 6)
    expected = view(x, Recovery())
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(view(x, Recovery()), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_both_can_be_left_out() -> None:
    x = torch.randn(9, 1, 8, 6)
    assert torch.equal(view(x, Recovery(shift=0.0, flip=False)), x)
    flipped = view(x, Recovery(shift=0.0))
    assert all(torch.equal(b, a) or torch.equal(b, a.flip(-1)) for a, b in zip(x, flipped, strict=True))


def test_what_is_no_image_is_left_alone() -> None:
    for x in (torch.randn(4, 7), torch.randn(4, 2, 8, 8), torch.zeros(4, 3, 8, 8, dtype=torch.uint8)):
        assert torch.equal(view(x, Recovery()), x)

"""The page of the recovery benchmark: means over seeds, misses as misses; choices are made on other images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import recovery
from benchmarks.data.cifar import draw


def line(**changes: Any) -> dict[str, Any]:
    plain = {
        "net": "resnet20",
        "macs": 0.5,
        "source": "images",
        "seed": 0,
        "split": "test",
        "steps": 1000,
        "dense": 91.73,
        "cut": 86.0,
        "recovered": 89.0,
        "minutes": 2.0,
        "rate": 0.001,
        "machine": {"device": "cpu"},
        "versions": {"torch": "2"},
    }
    return plain | changes


def test_the_page_has_means_and_says_by_how_much_an_aim_is_missed() -> None:
    lines = [line(), line(seed=1, recovered=90.0), line(split="train", recovered=99.0), line(net="vgg")]
    page = recovery.page(lines)
    (row,) = [text for text in page.splitlines() if text.startswith("| resnet20")]
    assert "| 86.00 | **89.50** | 89.6 (-0.10) | 2 |" in row
    assert "99.0" not in page
    (other,) = [text for text in page.splitlines() if text.startswith("| vgg")]
    assert "| - | 1 |" in other


def test_choices_are_made_on_images_that_are_not_trained_on() -> None:
    train = torch.arange(6000), torch.arange(6000) % 10
    chosen, labels = recovery.scored("train", train, Path(), seed=3)
    assert len(chosen) == 3000
    assert not set(chosen.tolist()) & set(draw(train, recovery.COUNT, 3)[0].tolist())
    assert torch.equal(labels, chosen % 10)

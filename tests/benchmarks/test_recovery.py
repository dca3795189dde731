"""The page of the recovery benchmark: means over seeds, misses as misses; choices are made on other images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accuracy import recovery, recovery_curve
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
        "images": 512,
        "dtype": None,
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


def test_runs_on_more_images_or_in_mixed_precision_are_rows_of_their_own() -> None:
    lines = [line(), line(images=50_000, recovered=91.0), line(dtype="bfloat16", recovered=88.0)]
    rows = [text for text in recovery.page(lines).splitlines() if text.startswith("| resnet20")]
    assert [row.split("|")[3].strip() for row in rows] == [
        "512, unlabelled",
        "512, unlabelled",
        "50,000, unlabelled",
    ]
    assert [row.split("|")[4].strip() for row in rows] == ["1,000", "1,000, bfloat16", "1,000"]
    assert recovery_curve.chosen(lines) == lines[:1]
    assert "89.6" not in rows[2]


def test_scores_on_training_images_go_with_few_images() -> None:
    with pytest.raises(SystemExit):
        recovery.main(["resnet20:0.5", "--split", "train", "--images", "1000"])


def test_choices_are_made_on_images_that_are_not_trained_on() -> None:
    train = torch.arange(6000), torch.arange(6000) % 10
    chosen, labels = recovery.scored("train", train, Path(), seed=3)
    assert len(chosen) == 3000
    assert not set(chosen.tolist()) & set(draw(train, recovery.COUNT, 3)[0].tolist())
    assert torch.equal(labels, chosen % 10)


def test_the_curve_is_of_draws_that_all_lengths_were_run_with(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots are drawn with matplotlib")
    lines = [
        line(steps=100, recovered=87.0, cpu_minutes=0.5),
        line(steps=100, recovered=10.0, cpu_minutes=9.0, seed=1),  # no labels were used with it
        line(steps=400, recovered=89.0),  # its CPU time was not noted
        line(source="labels", steps=100, recovered=85.0, cpu_minutes=0.25),
        line(source="labels", steps=100, recovered=99.0, cpu_minutes=9.0, split="train"),
        line(source="synthetic", steps=100, recovered=99.0),
        line(dtype="bfloat16", steps=100, recovered=99.0),
    ]
    found = recovery_curve.curves(lines)
    assert found["images"] == {0: (0.0, 86.0), 100: (0.5, 87.0), 400: (2.0, 89.0)}
    assert found["labels"] == {0: (0.0, 86.0), 100: (0.25, 85.0)}
    page = recovery.page(lines)
    assert "| 100 | 0.5 | 87.00 | 0.2 | 85.00 |" in page
    assert "| 400 | 2.0 | 89.00 |  |  |" in page
    assert "That of 400 steps was not noted" in page
    assert "labels | 512" not in page
    recovery_curve.draw(lines, tmp_path / "curve.svg")
    assert "<svg" in (tmp_path / "curve.svg").read_text()


def test_without_labels_there_is_no_curve_to_compare(tmp_path: Path) -> None:
    assert recovery_curve.section([line(net="vgg16bn")]) == []
    recovery_curve.draw([], tmp_path / "curve.svg")
    assert not (tmp_path / "curve.svg").exists()

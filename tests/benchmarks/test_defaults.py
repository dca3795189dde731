"""The page that confirms defaults: what is compared with what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accuracy import defaults
from benchmarks.data.small_nets import CONFIRMING


def line(way: str, top1: float, importance: str = defaults.DEFAULT, **other: Any) -> dict[str, Any]:
    found = {"net": next(iter(CONFIRMING)), "seed": 0, "macs": 0.7, "dense": 90.0, "images": 10}
    found |= {"agreement": None, "error": None, "versions": {"torch": "2"}, "seconds": 1.0}
    return {**found, "way": way, "top1": top1, "importance": importance, **other}


def test_the_page_sets_ours_beside_the_best_of_the_others(tmp_path: Path) -> None:
    lines = [
        line("none", 50.0),
        line("none", 60.0, "lamp"),
        line("none", 55.0, "fpgm"),
        line("mean", 80.0),
        line("mean", 84.0, seed=1),
        line("mean", 70.0, "lamp"),
        line("none", 99.0, net="resnet20"),
    ]
    text = defaults.write(lines, tmp_path / "page.md").read_text()
    assert "| dense | 90.0 |\n| none | 50.0 / 60.0 (lamp) |\n| mean | **82.0** / 70.0 (lamp) |" in text
    assert "resnet20" not in text.partition("## 70 %")[2]
    assert "Does fidelity tell" not in text


def test_orders_are_counted_with_their_slack() -> None:
    lines = [
        line("none", 50.0),
        line("mean", 49.5),
        line("none", 50.0, macs=0.5),
        line("mean", 47.0, macs=0.5),
    ]
    assert defaults._orders(lines) == [("mean >= none - 1", 1, 2, 2.0)]


def test_fidelity_is_ranked_against_what_is_lost() -> None:
    told = [(0.9, 0.1, 88.0), (0.7, 0.2, 80.0), (0.5, 0.4, 85.0), (0.2, 0.3, 30.0)]
    lines = [line("none", top1, agreement=a, error=e) for a, e, top1 in told]
    assert defaults._predicted(lines) == pytest.approx((4, 0.8, 0.4))
    assert defaults._predicted(lines[:2]) is None


def test_a_run_takes_the_defaults() -> None:
    torch.manual_seed(0)
    model = next(iter(CONFIRMING.values()))().eval()
    images = torch.randint(0, 255, (24, 3, 32, 32), dtype=torch.uint8), torch.zeros(24, dtype=torch.long)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = defaults.run(model, images, images, 0.8, "none, images", defaults.DEFAULT)
    assert 0 <= found["top1"] <= 100
    assert 0 <= found["agreement"] <= 1
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())

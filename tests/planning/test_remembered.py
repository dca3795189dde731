"""What was measured is measured once: the same again is read, anything else is measured anew."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ss_pruning import Allocation, prune_
from ss_pruning.planning import ranking, remembered
from tests.support.zoo import two_normed_convolutions as net

X = torch.randn(24, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Notes each measurement; everything is worth a file."""
    monkeypatch.setenv("SS_PRUNING_CACHE", str(tmp_path))
    monkeypatch.setattr(remembered, "WORTH", 0.0)
    seen: list[int] = []
    real = ranking.by_sensitivity

    def counting(*args: Any) -> Any:
        seen.append(1)
        return real(*args)

    monkeypatch.setattr(ranking, "by_sensitivity", counting)
    return seen


def widths(model: nn.Module | None = None, **options: Any) -> list[int]:
    options = {
        "macs": 0.6,
        "compensation": "reconstruct",
        "calibration": X,
        "allocation": "sensitivity",
    } | options
    report = prune_(model or net(), X[:1], **options)
    return [layer.outputs_after for layer in report.layers]


def test_the_same_again_and_another_budget_measure_once(counted: list[int]) -> None:
    first = widths()
    assert widths() == first
    widths(macs=0.8)
    assert len(counted) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"model": net(1)},
        {"calibration": X.flip(0)},
        {"compensation": "linear"},
        {"allocation": Allocation("sensitivity", max_ratio=0.5)},
        {"importance": "magnitude"},
        {"ignore": "0"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_anything_else_is_measured_anew(counted: list[int], other: dict[str, Any]) -> None:
    widths()
    widths(**other)
    assert len(counted) == 2


def test_what_competes_belongs_to_what_is_measured(counted: list[int]) -> None:
    choices = (
        None,
        "sensitivity",
        Allocation(cost_exponent=1.0),
        Allocation("sensitivity", cost_exponent=1.0),
    )
    for allocation in (*choices, *choices):
        widths(compensation="linear", allocation=allocation)
    assert len(counted) == len(choices)


class Ending(nn.Sequential):
    """The same layers as `net()`, and something else behind the last: no module, weight or score shows it."""

    squares = False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y.square() if Ending.squares else y


def test_other_code_is_measured_anew(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Ending(*net()).eval()
    widths(copy.deepcopy(model))
    widths(copy.deepcopy(model))
    assert len(counted) == 1
    monkeypatch.setattr(Ending, "squares", True)
    widths(copy.deepcopy(model))
    assert len(counted) == 2


def test_what_hangs_on_the_budget_is_measured_for_each(counted: list[int]) -> None:
    """Without reconstruct a group is measured beside what the others would lose."""
    widths(compensation="linear")
    widths(compensation="linear")
    widths(compensation="linear", macs=0.8)
    assert len(counted) == 2


def test_a_damaged_file_costs_time_and_nothing_else(counted: list[int], tmp_path: Path) -> None:
    first = widths()
    (path,) = (
        p for p in tmp_path.iterdir() if p.stat().st_mtime_ns == max(map(_written, tmp_path.iterdir()))
    )
    for damage in (
        {},
        {"values": torch.zeros(3, dtype=torch.float64)},
        {"values": torch.full((12,), torch.nan).double()},
    ):
        save_file(damage, path)
        assert widths() == first
    path.write_bytes(b"no tensors")
    assert widths() == first
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x7F  # a number that is another, and looks sound
    path.write_bytes(content)
    assert widths() == first
    assert len(counted) == 6


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns


def test_scores_are_measured_once(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    first = widths()
    monkeypatch.setattr(ranking, "group_scores", lambda *_: pytest.fail("measured"))
    assert widths() == first
    assert widths(macs=0.8) != first


def test_importances_of_the_users_own_score_each_time(
    counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows what they depend on."""
    scored: list[int] = []
    real = ranking.group_scores
    monkeypatch.setattr(ranking, "group_scores", lambda *args: scored.append(1) or real(*args))
    widths(importance="magnitude")
    widths(importance="magnitude")
    assert len(scored) == 2


def test_what_was_quick_is_not_kept(
    counted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "WORTH", 60.0)
    widths()
    assert not list(tmp_path.iterdir())


def test_what_is_read_is_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SS_PRUNING_CACHE", str(tmp_path))
    monkeypatch.setattr(remembered, "WORTH", -1.0)
    made = [[np.array([0.5, np.inf]), np.array([1.0])], [np.array([2.0])]]
    assert remembered.remembered("one", lambda: made, made) is made
    again = remembered.remembered("one", lambda: pytest.fail("measured"), made)
    assert [[part.tolist() for part in group] for group in again] == [[[0.5, np.inf], [1.0]], [[2.0]]]


def test_another_version_of_the_package_measures_anew(
    counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    widths()
    monkeypatch.setattr(remembered, "_code", lambda: "other")
    widths()
    assert len(counted) == 2

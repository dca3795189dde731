"""The page of measured gains says what the lines say: verdicts, spreads between runs, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import latency
from benchmarks.latency_page import write_page
from ss_pruning.benching import Setting
from ss_pruning.planning import Costs

CPU = {"device": "cpu", "name": "Abacus", "threads": "2", "torch": "2"}
GPU = {"device": "cuda", "name": "Loom", "threads": "-", "torch": "2"}


def speed(seconds: float) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "low": 0.9 * seconds,
        "high": 1.1 * seconds,
        "images_per_second": 8 / seconds,
        "peak_bytes": 10**8,
    }


def compared(part: str, machine: dict[str, str], setting: dict[str, Any], **ratios: float) -> dict[str, Any]:
    ratios = {"dense": 1.0, **ratios}
    return {
        "part": part,
        "net": "resnet50",
        "machine": machine,
        "pixels": 224,
        "versions": {"torch": "2"},
        "facts": {
            way: {"macs_kept": 0.5, "params_kept": 0.7, "file": 0.7} for way in ratios if way != "dense"
        },
        "comparison": {
            "setting": vars(Setting(**setting)),
            "rounds": 9,
            "speeds": {way: speed(ratio) for way, ratio in ratios.items()},
            "ratios": ratios,
        },
    }


def page(tmp_path: Path, *lines: dict[str, Any]) -> str:
    return write_page(list(lines), tmp_path / "latency.md").read_text()


def test_the_goal_is_met_or_not(tmp_path: Path) -> None:
    text = page(tmp_path, compared("budget", CPU, {"batch": 8}, default=0.63, even=0.61))
    assert "At most 0.62 of the dense time is met by `even`; not by default." in text
    text = page(tmp_path, compared("budget", CPU, {"batch": 8}, default=0.63))
    assert "is met by none; not by default." in text
    assert "CPU: Abacus, 2 threads" in text
    assert "Not measured yet: no GPU was at hand" in text


def test_a_gpu_is_held_against_the_promise_of_macs(tmp_path: Path) -> None:
    text = page(tmp_path, compared("budget", GPU, {"batch": 256}, default=0.6))
    assert "(aim: within 15%): default +20%" in text
    assert "no GPU was at hand" not in text


def test_several_runs_show_how_far_they_agree(tmp_path: Path) -> None:
    runs = [compared("budget", CPU, {"batch": 8}, default=ratio) for ratio in (0.66, 0.61, 0.63)]
    other = compared("settings", CPU, {"batch": 8, "dtype": "bf16"}, default=0.7)
    text = page(tmp_path, *runs, other)
    assert "| 0.630 [0.610, 0.660] |" in text
    assert "| batch 8, bf16 | 1000.0 ms | 900.0 to 1100.0 | 0.700 |" in text


def test_targets_are_counted(tmp_path: Path) -> None:
    line = {
        "part": "targets",
        "net": "n",
        "machine": CPU,
        "pixels": 224,
        "versions": {},
        "batch": 8,
        "seconds": 3.0,
    }
    shared = {"found": 0.6, "macs_kept": 0.5, "params_kept": 0.5}
    text = page(
        tmp_path,
        {**line, **shared, "target": 0.6, "again": 0.62},
        {**line, **shared, "target": 0.5, "again": 0.6},
    )
    assert "+20.0%" in text
    assert "Within 5% of the target when measured again: 1 of 2." in text


def test_a_gpu_that_is_not_there_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["latency", "--device", "cuda"])
    assert latency.main() == 2
    assert "This needs one GPU with about 24 GiB" in capsys.readouterr().err


def test_costs_are_of_macs_only_for_a_while() -> None:
    before = Costs.per_family
    with latency.costs_of_macs():
        assert Costs.per_family is not before
    assert Costs.per_family is before

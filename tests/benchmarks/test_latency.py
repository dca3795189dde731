"""The page of measured gains says what the lines say: verdicts, spreads between runs, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer", reason="an optional extra: pip install 'ss-pruning[cli]'")

from benchmarks.latency import run as latency
from benchmarks.latency.page import make_page
from ss_pruning.planning.costs import Costs
from ss_pruning.profiling.comparison import Setting, Speed

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
    return make_page(list(lines), tmp_path / "latency.md").read_text()


def test_the_goal_is_met_or_not(tmp_path: Path) -> None:
    text = page(tmp_path, compared("budget", CPU, {"batch": 8}, default=0.63, even=0.61))
    assert "At most 0.62 of the dense time is met by `even`; not by default." in text
    assert "At these MACs `even` takes the least time." in text
    text = page(tmp_path, compared("budget", CPU, {"batch": 8}, default=0.63))
    assert "is met by none; not by default." in text
    assert "CPU: Abacus, 2 threads" in text
    assert "Not measured yet. " in text


def test_a_gpu_is_held_against_the_promise_of_macs(tmp_path: Path) -> None:
    text = page(tmp_path, compared("budget", GPU, {"batch": 256}, default=0.6))
    assert "(aim: within 15%): default +20%" in text
    assert "Not measured yet" not in text


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
    before = Costs.per_channel_set
    with latency.costs_of_macs():
        assert Costs.per_channel_set is not before
    assert Costs.per_channel_set is before


def test_what_a_run_has_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the first comparison, it goes on with the second; a run of another name begins anew."""
    results, asked = tmp_path / "lines.jsonl", []

    class Found:
        def __init__(self, setting: Setting, names: list[str]) -> None:
            self.ratios = dict.fromkeys(names, 1.0)
            self.speeds = {name: Speed(1.0, 1.0, 1.0, 1.0, None) for name in names}
            self.setting = setting

        def to_dict(self) -> dict[str, Any]:
            return {"setting": vars(self.setting), "ratios": self.ratios}

    def compare(models: dict[str, Any], size: Any, setting: Setting, *_: Any, **__: Any) -> Found:
        asked.append((str(setting), *models))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return Found(setting, list(models))

    def small(bench: Any, net: str, way: str) -> tuple[None, dict[str, float]]:
        return None, {"macs_kept": 0.5, "params_kept": 0.5, "file": 0.5}

    monkeypatch.setattr(latency, "compare_speeds", compare)
    monkeypatch.setattr(latency.Bench, "at_budget", small)
    common = ["latency", "--batch", "2", "--parts", "budget", "compiled", "--results", str(results)]
    monkeypatch.setattr("sys.argv", [*common, "--run", "a"])
    with pytest.raises(KeyboardInterrupt):
        latency.main()
    assert latency.main() == latency.main() == 0
    budget = ("batch 2, float32", "dense", *latency.WAYS)
    compiled = ("batch 2, float32, compiled", "dense", 'round_to="measured"')
    assert asked == [budget, compiled, compiled]
    monkeypatch.setattr("sys.argv", [*common, "--run", "b"])
    assert latency.main() == 0
    assert asked[3:] == [budget, compiled]

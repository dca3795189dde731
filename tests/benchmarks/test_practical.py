"""The page of what pruning takes shows each run, says what failed, and what was not run."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.latency import practical
from benchmarks.latency.practical import NETS, STAGES, Waiting, page
from ss_pruning._utils.progress import seconds_left


def run(cpu: float) -> dict[str, Any]:
    return {
        "images": 240, "side": 224, "macs": 0.5, "cpu_seconds": cpu,
        "seconds": {"trace": 1.0, "measure": 99.5}, "peaks": {"trace": 2**20, "measure": 1500 * 2**20},
    }  # fmt: skip


def test_the_page_shows_each_run_and_names_what_is_missing() -> None:
    runs = {"resnet50": {"none": run(11), "reconstruct": {"failed": "exit code -9: no message"}}}
    text = page({"runs": runs, "versions": {"torch": "2"}})
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| resnet50")]
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert rows[0][1:3] == ["none", "240 of 224"]
    assert rows[0][3 + STAGES.index("measure")] == "99.5"
    assert rows[0][-3:] == ["11", "1,500", "earlier |"]
    assert "exit code -9" in rows[1][2]
    assert "A plain cut takes 11 to 11 s (`resnet50`)." in text
    missing = text.split("Not run with `reconstruct` yet: ")[1]
    assert "yolov8n" in missing
    assert "resnet50," not in missing.replace("cifar_resnet56", "")
    assert set(NETS) >= {"resnet50", "cifar_resnet56"}


def test_the_page_says_how_right_it_was_and_what_a_killed_run_costs() -> None:
    new = run(30) | {
        "expected_seconds": {"score": 10.0, "cut": 110.0}, "wall_seconds": 150.0, "told_after_a_tenth": 0.9,
    }  # fmt: skip
    runs = {"resnet50": {"linear": new, "none": run(5)}}
    text = page({"runs": runs, "killed": {"resnet50": {"linear": {"cpu_seconds": 9.0}}}, "versions": {}})
    assert "| resnet50 | linear | about 2 minutes | 120 | 150 | 1.25 | 0.90 |" in text
    assert "| resnet50 | linear | 30 | 9 | 0.30 |" in text
    assert "Killed" not in page({"runs": runs, "versions": {}})


def test_what_was_said_after_a_tenth_is_compared_with_what_was_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(practical.time, "perf_counter", lambda: now[0])
    waiting = Waiting(100.0)
    waiting.note(0.0, 0.001)  # nothing is expected yet
    now[0] = 101.0
    waiting.note(0.0, 40.0)
    now[0] = 103.0
    waiting.note(4.0, 40.0)  # twice as fast as expected
    now[0] = 121.0
    told = seconds_left(2.0, 4.0, 40.0)
    assert waiting.after(0.1) == pytest.approx(told / 18)
    assert 18 < told < 36

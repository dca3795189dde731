"""The page of what pruning takes shows each run, says what failed, and what was not run."""

from __future__ import annotations

from typing import Any

from benchmarks.latency.practical import NETS, STAGES, page


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
    assert rows[0][-2:] == ["11", "1,500 |"]
    assert "exit code -9" in rows[1][2]
    assert "resnet50 mean" in text.split("Not run yet: ")[1]
    assert text.count("yolov8n none") == 1
    assert set(NETS) >= {"resnet50", "cifar_resnet56"}

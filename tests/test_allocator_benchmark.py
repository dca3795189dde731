"""The benchmark of the C library's memory: its page says what the runs say."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch_pruning")

from benchmarks import allocator

GIB = 2**30


def test_the_page_has_shares_of_pairs() -> None:
    runs = {
        "as it comes": [{"seconds": 10.0, "bytes": 1.0 * GIB}, {"seconds": 20.0, "bytes": 2.0 * GIB}],
        "keeping": [{"seconds": 5.0, "bytes": 1.5 * GIB}, {"seconds": 16.0, "bytes": 3.0 * GIB}],
    }
    text = allocator.page({"net": runs}, {"torch": "2"})
    assert "| net | 15.0 ± 7.1 | 10.5 ± 7.8 | 0.65 ± 0.21 | 2.00 | 3.00 |" in text
    assert "over 2 runs" in text
    assert all(f"{name}={value}" in text for name, value in allocator.KEEPING.items())


def test_a_child_gets_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    class Done:
        stdout = "a warning\n" + json.dumps({"seconds": 1.0, "bytes": 2.0})

    def run(command: list[str], env: dict[str, str], **rest: object) -> Done:
        seen.update(env)
        return Done()

    monkeypatch.setattr(allocator.subprocess, "run", run)
    assert allocator.in_child("net", allocator.KEEPING) == {"seconds": 1.0, "bytes": 2.0}
    assert seen.items() >= allocator.KEEPING.items()

"""One way through the main job: nothing calls back up but hooks, and what runs a model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "walk.py"


def test_prune_climbs_back_up_by_hooks_alone() -> None:
    if not SCRIPT.is_file():
        pytest.skip("only a checkout has scripts")
    found = importlib.util.spec_from_file_location("walk", SCRIPT)
    assert found is not None
    assert found.loader is not None
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    walk = script.walked()
    files = walk.files()
    assert {"pruning", "graph/tracing", "surgery/cut", "surgery/verification", "report/records"} <= set(files)
    assert [step for step in walk.upward() if not script.is_tool(step.caller)] == []
    assert script.stops(["a", "a", "b", "a"]) == 3

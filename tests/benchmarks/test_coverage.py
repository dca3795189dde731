"""The page of coverage counts what works, and says how the rest fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.coverage.names import Candidate
from benchmarks.coverage.page import exact, make_page


def line(spec: str, side: str, status: str, **changes: Any) -> dict[str, Any]:
    values = {"seconds": 2.0, "removed": 0.5, "code": "abc torch 2", "params_before": 2e6, "pixels": 64}
    return {"spec": spec, "side": side, "status": status, **values, **changes}


def test_the_page_counts_and_names_failures(tmp_path: Path) -> None:
    models = [Candidate(f"timm:{name}", "family", 1, 1.0, 9) for name in ("b", "a")]
    found = [
        line("timm:a", "ours", "ok", max_error=1e-15, outputs=10, excluded={"reaches the model's output": 5}),
        line("timm:b", "ours", "ok", max_error=3e-15, removed=0.1),
        line("timm:a", "tp", "ok", masked_error=2e-15),
        line("timm:b", "tp", "error", error="first\nsecond | <x>", code="old torch 2"),
    ]
    text = make_page(models, {(x["spec"], x["side"]): x for x in found}, tmp_path / "page.md").read_text()
    assert "| work | **2 (100.0%)** | **1 (50.0%)** |" in text
    assert "| error | 0 | 1 |" in text
    assert "| timeout |" not in text
    assert (
        "| largest difference to the masked model | 3.0e-15 (of 2 models) | 2.0e-15 (of 1 models) |" in text
    )
    assert "of its parameters lose: timm:b." in text
    assert "| a | 64 | 2.0 M | ok | 2.0 | 50% | 1.0e-15 | ok | 2.0 | 50% | 2.0e-15 | output 50% |" in text
    assert "- timm:b: error, first second / &lt;x>" in text
    assert "Figures of ss-pruning are by 1 state of the code they depend on." in text


def test_models_that_mix_channels_cannot_be_compared_from_outside() -> None:
    assert exact({"masked_error": 1e-3, "mixers": ["norm"]}) is None
    assert exact({"masked_error": 1e-3, "mixers": []}) == 1e-3
    assert exact({"masked_error": 1e-3, "mixers": ["norm"], "max_error": 1e-16}) == 1e-16

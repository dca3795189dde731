"""The page of coverage counts what works, and says how the rest fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.coverage import elsewhere_page
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


def test_models_of_other_libraries_stand_side_by_side_and_fresh(tmp_path: Path) -> None:
    of = {"library": "smp", "name": "Unet", "seconds": 1.0, "code": "abc x", "version": "1", "torch": "2"}
    sides = [
        {**of, "side": "ours", "status": "ok", "removed": 0.5, "masked_error": 1e-15, "mixers": []},
        {**of, "side": "tp", "status": "error", "error": "first\nsecond"},
    ]
    excluded = [{"reason": "reaches the model's output: x", "paths": ["a", "b"], "channels": 3}]
    fresh = [
        {**of, "way": "default", "status": "ok", "params_kept": 0.7, "max_error": 1e-16, "by_decisions": False,
         "excluded": excluded},
        {**of, "way": "local", "status": "wrong"},
    ]  # fmt: skip
    result = {"lines": sides, "fresh": fresh, "libraries": {"smp": "1", "monai": None}, "code": "abc",
              "made_with": {"torch": "2", "torch-pruning": "1.6"}}  # fmt: skip
    text = elsewhere_page.make_page(result, tmp_path / "page.md").read_text()
    assert "works on 1 of 1, Torch-Pruning's `BasePruner` on 0.**" in text
    assert "Not installed, not run: monai." in text
    assert "earlier state" not in text
    assert "| smp | Unet | ok | 50% | ok | error: first |" in text
    assert (
        "| smp | Unet | ok | 1.0 | 70% | 1e-16 | reaches the model's output: 2, 3 | wrong |  | 1.0 |" in text
    )
    assert "By default 1 of 1 work, by local 0.5 0." in text

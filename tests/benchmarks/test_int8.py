"""The page on INT8 says what was measured, also where both together are no gain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.latency import int8, int8_page
from ss_pruning.report.records import TOO_NOISY


def line(bytes_: int, share: float, both: tuple[float, float], **worth: float) -> dict[str, Any]:
    spread = {"of_dense_spread": (share - 0.01, share + 0.01), "both_of_this_spread": both}
    return {"bytes": bytes_, "seconds": 0.01 * share, "of_dense": share, **spread, **worth}


def net(**changes: Any) -> dict[str, Any]:
    variants = {
        "dense": line(4_000_000, 1.0, (0.2, 0.3), worth=0.91, agreement=1.0),
        "pruned": line(2_000_000, 0.6, (0.4, 0.5), worth=0.9, agreement=0.95),
        "INT8": line(1_000_000, 0.5, (0.5, 0.6), worth=0.905, agreement=0.99),
        "pruned, INT8": line(500_000, 0.25, (1.0, 1.0), worth=0.89, agreement=0.94),
    }
    for name, change in changes.items():
        variants[name].update(change)
    facts = {
        "trained": True,
        "measure": "top-1",
        "side": 32,
        "images": 10,
        "rounds": 15,
        "macs": 0.5,
        "round_to": 8,
    }
    return {"variants": variants, "machine": {"device": "cpu", "name": "a processor"}, **facts}


def test_the_page_has_all_figures(tmp_path: Path) -> None:
    widths = {"48": {"of_last": 0.6, "spread": (0.5, 0.7)}, "64": {"of_last": 1.0, "spread": (1.0, 1.0)}}
    found = {"nets": {"small": net()}, "macs": 0.5, "versions": {"torch": "2"}, "onnxruntime": "1"}
    found["widths"] = {"widths": widths, "rounds": 30}
    text = int8_page.make_page(found, tmp_path / "int8.md").read_text()
    assert "- small: smaller and faster than either alone" in text
    assert "| pruned, INT8 | 0.50 MB | 0.12 | 2.5 ms | 0.25 | 0.24 to 0.26 | 89.0 | 94.0 |" in text
    assert "| 48 | 0.56 | 0.60 | 0.50 to 0.70 |" in text
    assert "| dense | 4.00 MB | 1.00 | 10.0 ms |  |  | 91.0 | 100.0 |" in text


def test_programs_stand_beside_files_in_onnx(tmp_path: Path) -> None:
    kinds = {
        "onnx": {"bytes": 2_000_000, "error": 0.01, "agreement": 0.98, "seconds": 0.01},
        "pt2": {"bytes": 2_100_000, "error": 0.012, "agreement": 0.97, "seconds": 0.012},
    }
    found = {**kinds, "of_onnx": 1.2, "of_onnx_spread": (1.1, 1.3)}
    unclear = {**found, "of_onnx_spread": (0.9, 1.3)}
    nets = {"small": {"trained": False, "variants": {"dense": found, "pruned": unclear}}}
    page = int8_page.make_page(
        {"nets": {"small": net()}, "macs": 0.5, "versions": {"torch": "2"}, "onnxruntime": "1"},
        tmp_path / "int8.md",
        {"nets": nets, "torchao": "0.18"},
    ).read_text()
    row = "| small (random weights) | {} | 2.00 MB | 2.10 MB | 1.00 | 1.20 | 98.0 | 97.0 | {} |"
    assert row.format("dense", "1.20 | 1.10 to 1.30") in page
    assert row.format("pruned", f"{TOO_NOISY} | 0.90 to 1.30") in page
    assert "with torchao 0.18" in page


def test_where_both_together_are_no_gain_is_said() -> None:
    found = net(
        pruned={"both_of_this_spread": (0.9, 1.1)}, INT8={"both_of_this_spread": (1.0, 1.2), "bytes": 9}
    )
    assert int8_page.gain("small", found) == (
        f"small: {TOO_NOISY} whether faster than pruned alone, no smaller than INT8 alone, slower than INT8 alone"
    )


@pytest.mark.slow
@pytest.mark.parametrize("trained", [True, False])
def test_all_variants_are_measured(tmp_path: Path, trained: bool) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'ss-pruning[onnx]'")
    pytest.importorskip("onnxscript", reason="needs the extra: pip install 'ss-pruning[onnx]'")
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 32, 3), nn.ReLU()
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)).eval()
    images = torch.randn(60, 3, 16, 16)
    labels = model(images[40:]).argmax(1) if trained else None
    found = int8.measured(int8.Case(model, images[:40], images[40:], labels), tmp_path)
    assert list(found["variants"]) == list(int8.VARIANTS)
    sizes = [line["bytes"] for line in found["variants"].values()]
    assert sizes[0] > sizes[1] > sizes[3]
    assert found["variants"]["dense"]["error"] == 0
    assert found["variants"]["dense"].get("worth") == (1.0 if trained else None)

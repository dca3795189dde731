"""Models compared in settings: shares, speeds and memory belong together, and the models stay as they were."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

pytest.importorskip("typer", reason="an optional extra: pip install 'ss-pruning[cli]'")

from ss_pruning.cli import bench as benching
from ss_pruning.errors import InputError
from ss_pruning.profiling import comparison
from ss_pruning.profiling.comparison import compare_speeds, settings
from ss_pruning.profiling.latency import Timing
from tests.profiling.test_latency import CPU, Net
from tests.support.snapshot import snapshot


@pytest.mark.parametrize(("shares", "noisy"), [((0.8, 1.3), True), ((0.6, 0.7), False)])
def test_bench_agrees_with_itself_and_says_where_it_cannot_tell(
    monkeypatch: pytest.MonkeyPatch, shares: tuple[float, float], noisy: bool
) -> None:
    dense = (0.2, 0.5, 0.3, 0.4)
    pruned = tuple(seconds * share for seconds, share in zip(dense, shares * 2, strict=True))
    monkeypatch.setattr(comparison, "measure_latency", lambda *_, **__: [Timing(dense), Timing(pruned)])
    (setting,) = settings([4])
    found = compare_speeds({"dense": Net(8), "pruned": Net(8)}, (3, 8, 8), setting, CPU)
    seconds = {name: speed.seconds for name, speed in found.speeds.items()}
    assert seconds["pruned"] / seconds["dense"] == pytest.approx(found.ratios["pruned"])
    assert (found.speeds["dense"].low, found.speeds["dense"].high) == Timing(dense).spread
    assert found.speeds["pruned"].low == pytest.approx(seconds["dense"] * found.spreads["pruned"][0])
    console = pytest.importorskip("rich.console").Console(width=120, file=io.StringIO())
    console.print(benching.table(benching.BenchResult({}, {"dense": 2, "pruned": 1}, [found], None)))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("too noisy to tell") == noisy
    (other,) = settings([4], layouts=["channels_last"])
    with pytest.raises(InputError, match="channels_last is a layout of images"):
        compare_speeds({"dense": Net(8)}, (3, 8), other, CPU)


def test_comparisons_hold_what_they_say() -> None:
    dense, small = Net(256), Net(8)
    (setting,) = settings([4])
    found = compare_speeds({"dense": dense, "pruned": small}, (3, 32, 32), setting, CPU)
    assert found.ratios["dense"] == 1.0
    assert found.ratios["pruned"] < 1.0
    for speed in found.speeds.values():
        assert speed.low <= speed.seconds <= speed.high
        assert speed.images_per_second == pytest.approx(4 / speed.seconds)
    assert (found.speeds["pruned"].peak_bytes or 0) < (found.speeds["dense"].peak_bytes or 0)
    assert json.loads(json.dumps(found.to_dict()))["setting"]["batch"] == 4
    assert benching.file_bytes(small) < benching.file_bytes(dense)


def test_every_setting_runs_and_leaves_the_models_alone() -> None:
    dense, small = Net(16), Net(8).train()
    before = snapshot(dense), snapshot(small)
    wanted = settings([1], ["float32", "bf16"], ["contiguous", "channels_last"])
    assert [str(setting) for setting in wanted] == [
        "batch 1, float32",
        "batch 1, float32, channels_last",
        "batch 1, bf16",
        "batch 1, bf16, channels_last",
    ]
    for setting in wanted:
        compare_speeds({"dense": dense, "pruned": small}, (3, 8, 8), setting, CPU, seconds=0.1)
    assert (snapshot(dense), snapshot(small)) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (([0],), "batch 0 is empty"),
        (([1], ["int4"]), "'int4' is unknown"),
        (([1], ["bf16"], ["odd"]), "'odd' is"),
    ],
)
def test_unknown_settings_are_refused(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(*options)

"""The road of a detector, and the data it is walked on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

from benchmarks.accuracy.yolo_page import write_page
from tests.support.scripts import loaded

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "yolo"


@pytest.fixture(scope="module")
def data() -> ModuleType:
    return loaded(FOLDER / "digits_on_photos.py")


def test_a_box_is_where_the_ink_is(data: ModuleType) -> None:
    side = data.SIDE
    for seed in range(5):
        scene, scan = np.zeros((side, side, 3)), np.zeros((8, 8))
        scan[1:7, 2 + seed % 3 : 5] = 1
        x, y, width, height = data._paste(
            scene, np.zeros((side, side), bool), scan, np.random.default_rng(seed)
        )
        rows, columns = np.nonzero((scene > 0.25 * scene.max((0, 1))).all(2))
        found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        np.testing.assert_allclose(np.multiply(box, side), found, atol=1.01)


def test_data_is_the_same_each_time_and_boxes_lie_within(data: ModuleType, tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        data.write_data(tmp_path / name, training=3, validation=2)
        files.append({p.name: p.read_bytes() for p in (tmp_path / name).rglob("*.*") if p.suffix != ".yaml"})
    assert files[0] == files[1]
    for file in (tmp_path / "one" / "labels").rglob("*.txt"):
        for label, x, y, width, height in np.loadtxt(file, ndmin=2):
            assert 0 <= label <= 9
            assert width > 0
            assert height > 0
            assert 0 <= min(x - width / 2, y - height / 2) <= max(x + width / 2, y + height / 2) <= 1


@pytest.mark.slow
def test_the_road_is_walked_to_its_end(tmp_path: Path) -> None:
    pytest.importorskip("ultralytics", reason="Ultralytics is an extra")
    few = "--epochs 1 --tuning-epochs 1 --steps 2 --training 24 --validation 8 --macs 0.7"
    command = [sys.executable, str(FOLDER / "prune.py"), "--out", str(tmp_path / "out"), *few.split()]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    names = [station["name"] for station in result["stations"]]
    assert len(names) == 8
    page = write_page([result], tmp_path / "page.md").read_text()
    assert all(f"| {name} |" in page for name in names)


def test_the_page_says_how_far_each_station_is_from_the_dense_one(tmp_path: Path) -> None:
    stations = [
        {"name": "dense", "map50_95": 0.5, "map50": 0.8, "seconds": 60.0, "params": 2_000_000},
        {"name": "as ONNX", "map50_95": 0.487, "map50": 0.81, "seconds": 0.0},
    ]
    more = [stations[0], {**stations[1], "map50_95": 0.447, "map50": 0.79}]
    options = {"epochs": 3, "tuning_epochs": 1, "steps": 2, "training": 8, "validation": 4, "one_class": True}
    runs = [
        {
            "options": {**options, "macs": macs, "draw": draw},
            "macs": macs,
            "params": 0.4,
            "max_error": error,
            "stations": found,
        }
        for macs, draw, error, found in (
            (0.6, 0, 1e-16, stations),
            (0.6, 1, 2e-16, more),
            (0.3, 0, 3e-16, stations),
        )
    ]
    page = write_page(runs, tmp_path / "page.md").read_text()
    assert page.count("| dense | 50.0 |  | 80.0 | 2.00 M | 60 |") == 2
    assert "| as ONNX | 48.7 | -1.3 | 81.0 |  |  |" in page
    # 46.7 is the mean of 48.7 and 44.7, which are 4 apart: the deviation is 4 / sqrt(2).
    assert "| as ONNX | 46.7 ± 2.8 | -3.3 | 80.0 ± 1.4 |  |  |" in page
    assert "To 60% of the multiply-accumulates, 40% of the parameters, 2 draws" in page
    assert "To 30% of the multiply-accumulates, 40% of the parameters, one draw" in page
    assert "at most 3e-16" in page
    assert "--steps 2 --training 8 --validation 4 --one-class` for each share" in page
    assert "--draw 0" not in page

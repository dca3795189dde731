"""The comparison of one process with two: what its table says, what is not run again, and the folders of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.accuracy.run import add_line, read_lines
from benchmarks.sparse_training import two_processes


def line(seed: int, processes: int, top1: float, cuts: list[str]) -> dict[str, Any]:
    return {
        "dataset": "d",
        "net": "n",
        "seed": seed,
        "processes": processes,
        "dense": 90.0,
        "top1": top1,
        "cuts": cuts,
        "images": {"train": 5, "test": 4},
        "options": ["--size", "32"],
        "versions": {"torch": "2"},
    }


def both(*pairs: tuple[float, float], second: str = "a") -> list[dict[str, Any]]:
    return [
        entry
        for seed, (one, two) in enumerate(pairs)
        for entry in (line(seed, 1, one, ["a"]), line(seed, 2, two, ["a", second]))
    ]


def test_noise_is_told_from_a_difference() -> None:
    (row,) = two_processes.rows(both((80.0, 80.5), (81.0, 80.5), (82.0, 83.0)))
    assert (
        " | ".join(["", *row, ""]).strip()
        == "| n | d | 90.00 | 81.00 ± 1.00 | 81.33 ± 1.44 | +0.33 ± 1.01 | yes | yes | yes | 0, 1, 2 |"
    )
    (row,) = two_processes.rows(both((80.0, 70.0), (80.2, 70.2), (80.1, 70.1)))
    assert row[5:8] == ["-10.00 ± 0.08", "NO", "yes"]


def test_ranks_that_cut_differently_show() -> None:
    (row,) = two_processes.rows(both((80.0, 80.5), (81.0, 80.5), second="b"))
    assert row[6:] == ["yes", "NO", "no", "0, 1"]


def test_one_seed_says_nothing() -> None:
    assert list(two_processes.rows(both((80.0, 80.5)))) == []


def test_the_page_changes_between_its_markers_only(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- two processes -->\nold\n<!-- /two processes -->\nafter\n")
    for _ in range(2):
        two_processes.write_page(both((80.0, 80.5), (81.0, 80.5)), page)
    text = page.read_text()
    assert text.startswith("before\n<!-- two processes -->\nTop-1 in % on 4 test images")
    assert text.endswith("<!-- /two processes -->\nafter\n")
    assert "old" not in text


def test_what_is_there_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def finetuned(net: str, data: Path, out: Path, processes: int, *options: str) -> dict[str, Any]:
        asked.append((processes, out.name))
        out.mkdir(parents=True)
        (out / "log.json").write_text('[{"top1": 90.0}]')
        (out / "final.safetensors").touch()
        return {"top1": 80.0, "cuts": ["a"] * processes}

    monkeypatch.setattr(two_processes, "finetuned", finetuned)
    monkeypatch.setattr(two_processes, "write_folders", lambda *_: None)
    monkeypatch.setattr(two_processes, "LINES", tmp_path / "lines.jsonl")
    monkeypatch.setattr(
        "sys.argv", ["two_processes", "--nets", "n", "--seeds", "0", "1", "--runs", str(tmp_path)]
    )
    add_line(line(0, 1, 80.0, ["a"]) | {"dataset": "fashion-mnist"}, two_processes.LINES)
    assert two_processes.main() == two_processes.main() == 0
    runs = [(2, "n-seed0-of2"), (1, "n-seed1-of1"), (2, "n-seed1-of2")]
    assert asked == [(1, "fashion-mnist-n"), *((count, f"fashion-mnist-{name}") for count, name in runs)]
    assert len(read_lines(two_processes.LINES)) == 4


def test_folders_hold_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.arange(6 * 3 * 4, dtype=torch.uint8).reshape(6, 3, 2, 2)
    monkeypatch.setattr(two_processes, "load_dataset", lambda *_: (pixels, torch.arange(6) % 2))
    monkeypatch.setattr(two_processes, "COUNTS", {"train": 6, "test": 2})
    two_processes.write_folders("d", tmp_path, tmp_path / "images")
    assert len(list(tmp_path.glob("images/train/*/*.png"))) == 6
    assert len(list(tmp_path.glob("images/val/*/*.png"))) == 2
    with Image.open(tmp_path / "images" / "train" / "1" / "5.png") as image:
        assert image.getpixel((1, 0)) == tuple(pixels[5, :, 0, 1].tolist())

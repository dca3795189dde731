"""A cache that is damaged, out of reach or nowhere costs time, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ss_pruning._utils import cache

KEPT = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(True), "c": torch.zeros(0)}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SS_PRUNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "one.safetensors"


def test_what_is_kept_is_read(place: Path) -> None:
    assert cache.read("one") is None
    cache.write("one", KEPT)
    found = cache.read("one")
    assert found is not None
    assert found.keys() == KEPT.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in KEPT.items())


@pytest.mark.parametrize("at", [-1, -9, -20])
def test_a_bit_that_has_turned_over_is_noticed(place: Path, at: int) -> None:
    cache.write("one", KEPT)
    content = bytearray(place.read_bytes())
    content[at] ^= 1
    place.write_bytes(content)
    assert cache.read("one") is None


def test_another_writers_file_is_not_read(place: Path) -> None:
    cache.write("one", KEPT)
    save_file(load_file(place), place)
    assert cache.read("one") is None


def test_what_is_no_file_is_not_read(place: Path) -> None:
    place.parent.mkdir()
    os.mkfifo(place)
    assert cache.read("one") is None
    cache.write("one", KEPT)  # a FIFO is not replaced
    assert place.is_fifo()


@pytest.mark.parametrize("where", ["x" * 5000, "/proc/none", "/dev/null/none"])
def test_a_place_out_of_reach_keeps_nothing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SS_PRUNING_CACHE", where)
    cache.write("one", KEPT)
    assert cache.read("one") is None


def test_a_folder_of_somebody_else_keeps_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", denied)
    monkeypatch.setattr(Path, "mkdir", denied)
    cache.write("one", KEPT)
    assert cache.read("one") is None


def test_a_user_without_a_home_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SS_PRUNING_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    cache.write("one", KEPT)
    assert cache.read("one") is None


def test_memory_that_is_short_costs_no_result(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object) -> None:
        raise MemoryError

    cache.write("one", KEPT)
    monkeypatch.setattr(cache, "digest", short)
    assert cache.read("one") is None
    place.unlink()
    cache.write("one", KEPT)
    assert not place.exists()

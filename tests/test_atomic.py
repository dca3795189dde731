"""Files are whole or not there, and the messages say what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ss_pruning._atomic import check_writable, make_writable_folder, replacing, write_text
from ss_pruning.errors import InputError


def test_write_replaces_and_leaves_no_other_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    write_text(target, "new\n")
    assert target.read_bytes() == b"new\n"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), SystemExit(1)])
def test_interrupted_write_keeps_the_old_file(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half of the ne")
            raise error

    with pytest.raises(type(error)):
        write()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_failed_rename_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def refuse(self: Path, other: Path) -> Path:
        raise OSError(errno.EACCES, "refused")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(InputError, match="no permission to write there; choose another folder"):
        write_text(target, "new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_new_files_follow_the_umask(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    with replacing(tmp_path / "ours") as temporary:
        temporary.unlink()  # as safetensors does: a private file of its own takes the place
        temporary.touch(mode=0o600)
    assert (tmp_path / "ours").stat().st_mode == plain.stat().st_mode


def test_links_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "a.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the folder '.*absent' does not exist; create it first"):
        write_text(tmp_path / "absent" / "a.txt", "text")
    with pytest.raises(InputError, match="does not exist; create it first"):
        check_writable(tmp_path / "absent" / "a.txt")


def test_folder_as_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for write in (lambda path: write_text(path, "text"), check_writable):
        with pytest.raises(InputError, match="is a file, not a folder; choose another place"):
            write(tmp_path / "file" / "a.txt")
        with pytest.raises(InputError, match=r"it is a folder\. Name a file in it"):
            write(tmp_path)
    with pytest.raises(InputError, match="there is a file of that name where a folder is needed"):
        make_writable_folder(tmp_path / "file")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EROFS, "that file system is read-only; choose another folder"),
        (errno.EACCES, "no permission to write there; choose another folder"),
        (errno.ENOSPC, "the disk is full; free some space"),
    ],
)
def test_unwritable_folder_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    def refuse(self: Path, mode: int = 0o666, exist_ok: bool = True) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "touch", refuse)
    for check in (
        make_writable_folder,
        lambda path: check_writable(path / "a"),
        lambda path: write_text(path / "a", ""),
    ):
        with pytest.raises(InputError, match=message):
            check(tmp_path)
    assert os.listdir(tmp_path) == []


def test_make_writable_folder_makes_parents_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    folder = make_writable_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert os.listdir(folder) == []


def test_check_writable_keeps_what_is_there(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    check_writable(target)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]

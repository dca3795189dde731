"""Files are whole or not there, and the messages say what to do."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ss_pruning._utils import files as _atomic
from ss_pruning._utils.files import (
    check_writable,
    make_writable_folder,
    replacing,
    write_text,
    write_together,
)
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
    with pytest.raises(InputError, match="File exists; choose another place"):
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


@pytest.mark.parametrize("path", [5, None, (1, 2)])
def test_what_is_no_path_is_named(path: Any) -> None:
    """A number would be taken for an open file."""
    for write in (check_writable, partial(write_text, text="")):
        with pytest.raises(InputError, match=f"a {type(path).__name__} is no path to write to"):
            write(path)


def test_check_writable_keeps_what_is_there(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    check_writable(target)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


# ---------------------------------------------------------------- what is no regular file


def fifo(place: Path) -> Path:
    os.mkfifo(place / "special")
    return place / "special"


def unix_socket(place: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(place / "s"))
    return place / "s"


def link_to_a_fifo(place: Path) -> Path:
    fifo(place)
    (place / "link").symlink_to("special")
    return place / "link"


def link_to_a_device(place: Path) -> Path:
    (place / "null").symlink_to(os.devnull)
    return place / "null"


SPECIAL = [fifo, unix_socket, link_to_a_fifo, link_to_a_device, lambda place: Path(os.devnull)]


@pytest.mark.parametrize("make", SPECIAL)
@pytest.mark.parametrize("write", [lambda path: write_text(path, "text"), check_writable])
def test_what_is_no_regular_file_is_refused_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, write: Any
) -> None:
    monkeypatch.chdir(tmp_path)  # paths of sockets are short
    path = make(Path())
    before, entries = os.stat(path), sorted(os.listdir(tmp_path))
    with pytest.raises(InputError, match=r"it is a (FIFO|socket|device), not a regular file"):
        write(path)
    after = os.stat(path)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert not stat.S_ISREG(after.st_mode)
    assert sorted(os.listdir(tmp_path)) == entries


def test_links_in_a_circle_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for write in (lambda path: write_text(path, "text"), check_writable):
        with pytest.raises(InputError, match="Too many levels of symbolic links; choose another place"):
            write(tmp_path / "a")
        with pytest.raises(InputError, match="no path"):
            write("a\0b")


# ---------------------------------------------------------------- what killed runs leave


DIES_WHILE_WRITING = """
import os, sys
from ss_pruning._utils.files import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os._exit(0)
"""


def test_the_next_writer_sweeps_what_a_killed_one_left(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", DIES_WHILE_WRITING, str(tmp_path / "a.txt")], check=True)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".a.txt.ss-pruning-")
    assert left.read_text() == "half"
    with replacing(tmp_path / "other") as temporary:
        temporary.write_text("x")
        assert not left.exists()
        write_text(tmp_path / "a.txt", "new")
        assert temporary.exists()  # that of a process that runs: ours
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "other"]


def test_only_our_own_dead_files_are_swept(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = _atomic._machine()
    kept = [
        f".a.ss-pruning-{here}-{os.getpid()}-0123456789ab.tmp",  # runs
        f".a.ss-pruning-{here}-1-0123456789ab.tmp",  # runs, somebody else's
        f".a.ss-pruning-00000000-{dead.pid}-0123456789ab.tmp",  # of another machine on a shared disk
        f".a.{dead.pid}.tmp",
        f"a.ss-pruning-{here}-{dead.pid}-0123456789ab.tmp",
        f".a.ss-pruning-{here}-{dead.pid}-0123456789ab.tmp.txt",
    ]
    for name in kept:
        (tmp_path / name).touch()
    for number in (dead.pid, 10**30):
        (tmp_path / f".a.ss-pruning-{here}-{number}-0123456789ab.tmp").touch()
    write_text(tmp_path / "new", "x")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "new"])


# ---------------------------------------------------------------- files that belong together


def test_files_are_written_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {tmp_path / name: name.encode() for name in "abc"}
    write_together(files)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {x: x.encode() for x in "abc"}
    real = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        if self.name.startswith(".c."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"cannot write '.*/c': the disk is full; free some space"):
        write_together(dict.fromkeys(files, b"new"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {x: x.encode() for x in "abc"}

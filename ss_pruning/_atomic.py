"""Files that are whole or not there: write beside the target, then rename over it."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from ss_pruning.errors import InputError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Hand out a temporary path that becomes `path` when the block ends well, and vanishes when it does not.

    The temporary file lies in the target's own folder, so that the final rename cannot cross file systems
    and a reader sees the old file or the new one, never a part. A link is written through, not replaced.

    Args:
        path: the file to write.

    Yields:
        The path to write to; an empty file is already there.

    Raises:
        InputError: the folder is missing or read-only, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise InputError(f"cannot write {str(path)!r}: it is a folder. Name a file in it.")
    temporary = target.with_name(f".{target.name[:80]}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.touch(
            exist_ok=False
        )  # not tempfile: that would leave the result readable by its owner only
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # writers that put a file of their own there (safetensors) make it private
        _flush(temporary)
        temporary.replace(target)
    except OSError as error:
        raise InputError(_explain(path, error)) from error
    finally:
        # After the rename nothing is left to remove; after any exception, Ctrl-C too, the part is.
        _remove(temporary)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all.

    Raises:
        InputError: the folder is missing or read-only, or the disk is full.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise unless the file `path` can be written; call it before long work whose result goes there.

    Raises:
        InputError: the folder is missing or read-only.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise InputError(f"cannot write {str(path)!r}: it is a folder. Name a file in it.")
    try:
        _probe(target.parent)
    except OSError as error:
        raise InputError(_explain(path, error)) from error


def make_writable_folder(path: str | os.PathLike[str]) -> Path:
    """Make the folder `path` where it is missing, and prove that a file can be written there.

    Call it before long work whose results go there.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _probe(folder)
    except OSError as error:
        # Missing parents are made: "no such file" means that none can be (in /proc, say).
        number = errno.EACCES if error.errno == errno.ENOENT else error.errno
        raise InputError(_explain(folder, OSError(number, error.strerror))) from error
    return folder


def _probe(folder: Path) -> None:
    probe = folder / f".{secrets.token_hex(6)}.tmp"
    probe.touch(exist_ok=False)
    probe.unlink()


def _flush(path: Path) -> None:
    """Put the file's bytes on the disk before the rename, or a power cut could leave an empty target."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    # The folder itself may be gone, or be no folder: then nothing was written either.
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _explain(path: str | os.PathLike[str], error: OSError) -> str:
    folder = Path(path).parent
    fixes = {
        errno.ENOENT: f"the folder {str(folder)!r} does not exist; create it first.",
        errno.ENOTDIR: f"a part of {str(folder)!r} is a file, not a folder; choose another place.",
        errno.EEXIST: "there is a file of that name where a folder is needed; choose another place.",
        errno.EACCES: "no permission to write there; choose another folder.",
        errno.EPERM: "no permission to write there; choose another folder.",
        errno.EROFS: "that file system is read-only; choose another folder.",
        errno.ENOSPC: "the disk is full; free some space or choose another folder.",
    }
    reason = fixes.get(error.errno or 0, f"{error.strerror or error}.")
    return f"cannot write {str(path)!r}: {reason}"

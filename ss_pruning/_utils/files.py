"""Files that are whole or not there: write beside the target, then rename over it."""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from ss_pruning.errors import InputError

_TEMPORARY = re.compile(r"\..*\.ss-pruning-(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{12}\.tmp")
#: Endings of files that hold a model.
_READ = (".safetensors", ".onnx", ".xml")
_KINDS = {
    stat.S_ISFIFO: "a FIFO",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Hand out a temporary path, an empty file, that becomes `path` when the block ends well, and vanishes otherwise.

    The temporary file lies in the target's own folder, so that the final rename cannot cross file systems
    and a reader sees the old file or the new one, never a part. A link is written through, not replaced. What
    killed runs of this machine left in that folder is swept.

    Raises:
        InputError: the folder is missing or read-only, the disk is full, or there is something at `path` that is no
            regular file (a folder, device, FIFO or socket).
    """
    target = _target(path)
    temporary = _temporary(target)
    try:
        _sweep(target.parent)
        # Not tempfile: that would leave the result readable by its owner only.
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # writers may put a file of their own there, which is private
        _flush(temporary)
        temporary.replace(target)
    except OSError as error:
        raise InputError(_explain(path, error)) from error
    finally:
        # After the rename nothing is left to remove; after any exception, Ctrl-C too, the part is.
        _remove(temporary)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    write_together({path: content})


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_together(contents: Mapping[str | os.PathLike[str], bytes]) -> None:
    """Write several files that belong together: all are on the disk before the first takes its place.

    Only a kill between two renames can leave new beside old; they are renamed from the last to the first.

    Raises:
        InputError: see `replacing`; then all are as they were.
    """
    with contextlib.ExitStack() as stack:
        for path, content in contents.items():
            temporary = stack.enter_context(replacing(path))
            temporary.write_bytes(content)
            _flush(temporary)


def check_writable(path: str | os.PathLike[str], room: int = 0) -> None:
    """Raise unless a file can be written, of `room` bytes; call it before long work whose result goes there.

    Raises:
        InputError: see `replacing`.
    """
    target = _target(path)
    try:
        _probe(target.parent)
        if shutil.disk_usage(target.parent).free < room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise InputError(_explain(path, error)) from error


def absent(path: str | os.PathLike[str]) -> str:
    """Why no file can be read there, and which one may be meant."""
    path = Path(path)
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix in _READ)
        such = f", such as {str(path / inside[0])!r}" if inside else ""
        return f"{str(path)!r} is a folder: name the file in it{such}"
    return f"there is no file {str(path)!r}. {nearby(path)}".rstrip(". ")


def nearby(path: Path) -> str:
    """Suggest a file of a similar name in the same folder."""
    if not path.parent.is_dir():
        return f"There is no folder {str(path.parent)!r} either."
    names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"Did you mean {str(path.with_name(close[0]))!r}?" if close else ""


def check_apart(path: str | os.PathLike[str], *sources: str | os.PathLike[str] | None) -> None:
    """Refuse to write over what is read.

    Raises:
        InputError: `path` is one of the sources, by whatever name.
    """
    for source in sources:
        if source is None:
            continue
        if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            raise InputError(
                f"{str(path)!r} is read from, and would be written over; choose another name to write to."
            )


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


def _target(path: str | os.PathLike[str]) -> Path:
    """Where `path` leads, through links; refused where that is there and no regular file: renaming would replace it."""
    if not isinstance(path, (str, os.PathLike)):  # a number would be an open file
        raise InputError(f"a {type(path).__name__} is no path to write to; give a str or a pathlib.Path")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except (OSError, ValueError) as error:  # a loop of links, a part that is a file, a null byte
        raise InputError(
            _explain(path, error) if isinstance(error, OSError) else f"no path: {error}."
        ) from error
    if stat.S_ISDIR(mode):
        raise InputError(f"cannot write {str(path)!r}: it is a folder. Name a file in it.")
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS.items() if is_kind(mode)), "something special")
        raise InputError(
            f"cannot write {str(path)!r}: it is {kind}, not a regular file. Choose another name."
        )
    return Path(os.path.realpath(path))


def _temporary(target: Path) -> Path:
    """A name beside the target that says whose it is: of this package, this machine and this process."""
    owner = f"ss-pruning-{_machine()}-{os.getpid()}-{secrets.token_hex(6)}"
    return target.with_name(f".{target.name[:80]}.{owner}.tmp")


def _machine() -> str:
    """Where process numbers are ours: on a shared disk and in containers others count their own."""
    space = ""
    with contextlib.suppress(OSError):  # only Linux has them
        space = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]


def _sweep(folder: Path) -> None:
    """Remove the temporary files of our processes that no longer run."""
    if os.name != "posix":
        return  # asking whether a process runs would end it
    with contextlib.suppress(OSError):  # a folder that may be written to, not listed
        for name in os.listdir(folder):
            found = _TEMPORARY.fullmatch(name)
            if found and found["machine"] == _machine() and not _runs(int(found["process"])):
                _remove(folder / name)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # somebody else's
    return True


def _probe(folder: Path) -> None:
    probe = _temporary(folder / "probe")
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
    folder = str(Path(path).parent)
    fixes = {
        errno.ENOENT: f"the folder {folder!r} does not exist; create it first.",
        errno.ENOTDIR: f"a part of {folder!r} is a file, not a folder; choose another place.",
        errno.EACCES: "no permission to write there; choose another folder.",
        errno.EROFS: "that file system is read-only; choose another folder.",
        errno.ENOSPC: "the disk is full; free some space or choose another folder.",
    }
    said = f"{error.strerror or error}; choose another place."
    return f"cannot write {str(path)!r}: {fixes.get(error.errno or 0, said)}"

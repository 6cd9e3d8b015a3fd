"""Files that a crash cannot leave half-written: whole ones replaced atomically, tables appended to durably.

Everything the package writes goes through here, so that a full disk or a read-only folder is one clear error and
a kill at any instant leaves the old file or the new one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from fkd_med.errors import RunError

LEFTOVER = re.compile(r"\.(\d+)-[0-9a-f]{8}\.fkd-tmp")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_REMEDIES = {
    errno.ENOSPC: "The disk is full: free some space",
    errno.EDQUOT: "Your disk quota is used up: free some space",
    errno.EFBIG: "The file is larger than this system allows",
    errno.EROFS: "The file system is read-only: choose another folder",
    errno.EACCES: "You may not write there: choose another folder or change its permissions",
    errno.EPERM: "You may not write there: choose another folder or change its permissions",
    errno.ENOTDIR: "A part of that path is a file: choose another folder",
    errno.EEXIST: "A part of that path is a file: choose another folder",
    errno.EISDIR: "A folder has that name: move it away or choose another path",
}


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file to read its bytes; never a pipe or a socket, which would be waited for without end.

    Raises:
        OSError: it is no regular file, or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is a directory" if stat.S_ISDIR(mode) else "it is a pipe, socket or device")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def write_error(path: Path, error: OSError) -> RunError:
    """Return what to tell the user when `path` could not be written."""
    remedy = _REMEDIES.get(error.errno or 0, "Check the disk and the path")
    resume = " (a training that had begun: with --ckpt_path last)" if error.errno in _FULL else ""
    return RunError(f"Cannot write {path}: {error.strerror or error}. {remedy}, then run again{resume}.")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless they are there; RunError when the system refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error


@contextmanager
def atomic_writer(path: str | Path) -> Iterator[BinaryIO]:
    """Give a file to write and read; at the end of the block it takes the place of `path`, durably and at once.

    After an exception, or a kill at any moment, `path` is what it was before. Missing parents are made. A symbolic
    link at `path` is replaced, not followed. Permissions follow the umask.

    Raises:
        RunError: the file cannot be written; names it and the remedy. Nothing is left behind.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        cause = _refused_write(error)
        if cause is not None:
            raise write_error(path, cause) from error
        raise


def _refused_write(error: BaseException) -> OSError | None:
    """Find the system's refusal to write behind an error: torch hides a full disk behind an error of its own."""
    if isinstance(error, OSError):
        return error
    hidden = error.__context__
    if isinstance(error, RuntimeError) and isinstance(hidden, OSError) and hidden.errno in _FULL:
        return hidden
    return None


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, durably and all at once; see `atomic_writer`."""
    with atomic_writer(path) as file:
        file.write(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, durably and all at once; see `atomic_writer`."""
    atomic_write_bytes(path, text.encode())


def append_text(path: str | Path, text: str) -> None:
    """Append whole lines to `path` durably, after cutting off a last line that a crash left without its end.

    Raises:
        RunError: the lines cannot be written; the file then is as long as before.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as file:
            end = _end_of_lines(file)
            file.truncate(end)
            try:
                rest = memoryview(text.encode())
                while rest:
                    rest = rest[file.write(rest) or 0 :]
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(end)
                raise
    except OSError as error:
        raise write_error(path, error) from error


def file_digest(path: str | Path) -> str | None:
    """Return the SHA-256 of a file, or None if there is none that can be read."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def remove_leftovers(folder: str | Path) -> list[Path]:
    """Remove, below `folder`, the unfinished files of processes that were killed, and return their paths."""
    removed = []
    for path in Path(folder).rglob(".*.fkd-tmp"):
        match = LEFTOVER.fullmatch(path.name)
        if match and not path.is_dir() and not is_running(int(match[1])):  # folders: whoever makes such clears them
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def temporary_beside(path: Path) -> Path:
    """Return a new name in `path`'s folder for what is to take its place; it tells which process works there."""
    return path.parent / f".{os.getpid()}-{secrets.token_hex(4)}.fkd-tmp"


def sync_folder(folder: Path) -> None:
    """Make the new name durable; file systems that cannot say so are trusted."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_running(pid: int) -> bool:
    """Return whether this host has a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _end_of_lines(file: BinaryIO) -> int:
    """Position after the last newline, read from the end in blocks."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0

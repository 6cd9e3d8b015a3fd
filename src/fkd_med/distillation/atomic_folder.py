"""A folder of files that a crash cannot leave half-made: it appears whole, in place of what was there, or not at all.

All work happens in a workspace beside it: the new folder grows there, what it replaces is moved there, and whatever
happens the workspace goes. One whose process was killed goes when the next process comes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fkd_med.errors import RunError
from fkd_med.files import LEFTOVER, is_running, sync_folder, temporary_beside, write_error
from fkd_med.locks import holder_of, locked

_LOCK = "lock"


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder; at the end of the block it takes the place of `folder`, whatever that is.

    The files in it must be durable by then. After an exception, or a kill, `folder` is what it was before, or
    missing if the kill hit the instant of the change.

    Raises:
        RunError: the folder cannot be made; names it and the remedy. Errors of the block itself pass unchanged.
    """
    workspace = temporary_beside(folder)
    try:
        with disk_errors_of(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            workspace.mkdir()
            (workspace / "new").mkdir()
        with locked(workspace / _LOCK, f"The workspace of {folder}"):
            yield workspace / "new"
            with disk_errors_of(folder):
                _put_in_place(workspace / "new", folder, workspace / "old")
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


@contextmanager
def disk_errors_of(path: Path) -> Iterator[None]:
    """Turn the disk's errors in the block into a RunError that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def remove_leftover_folders(folder: Path) -> None:
    """Remove, in `folder`, the workspaces of killed processes: of this host by number, of others by their lock."""
    for path in folder.glob(".*.fkd-tmp"):
        match = LEFTOVER.fullmatch(path.name)
        if match and path.is_dir() and not is_running(int(match[1])) and _is_free(path / _LOCK):
            shutil.rmtree(path, ignore_errors=True)


def _put_in_place(new: Path, folder: Path, old: Path) -> None:
    """Make `new` durable and name it `folder`; what was there moves to `old`, and comes back if that fails."""
    sync_folder(new)
    try:
        with suppress(FileNotFoundError):
            os.rename(folder, old)
        os.rename(new, folder)
    except BaseException:
        with suppress(OSError):
            os.rename(old, folder)
        raise
    sync_folder(folder.parent)


def _is_free(lock: Path) -> bool:
    try:
        return holder_of(lock, "") is None
    except RunError:  # a lock that a crash left torn
        return True

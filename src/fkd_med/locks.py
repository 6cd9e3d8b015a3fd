"""One process at a time in one folder: a lock that a dead process cannot keep.

The lock file names its holder (PID, its start time, host). A holder on this host that no longer runs is stale
and its lock is taken over; of another host we cannot know, and say which file to delete. `flock` only guards the
few instructions that read and write the file: were it held all along, a killed run's orphaned data workers would
keep the lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from fkd_med.errors import RunError
from fkd_med.files import write_error


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock; `started` is empty where the system does not tell."""

    pid: int
    host: str
    started: str

    @classmethod
    def this_process(cls) -> Holder:
        """Return the holder that this process would be."""
        return cls(os.getpid(), socket.gethostname(), _started(os.getpid()) or "")

    def is_gone(self) -> bool:
        """Return whether the process surely no longer runs; of other hosts, we never are sure."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            pass
        started = _started(self.pid)
        return started is None or bool(self.started and started and started != self.started)


@contextmanager
def queued(path: str | Path, what: str, waits: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path` during the block, after waiting for whoever holds it; a dead process holds nothing.

    Args:
        path: the lock file; missing parents are made.
        what: what is locked, for messages ("The teacher store x").
        waits: called before it waits, with who holds it, in words.

    Raises:
        RunError: the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a+")  # noqa: SIM115 - closed by the block below; only opening it may fail here
    except OSError as error:
        raise RunError(f"{what} cannot be written. {write_error(path, error)}") from error
    with handle:
        with suppress(OSError):  # a file system without flock: two may do the same work, and the last one's stays
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waits is not None:
                    waits(_written_by(handle))
                fcntl.flock(handle, fcntl.LOCK_EX)
        handle.truncate(0)
        handle.write(f"{os.getpid()} {socket.gethostname()}")
        handle.flush()
        yield


def _written_by(handle: TextIO) -> str:
    """Return who wrote into a lock file of `queued`."""
    handle.seek(0)
    pid, _, host = handle.read(300).partition(" ")
    return f"process {pid} on {host}" if pid.isdigit() and host else "another process"


def is_queued(path: str | Path) -> bool:
    """Return whether another process holds the lock file `path` of `queued`; False where nobody can tell."""
    try:
        with open(path) as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or a file system without flock
        return False
    return False


@contextmanager
def locked(path: str | Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` during the block; it is gone after it, whatever happens.

    Args:
        path: the lock file; its folder must exist.
        what: what is locked, for messages ("The run runs/x").

    Raises:
        RunError: another process, or this one already, holds it; or the file cannot be written.
    """
    path, own = Path(path), Holder.this_process()
    try:
        with _guarded(path) as descriptor:
            holder = _read(descriptor, path, what)
            if holder is not None and not holder.is_gone():
                raise RunError(_refusal(path, what, holder))
            _write(descriptor, own)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        yield
    finally:
        _release(path, own)


def holder_of(path: str | Path, what: str) -> Holder | None:
    """Return the process that holds the lock file `path`, or ``None`` if nobody does or the holder is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise write_error(Path(path), error) from error
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        holder = _read(descriptor, Path(path), what)
    finally:
        os.close(descriptor)
    return None if holder is None or holder.is_gone() else holder


def _release(path: Path, own: Holder) -> None:
    with suppress(OSError, RunError):  # a lock somebody removed, or a folder that vanished, is no reason to fail
        if not path.exists() or own.pid != os.getpid():  # a forked child that unwinds holds nothing
            return
        with _guarded(path) as descriptor:
            if _read(descriptor, path, "") == own:
                path.unlink()


@contextmanager
def _guarded(path: Path) -> Iterator[int]:
    """Open `path` while no other process on this host can: retried when its holder just removed it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with suppress(OSError):  # a file system without flock: the record alone must do
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_same(descriptor, path):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _read(descriptor: int, path: Path, what: str) -> Holder | None:
    try:
        text = os.pread(descriptor, 65536, 0)
    except OSError as error:  # a folder, a pipe
        raise RunError(f"{what} has a damaged lock. If no other process uses it, delete {path}.") from error
    if not text:
        return None
    try:
        record = json.loads(text)
        return Holder(int(record["pid"]), str(record["host"]), str(record["started"]))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise RunError(f"{what} has a damaged lock. If no other process uses it, delete {path}.") from error


def _write(descriptor: int, holder: Holder) -> None:
    text = json.dumps(asdict(holder)).encode()
    os.pwrite(descriptor, text, 0)
    os.ftruncate(descriptor, len(text))
    os.fsync(descriptor)


def _refusal(path: Path, what: str, holder: Holder) -> str:
    if holder == Holder.this_process():
        return f"{what} is already in use by this very process. Choose another folder for the second run."
    if holder.host == socket.gethostname():
        return (
            f"{what} is in use by process {holder.pid} on this machine ({holder.host}). Wait for it, end it, or choose "
            "another folder."
        )
    return (
        f"{what} is in use by process {holder.pid} on host {holder.host}, or was when that host stopped. "
        f"If that process no longer runs, delete {path}."
    )


def _started(pid: int) -> str | None:
    """When `pid` started, in words that no later process of that number shares; "" if unknown, None if it is dead."""
    if not os.path.isdir("/proc/self"):
        return ""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except FileNotFoundError:
        return None
    except OSError:
        return ""
    state, *rest = stat[stat.rindex(")") + 2 :].split()  # the name before it may hold anything
    return None if state in "ZX" else f"{boot}:{rest[18]}"

"""Files are whole or as they were, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fkd_med.errors import RunError
from fkd_med.files import append_text, atomic_write_bytes, atomic_write_text, atomic_writer, remove_leftovers


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The closest to a full disk that needs no other disk: no file may grow beyond `size`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def killed_at(patched: str, action: Callable[[], Any]) -> None:
    """Run `action` in a child that SIGKILLs itself when it calls ``os.<patched>``."""
    child = os.fork()
    if child == 0:
        setattr(os, patched, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
        try:
            action()
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_a_file_is_written_with_its_parents_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.txt"
    atomic_write_text(path, "Köln")
    atomic_write_bytes(str(path), b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["c.txt"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "x", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_names_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / ("x" * 255), "y")
    with pytest.raises(RunError, match="xxx"):
        atomic_write_text(tmp_path / ("x" * 256), "y")
    assert len(os.listdir(tmp_path)) == 1


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    (tmp_path / "best").write_text("best")
    (tmp_path / "last").symlink_to("best")
    atomic_write_text(tmp_path / "last", "last")
    assert (tmp_path / "best").read_text() == "best"
    assert (tmp_path / "last").read_text() == "last"


def test_a_full_disk_is_one_clear_error_and_the_old_file_stays(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "x", "old")
    with file_size_limit(1000), pytest.raises(RunError, match=r"Cannot write .*x: .*then run again"):
        atomic_write_bytes(tmp_path / "x", bytes(5000))
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "old"


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "another folder"), (errno.EIO, "Check")]
)
def test_a_failure_to_reach_the_disk_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match=remedy):
        atomic_write_text(tmp_path / "x", "y")
    assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_writer(tmp_path / "x") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(RunError, match="choose another folder"):
        atomic_write_text(tmp_path / "x" / "y", "")
    with pytest.raises(RunError, match="choose another folder"):
        append_text(tmp_path / "x" / "y", "")


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_leaves_the_old_file_and_a_leftover_that_is_cleared(tmp_path: Path, moment: str) -> None:
    atomic_write_text(tmp_path / "x", "old")
    killed_at(moment, lambda: atomic_write_text(tmp_path / "x", "new"))
    assert (tmp_path / "x").read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2
    assert len(remove_leftovers(tmp_path)) == 1
    assert os.listdir(tmp_path) == ["x"]


def test_files_being_written_now_are_no_leftovers(tmp_path: Path) -> None:
    (tmp_path / ".x.fkd-tmp").write_text("somebody else's")
    with atomic_writer(tmp_path / "x") as file:
        file.write(b"y")
        assert remove_leftovers(tmp_path) == []
    assert sorted(os.listdir(tmp_path)) == [".x.fkd-tmp", "x"]


def test_lines_are_appended_after_the_last_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.csv"
    append_text(path, "a\nb\n")
    append_text(path, "c\n")
    assert path.read_text() == "a\nb\nc\n"
    path.write_text("a\nb\n" + "torn" * 5000)
    append_text(path, "c\n")
    assert path.read_text() == "a\nb\nc\n"
    path.write_text("torn")
    append_text(path, "a\n")
    assert path.read_text() == "a\n"


def test_lines_are_appended_wholly_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    append_text(path, "a\n")
    with file_size_limit(1000), pytest.raises(RunError, match=r"table\.csv"):
        append_text(path, "b" * 5000 + "\n")
    assert path.read_text() == "a\n"

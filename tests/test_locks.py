"""One process at a time; the dead keep nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fkd_med.errors import RunError
from fkd_med.locks import Holder, holder_of, locked, queued


def write_lock(path: Path, **changes: object) -> None:
    own = Holder.this_process()
    path.write_text(json.dumps({"pid": own.pid, "host": own.host, "started": own.started} | changes))


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_the_lock_is_there_during_the_block_and_gone_after_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, "It"):
        assert holder_of(path, "It") == Holder.this_process()
    assert not path.exists()
    with pytest.raises(ZeroDivisionError), locked(path, "It"):
        _ = 1 / 0
    assert not path.exists()
    assert holder_of(path, "It") is None


def test_the_same_process_cannot_take_it_twice(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", "It"):
        with (
            pytest.raises(RunError, match="It is already in use by this very process"),
            locked(tmp_path / "lock", "It"),
        ):
            pass
        assert (tmp_path / "lock").exists()


def test_a_living_process_is_respected_and_a_killed_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(path, "It"):
            os.write(tell, b"x")
            signal.pause()
        os._exit(0)
    os.read(ready, 1)
    try:
        with pytest.raises(RunError, match=f"It is in use by process {child}"), locked(path, "It"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    with locked(path, "It"):  # dead, though its parent has not buried it
        assert holder_of(path, "It") == Holder.this_process()
    os.waitpid(child, 0)


def test_a_dead_process_keeps_nothing(tmp_path: Path) -> None:
    write_lock(tmp_path / "lock", pid=dead_pid())
    with locked(tmp_path / "lock", "It"):
        pass


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system does not tell when a process started")
def test_a_pid_that_was_given_to_another_process_keeps_nothing(tmp_path: Path) -> None:
    write_lock(tmp_path / "lock", pid=os.getppid(), started="an-earlier-boot:5")
    with locked(tmp_path / "lock", "It"):
        pass


def test_another_host_is_respected_and_the_file_to_delete_is_named(tmp_path: Path) -> None:
    write_lock(tmp_path / "lock", pid=dead_pid(), host="elsewhere")
    with pytest.raises(RunError, match=r"on host elsewhere.*delete .*lock"), locked(tmp_path / "lock", "It"):
        pass
    assert "elsewhere" in (tmp_path / "lock").read_text()


def test_a_lock_cut_off_by_a_crash(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("")
    with locked(tmp_path / "lock", "It"):
        pass
    (tmp_path / "lock").write_text('{"pid": 4')
    with pytest.raises(RunError, match=r"damaged lock.*delete .*lock"), locked(tmp_path / "lock", "It"):
        pass


def test_a_lock_that_somebody_else_took_over_is_left_to_them(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", "It"):
        write_lock(tmp_path / "lock", host="elsewhere")
    assert (tmp_path / "lock").exists()
    (tmp_path / "lock").unlink()
    with locked(tmp_path / "lock", "It"):
        (tmp_path / "lock").unlink()


def test_a_folder_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Cannot write"), locked(tmp_path / "no" / "lock", "It"):
        pass


def test_of_many_processes_one_at_a_time_gets_in_though_the_lock_is_stale(tmp_path: Path) -> None:
    """Sixteen processes meet a dead one's lock at once and hold it until all have tried: one gets in."""
    write_lock(tmp_path / "lock", pid=dead_pid())
    start, go = os.pipe()
    results, tell = os.pipe()
    end, finish = os.pipe()
    children = []
    for _ in range(16):
        child = os.fork()
        if child == 0:
            os.read(start, 1)
            try:
                with locked(tmp_path / "lock", "It"):
                    os.write(tell, b"1")
                    os.read(end, 1)
            except RunError:
                os.write(tell, b"0")
            os._exit(0)
        children.append(child)
    os.write(go, b"x" * 16)
    answers = b""
    while len(answers) < 16:
        answers += os.read(results, 16)
    os.write(finish, b"x" * 16)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 16
    assert answers.count(b"1") == 1
    assert not (tmp_path / "lock").exists()


def test_who_waits_is_told_for_whom(tmp_path: Path) -> None:
    ready, tell = os.pipe()
    end, finish = os.pipe()
    child = os.fork()
    if child == 0:
        with queued(tmp_path / "lock", "It"):
            os.write(tell, b"x")
            os.read(end, 1)
        os._exit(0)
    os.read(ready, 1)
    said: list[str] = []

    def told(holder: str) -> None:
        said.append(holder)
        os.write(finish, b"x")

    with queued(tmp_path / "lock", "It", told):
        assert said == [f"process {child} on {socket.gethostname()}"]
        assert (tmp_path / "lock").read_text().startswith(f"{os.getpid()} ")
    os.waitpid(child, 0)
    with queued(tmp_path / "lock", "It", told):
        assert len(said) == 1, "nobody is there to wait for"


def test_holders_on_this_host_know_their_name() -> None:
    assert Holder.this_process().host == socket.gethostname()
    assert not Holder.this_process().is_gone()

"""What a command does differently as one of several processes; whole runs are in test_ddp_command.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from fkd_med.cli.console import wide_console
from fkd_med.cli.messages import explained
from fkd_med.cli.processes import check_started, lost_process, rank
from fkd_med.cli.signals import TerminatedError, terminable
from fkd_med.errors import ConfigError, DataError, TrainingError

GLOO = "[/pytorch/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:26548. This is typically"
RESET = "[/pytorch/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:28572: Connection reset by peer. GLHF!"

CHILD = """
import time
from fkd_med.cli.processes import attached
with attached():
    print("here", flush=True)
    time.sleep(60)
"""
PARENT = f"""
import os, subprocess, sys, time
second = os.environ | {{"LOCAL_RANK": "1"}}
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], env=second, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the second of two, started by Lightning."""
    for name in ("RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")


def test_a_process_ends_with_the_one_that_started_it() -> None:
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=inherited) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.kill()
    deadline = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < deadline, "an orphan"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_only_the_first_process_answers_sigterm(second: None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with terminable():
        assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(TerminatedError), terminable():
        signal.raise_signal(signal.SIGTERM)


def test_a_lost_process_is_said_once(monkeypatch, capsys) -> None:
    for text in (GLOO, RESET):
        with explained(["fit"], debug=False) as outcome:
            raise RuntimeError(text)
        assert outcome.code == TrainingError.exit_code
        assert capsys.readouterr().err.startswith("fkd: error: Another process of this run has ended")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with explained(["fit"], debug=False) as outcome:
        raise RuntimeError(GLOO)
    assert outcome.code == TrainingError.exit_code and capsys.readouterr().err == ""
    assert lost_process(ValueError(GLOO)) is None and lost_process(RuntimeError("Connection closed by peer")) is None


def test_errors_name_their_process(second: None, capsys) -> None:
    assert rank() == 1
    with explained(["fit"], debug=False):
        raise DataError("image.png is cut.")
    assert capsys.readouterr().err == "fkd: error (process 1): image.png is cut.\n"


def test_other_processes_print_no_tables(monkeypatch, capsys) -> None:
    wide_console().print("a table")
    assert capsys.readouterr().out == "a table\n"
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 1)
    wide_console().print("a table")
    assert capsys.readouterr().out == ""


def test_torchrun_and_devices_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    check_started(1)  # left over from something else
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    check_started(2)
    with pytest.raises(ConfigError, match=r"torchrun started 2 processes.* ask for 1: give --trainer.devices"):
        check_started(1)

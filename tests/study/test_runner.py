"""Jobs one after the other: interrupted, failed, out of time, and gone on with."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from fkd_med.errors import RunError
from fkd_med.study import Job, run_jobs
from fkd_med.study import runner as runner_module
from fkd_med.study.runner import run_process


def console() -> Console:
    return Console(file=io.StringIO(), width=120)


def test_what_is_finished_is_not_run_again_and_what_failed_is(jobs: list[Job]) -> None:
    asked: list[str] = []

    def launch(arguments: list[str], seconds: float | None) -> int:
        asked.append(Path(arguments[2]).stem + str(len(asked)))
        return 3 if len(asked) == 2 else 0

    tally = run_jobs(jobs[:4], console(), launch=launch)
    assert tally.failed == {"x small taught seed 0": 3} and len(tally.done) == 3 and not tally.left
    again = run_jobs(jobs[:4], console(), launch=launch)
    assert len(asked) == 5 and not again.failed and len(again.done) == 4
    assert [job.note()["exit_code"] for job in jobs[:4]] == [0, 0, 0, 0]


def test_what_failed_before_comes_last(jobs: list[Job]) -> None:
    run_jobs(jobs[:2], console(), launch=lambda arguments, seconds: 3 if "plain" in arguments[2] else None)
    told = io.StringIO()
    run_jobs(jobs[:3], Console(file=told, width=120), launch=lambda arguments, seconds: 0)
    lines = [line.partition("] ")[2].partition(" seed")[0] for line in told.getvalue().splitlines()]
    assert lines == ["x small taught", "x extra", "x plain"], "one that was stopped has not failed"


def test_time_is_up_leaves_the_rest_and_adds_the_seconds(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(runner_module.time, "monotonic", lambda: now[0])

    def launch(arguments: list[str], seconds: float | None) -> int | None:
        assert seconds is not None
        now[0] += min(seconds, 100)
        return 0 if seconds >= 100 else None

    told = io.StringIO()
    tally = run_jobs(jobs[:4], Console(file=told, width=120), minutes=4, launch=launch)  # two and a part of the third
    assert [len(tally.done), len(tally.left)] == [2, 2]
    note = jobs[2].note()
    assert {key: note[key] for key in note if key != "code"} == {"finished": False, "seconds": 40.0, "exit_code": 143}
    assert not jobs[3].note()
    assert "[3/4] x extra seed 0  (about 3 min left)" in told.getvalue()
    tally = run_jobs(jobs[:4], console(), minutes=4, launch=launch)
    assert len(tally.done) == 4 and jobs[2].note()["seconds"] == 140


def test_an_interruption_is_noted_and_passed_on(jobs: list[Job]) -> None:
    def launch(arguments: list[str], seconds: float | None) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs[:2], console(), launch=launch)
    assert jobs[0].note()["exit_code"] == 130 and not jobs[0].finished and not jobs[1].note()


def test_nothing_runs_if_a_later_job_has_another_configuration(base: Path, jobs: list[Job]) -> None:
    jobs[4].prepare()
    jobs[4].run.mkdir()
    (base / "sety" / "plain.yaml").write_text("data: other.yaml\n")
    with pytest.raises(RunError, match="another configuration"):
        run_jobs(jobs, console(), launch=lambda arguments, seconds: pytest.fail("ran"))


def test_a_process_ends_with_its_code_or_its_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The program is replaced by one that does not import the stack."""
    real = subprocess.Popen

    def python(command: list[str]) -> subprocess.Popen[bytes]:
        return real([sys.executable, "-c", command[-1]])

    monkeypatch.setattr(runner_module.subprocess, "Popen", python)
    assert run_process(["raise SystemExit(3)"], None) == 3
    pid = tmp_path / "pid"
    started = time.monotonic()
    assert (
        run_process([f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"], 1.5) is None
    )
    assert time.monotonic() - started < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_process_that_will_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen
    monkeypatch.setattr(runner_module, "_PATIENCE", 0.2)
    monkeypatch.setattr(runner_module.subprocess, "Popen", lambda command: real([sys.executable, "-c", command[-1]]))
    deaf = f"import signal, time; signal.signal({int(signal.SIGTERM)}, signal.SIG_IGN); time.sleep(60)"
    started = time.monotonic()
    assert run_process([deaf], 1.0) is None
    assert time.monotonic() - started < 20

"""Jobs one after the other: interrupted, failed, out of time, and gone on with."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fkd_med.errors import RunError
from fkd_med.study import Job, run_jobs
from fkd_med.study import processes as processes_module
from fkd_med.study import runner as runner_module
from fkd_med.study.processes import Processes


def console() -> Console:
    return Console(file=io.StringIO(), width=120)


def test_what_is_finished_is_not_run_again_and_what_failed_is(jobs: list[Job]) -> None:
    asked: list[str] = []

    def launch(arguments: list[str], seconds: float | None, log: Path | None) -> int:
        asked.append(Path(arguments[2]).stem + str(len(asked)))
        return 3 if len(asked) == 2 else 0

    tally = run_jobs(jobs[:4], console(), launch=launch)
    assert tally.failed == {"x small taught seed 0": 3} and len(tally.done) == 3 and not tally.left
    again = run_jobs(jobs[:4], console(), launch=launch)
    assert len(asked) == 5 and not again.failed and len(again.done) == 4
    assert [job.note()["exit_code"] for job in jobs[:4]] == [0, 0, 0, 0]


def test_what_failed_before_comes_last(jobs: list[Job]) -> None:
    run_jobs(jobs[:2], console(), launch=lambda arguments, seconds, log: 3 if "plain" in arguments[2] else None)
    told = io.StringIO()
    run_jobs(jobs[:3], Console(file=told, width=120), launch=lambda arguments, seconds, log: 0)
    lines = [line.partition("] ")[2].partition(" seed")[0] for line in told.getvalue().splitlines()]
    assert lines == ["x small taught", "x extra", "x plain"], "one that was stopped has not failed"


def test_time_is_up_leaves_the_rest_and_adds_the_seconds(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(runner_module.time, "monotonic", lambda: now[0])

    def launch(arguments: list[str], seconds: float | None, log: Path | None) -> int | None:
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
    def launch(arguments: list[str], seconds: float | None, log: Path | None) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs[:2], console(), launch=launch)
    assert jobs[0].note()["exit_code"] == 130 and not jobs[0].finished and not jobs[1].note()


def test_nothing_runs_if_a_later_job_has_another_configuration(base: Path, jobs: list[Job]) -> None:
    jobs[4].prepare()
    jobs[4].run.mkdir()
    (base / "sety" / "plain.yaml").write_text("data: other.yaml\n")
    with pytest.raises(RunError, match="another configuration"):
        run_jobs(jobs, console(), launch=lambda arguments, seconds, log: pytest.fail("ran"))


@pytest.fixture
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that do what their last argument says, in place of ones that import the stack."""
    real = subprocess.Popen

    def python(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return real([sys.executable, "-c", command[-1]], **options)

    monkeypatch.setattr(processes_module.subprocess, "Popen", python)


@pytest.mark.usefixtures("small_programs")
def test_a_process_ends_with_its_code_or_its_time(tmp_path: Path) -> None:
    assert Processes()(["raise SystemExit(3)"], None) == 3
    pid = tmp_path / "pid"
    started = time.monotonic()
    assert (
        Processes()([f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"], 1.5) is None
    )
    assert time.monotonic() - started < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.usefixtures("small_programs")
def test_a_process_that_will_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes_module, "_PATIENCE", 0.2)
    deaf = f"import signal, time; signal.signal({int(signal.SIGTERM)}, signal.SIG_IGN); time.sleep(60)"
    started = time.monotonic()
    assert Processes()([deaf], 1.0) is None
    assert time.monotonic() - started < 20


def saying(monkeypatch: pytest.MonkeyPatch, jobs: list[Job], programs: list[str]) -> None:
    """Let each job be a small program."""
    by_folder = {job.folder: program for job, program in zip(jobs, programs, strict=True)}
    monkeypatch.setattr(Job, "arguments", lambda self: [by_folder[self.folder]])


@pytest.mark.usefixtures("small_programs")
def test_several_at_once_say_what_they_say_into_their_logs(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    meet = "import os, time; open('here-{}', 'w').close(); t = time.time()\n"
    meet += "while not (os.path.exists('here-0') and os.path.exists('here-1')): assert time.time() < t + 20\n"
    fail = "print('first'); [print(n) for n in range(9)]; raise SystemExit('a client is not there')"
    saying(monkeypatch, jobs[:3], [meet.format(0) + "print('zero')", meet.format(1), fail])
    told = io.StringIO()
    tally = run_jobs(jobs[:3], Console(file=told, width=120), at_once=2)
    assert [len(tally.done), tally.failed, tally.left] == [2, {jobs[2].name: 1}, []], "the two have met"
    assert jobs[0].log.read_text() == "zero\n"
    said = told.getvalue()
    assert f"{jobs[0].name}: done after" in said and f"{jobs[2].name}: failed with exit code 1 after" in said
    assert "  a client is not there\n" in said and "  first" not in said, "the last lines"
    assert f"All it said: {jobs[2].log}" in said
    run_jobs(jobs[:3], console(), at_once=2)
    assert jobs[2].log.read_text().count("first") == 2, "the second attempt does not take the first one's log away"


@pytest.mark.usefixtures("small_programs")
def test_time_is_up_for_all_that_run(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    saying(monkeypatch, jobs[:3], ["", "import time; time.sleep(60)", "import time; time.sleep(60)"])
    started = time.monotonic()
    tally = run_jobs(jobs[:3], console(), minutes=0.05, at_once=3)
    assert time.monotonic() - started < 20
    assert [job.name for job in tally.done] == [jobs[0].name] and len(tally.left) == 2
    assert [job.note()["exit_code"] for job in jobs[:3]] == [0, 143, 143]


@pytest.mark.usefixtures("small_programs")
def test_an_interruption_ends_all_that_run_and_begins_no_more(
    jobs: list[Job], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sleep = f"import os, time; open({str(tmp_path)!r} + f'/pid-{{os.getpid()}}', 'w').close(); time.sleep(60)"
    saying(monkeypatch, jobs[:4], [sleep] * 4)

    def interrupt() -> None:
        while len(list(tmp_path.glob("pid-*"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    threading.Thread(target=interrupt).start()
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_jobs(jobs[:4], console(), at_once=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 20
    pids = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not jobs[2].note() and not jobs[3].note()


@pytest.mark.usefixtures("small_programs")
def test_processes_side_by_side_share_out_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    processes, there = Processes(["4", "7"]), tmp_path / "seen"
    program = f"import os, time; open({str(there)!r}, 'a').write(os.environ['CUDA_VISIBLE_DEVICES']); t = time.time()\n"
    program += f"while os.path.getsize({str(there)!r}) < 4: assert time.time() < t + 60"
    threads = [threading.Thread(target=processes, args=([program], None)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(there.read_text()) == ["4", "4", "7", "7"]
    assert Processes()(["import os; raise SystemExit('CUDA_VISIBLE_DEVICES' in os.environ)"], None) == 0


@pytest.mark.usefixtures("small_programs")
def test_after_ctrl_c_a_process_has_a_moment_and_the_second_one_waits_for_nobody(tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to the processes too; here one cleans up for half a second, another is deaf."""
    cleaned, ready = tmp_path / "cleaned", tmp_path / "ready"
    begin = f"import pathlib, time; pathlib.Path({str(ready)!r} + NAME).touch()\n"
    tidy = begin.replace("NAME", "'1'") + f"time.sleep(0.5); pathlib.Path({str(cleaned)!r}).touch()"
    deaf = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        + begin.replace("NAME", "'2'")
        + "time.sleep(60)"
    )
    processes = Processes()
    threads = [threading.Thread(target=processes, args=([program], None)) for program in (tidy, deaf)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 30
    while not all(Path(f"{ready}{name}").exists() for name in "12"):
        assert time.monotonic() < until
    stopping = threading.Thread(target=processes.stop)
    stopping.start()
    threads[0].join(20)
    assert cleaned.exists(), "ended by itself, before SIGTERM"
    processes.kill()
    for thread in [*threads, stopping]:
        thread.join(20)
        assert not thread.is_alive()

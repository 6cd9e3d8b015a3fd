"""Runs the jobs of a study one after the other: each in a process of its own, until they are done or time is up."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from fkd_med.study.definition import code_of_today
from fkd_med.study.jobs import Job

Launch = Callable[[list[str], float | None], int | None]
_PATIENCE = 60.0  # seconds to write down what is open after SIGTERM, before SIGKILL


@dataclass
class Tally:
    """What became of the jobs.

    Attributes:
        done: finished, now or earlier.
        failed: ended with an error; the exit code of each.
        left: not begun, or stopped because time was up.
    """

    done: list[Job] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)
    left: list[Job] = field(default_factory=list)


def run_jobs(
    jobs: Sequence[Job], console: Console, minutes: float | None = None, launch: Launch | None = None
) -> Tally:
    """Run what is not finished; go on with what was interrupted; leave a failed job and go on with the next.

    Jobs that failed in an earlier call come last, so that they do not eat the time of the others.

    Args:
        jobs: the jobs, in order.
        console: where progress is told.
        minutes: how long; the run that is open then is stopped and can be resumed.
        launch: called with the arguments of `fkd` and the seconds left; returns the exit code, None if time was up.

    Raises:
        RunError: a job's folder was begun with another configuration; before anything runs.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the open run can be resumed.
    """
    for job in jobs:
        job.prepare()
    launch = launch or run_process
    end = None if minutes is None else time.monotonic() + 60 * minutes
    tally = Tally(done=[job for job in jobs if job.finished])
    for job in sorted(jobs, key=lambda job: job.failed):
        if job.finished:
            continue
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0:
            tally.left.append(job)
            continue
        place = len(tally.done) + len(tally.failed) + 1
        console.print(f"[{place}/{len(jobs)}] {job.name}{_time_left(jobs, tally)}", markup=False, highlight=False)
        code = _attempt(job, launch, left)
        if code is None:
            tally.left.append(job)
        elif code:
            tally.failed[job.name] = code
        else:
            tally.done.append(job)
    return tally


def _attempt(job: Job, launch: Launch, left: float | None) -> int | None:
    started, code, of = time.monotonic(), signal.SIGINT + 128, code_of_today()
    try:
        ended = launch(job.arguments(), left)
        code = signal.SIGTERM + 128 if ended is None else ended
        return ended
    finally:
        job.add(time.monotonic() - started, code, of)


def run_process(arguments: list[str], seconds: float | None) -> int | None:
    """Run `fkd` in a process; return its exit code, or None if it was stopped after `seconds`.

    It ends with this one, unless this one is killed outright: then it finishes its run, and a study that is given again
    meanwhile is refused that run by its lock.

    A process of its own costs some seconds of imports, and keeps the study alive and its memory flat whatever happens
    in a run; several devices start their processes from it.
    """
    process = subprocess.Popen([sys.executable, "-m", "fkd_med", *arguments])
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _time_left(jobs: Sequence[Job], tally: Tally) -> str:
    """Say how long the rest may take, from finished runs of the same arm, or of any where there is none."""
    known = [(job.arm, job.data, float(job.note().get("seconds", 0.0))) for job in tally.done]
    over = {job.name for job in tally.done} | set(tally.failed)
    if not known:
        return ""
    total = 0.0
    for job in jobs:
        if job.name in over:
            continue
        alike = [s for arm, data, s in known if (arm, data) == (job.arm, job.data)]
        alike = alike or [s for arm, _, s in known if arm == job.arm] or [s for *_, s in known]
        total += max(0.0, sum(alike) / len(alike) - float(job.note().get("seconds", 0.0)))
    return f"  (about {spoken(total)} left)"


def spoken(seconds: float) -> str:
    """Say a length of time."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"

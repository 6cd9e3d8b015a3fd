"""Runs the jobs of a study, one or several at a time, until all are done or time is up."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from fkd_med.study.definition import code_of_today
from fkd_med.study.jobs import Job
from fkd_med.study.processes import Processes

Launch = Callable[[list[str], float | None, Path | None], int | None]
_LAST_LINES = 5  # of the log of a run that failed, to be shown


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
    jobs: Sequence[Job],
    console: Console,
    minutes: float | None = None,
    at_once: int = 1,
    launch: Launch | None = None,
    devices: Sequence[str] = (),
) -> Tally:
    """Run what is not finished; go on with what was interrupted; leave a failed job and go on with the next.

    Jobs that failed in an earlier call come last, so that they do not eat the time of the others.

    Args:
        jobs: the jobs, in order.
        console: where progress is told.
        minutes: how long; the runs that are open then are stopped and can be resumed.
        at_once: how many run at the same time. Where it is more than one, each writes what it says into `Job.log`.
        launch: called with the arguments of `fkd`, the seconds left and the log (None: this process's output); returns
            the exit code, None if time was up. `Processes` when left out.
        devices: GPUs that `Processes` shares out, as CUDA_VISIBLE_DEVICES names them.

    Raises:
        RunError: a job's folder was begun with another configuration; before anything runs.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the open runs can be resumed.
    """
    for job in jobs:
        job.prepare()
    processes = Processes(devices)
    queue = _Queue(jobs, console, minutes, at_once, launch or processes)
    if at_once == 1:
        queue.work()
        return queue.tally
    with ThreadPoolExecutor(at_once, thread_name_prefix="job") as threads:
        try:
            for ended in as_completed([threads.submit(queue.work) for _ in range(at_once)]):
                ended.result()
        except BaseException:
            queue.is_closed = True
            try:
                processes.stop()
            finally:  # a second Ctrl-C waits for nobody
                processes.kill()
            raise
    return queue.tally


class _Queue:
    """Where jobs are taken from a queue, by as many threads as run at once."""

    def __init__(
        self, jobs: Sequence[Job], console: Console, minutes: float | None, at_once: int, launch: Launch
    ) -> None:
        self.jobs, self.console, self.at_once, self.launch = jobs, console, at_once, launch
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.tally = Tally(done=[job for job in jobs if job.finished])
        self.queue = deque(job for job in sorted(jobs, key=lambda job: job.failed) if not job.finished)
        self.begun = len(self.tally.done)
        self.is_closed = False
        self._lock = threading.Lock()

    def work(self) -> None:
        """Run jobs until none is left."""
        while (taken := self._take()) is not None:
            job, seconds = taken
            log = job.log if self.at_once > 1 else None
            started = time.monotonic()
            code = _attempt(job, self.launch, seconds, log)
            with self._lock:
                self._note(job, code)
            if log is not None and not self.is_closed:
                self._tell(job, code, time.monotonic() - started)

    def _take(self) -> tuple[Job, float | None] | None:
        """Take the next job, and the seconds it has; None when there is none, or no time for it."""
        with self._lock:
            if not self.queue or self.is_closed:
                return None
            left = None if self.end is None else self.end - time.monotonic()
            if left is not None and left <= 0:
                self.tally.left += self.queue
                self.queue.clear()
                return None
            job = self.queue.popleft()
            self.begun += 1
            text = f"[{self.begun}/{len(self.jobs)}] {job.name}{_time_left(self.jobs, self.tally, self.at_once)}"
            self.console.print(text, markup=False, highlight=False)
            return job, left

    def _note(self, job: Job, code: int | None) -> None:
        if code is None:
            self.tally.left.append(job)
        elif code:
            self.tally.failed[job.name] = code
        else:
            self.tally.done.append(job)

    def _tell(self, job: Job, code: int | None, seconds: float) -> None:
        """Say how a job ended whose own words went into its log, at once: others may end at the same time."""
        how = "stopped, time is up" if code is None else f"failed with exit code {code}" if code else "done"
        told = [f"{job.name}: {how} after {spoken(seconds)}"]
        if code:
            lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines() if job.log.is_file() else []
            told += [f"  {line}" for line in [*lines[-_LAST_LINES:], f"All it said: {job.log}"]]
        self.console.print("\n".join(told), markup=False, highlight=False, soft_wrap=True)


def _attempt(job: Job, launch: Launch, left: float | None, log: Path | None) -> int | None:
    started, code, of = time.monotonic(), signal.SIGINT + 128, code_of_today()
    try:
        ended = launch(job.arguments(), left, log)
        code = signal.SIGTERM + 128 if ended is None else ended
        return ended
    finally:
        job.add(time.monotonic() - started, code, of)


def _time_left(jobs: Sequence[Job], tally: Tally, at_once: int) -> str:
    """Say how long the rest may take, from finished runs of the same arm, or of any where there is none."""
    known = [(job.arm, job.data, float(job.note().get("seconds", 0.0))) for job in tally.done]
    over = {job.name for job in tally.done} | set(tally.failed)
    if not known:
        return ""
    left = []
    for job in jobs:
        if job.name in over:
            continue
        alike = [s for arm, data, s in known if (arm, data) == (job.arm, job.data)]
        alike = alike or [s for arm, _, s in known if arm == job.arm] or [s for *_, s in known]
        left.append(max(0.0, sum(alike) / len(alike) - float(job.note().get("seconds", 0.0))))
    return f"  (about {spoken(max(sum(left) / at_once, *left, 0.0))} left)"


def spoken(seconds: float) -> str:
    """Say a length of time."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"

"""`fkd` in processes that end with this one, several at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_PATIENCE = 60.0  # seconds to write down what is open after SIGTERM, before SIGKILL
_MOMENT = 1.0  # seconds in which a process may end by the Ctrl-C that it has got itself


class Processes:
    """Runs `fkd`, each time in a process of its own, which ends with this one.

    Unless this one is killed outright: then they finish their runs, and a study that is given again meanwhile is
    refused those by their locks. A process of its own costs some seconds of imports, and keeps the study alive and its
    memory flat whatever happens in a run; several devices start their processes from it.

    Args:
        devices: GPUs to share out among processes that run at the same time; none to leave that to each.
    """

    def __init__(self, devices: Sequence[str] = ()) -> None:
        self.devices = devices
        self._running: dict[subprocess.Popen[bytes], str | None] = {}
        self._lock = threading.Lock()
        self._is_over = False

    def __call__(self, arguments: list[str], seconds: float | None, log: Path | None = None) -> int | None:
        """Run `fkd`; return its exit code, or None if it was stopped after `seconds`."""
        with self._lock:
            if self._is_over:
                return None
            used = list(self._running.values())
            device = min(self.devices, key=used.count) if self.devices else None
            process = self._begin(arguments, device, log)
            self._running[process] = device
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end([process])
            with self._lock:
                del self._running[process]

    def stop(self) -> None:
        """End all that run, and begin no more; after a moment, since a terminal has told them of its Ctrl-C too."""
        with self._lock:
            self._is_over = True
            running = list(self._running)
        _wait(running, _MOMENT)
        _end(running)

    def kill(self) -> None:
        """End at once what still runs."""
        with self._lock:
            running = list(self._running)
        for process in running:
            process.kill()

    @staticmethod
    def _begin(arguments: list[str], device: str | None, log: Path | None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "fkd_med", *arguments]
        around = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        if log is None:
            return subprocess.Popen(command, env=around)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:  # a run that goes on goes on in its log
            return subprocess.Popen(command, env=around, stdout=file, stderr=subprocess.STDOUT)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let processes that still run write down what is open, and end them."""
    left = [process for process in processes if process.poll() is None]
    for process in left:
        process.terminate()
    for process in _wait(left, _PATIENCE):
        process.kill()
        process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> list[subprocess.Popen[bytes]]:
    """Wait for processes, for so long together; return those that still run."""
    until = time.monotonic() + seconds
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
    return [process for process in processes if process.poll() is None]

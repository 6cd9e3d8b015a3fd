"""Several processes of one run (DDP): who answers to signals, who speaks, and that none is left behind.

Lightning starts the others by the first one's own command line; torchrun starts all of them. Only the first writes
files, so only it has something to finish when it is asked to end; the others may end at any moment.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fkd_med.errors import ConfigError, TrainingError

_SECONDS = 0.5  # between two looks at the process that started this one
_GONE = re.compile(r"gloo.*(closed by peer|reset by peer|Broken pipe|Connection refused|[Tt]imed out)", re.DOTALL)


class LostProcessError(TrainingError):
    """Another process of the run has ended; it, or the system, knows why."""


def rank() -> int:
    """Return which of a run's processes this one was started as, from 0; before anything heavy is imported."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def is_under_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def attached() -> Iterator[None]:
    """End this process soon after the one that started it, if that started several of them.

    Without this, one that waits for the others would stay for the half hour that collectives wait.
    """
    if rank() > 0 or is_under_torchrun():
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True, name="parent-watch").start()
    if rank() > 0 and not is_under_torchrun() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches all processes; the first ends the others
    yield


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS)
    os._exit(128 + signal.SIGTERM)


def lost_process(error: BaseException) -> LostProcessError | None:
    """Return what to say if `error` means that another process of the run has ended; None if it does not."""
    if not isinstance(error, RuntimeError) or not _GONE.search(str(error)):
        return None
    return LostProcessError(
        "Another process of this run has ended, and this one cannot go on without it. If it left no message above, the "
        "system killed it (out of memory?). Run the same command again: with `--ckpt_path last` once a round (or "
        "epoch) was closed."
    )


def check_started(world_size: int) -> None:
    """See that a run uses all processes that torchrun has started.

    Args:
        world_size: how many processes the trainer counts.

    Raises:
        ConfigError: it would use another number, and each process would be a run of its own.
    """
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if is_under_torchrun() and started != world_size:
        raise ConfigError(
            f"torchrun started {started} process{'es' * (started > 1)}, and trainer.devices and trainer.num_nodes ask "
            f"for {world_size}: give --trainer.devices as many as --nproc_per_node, and --trainer.strategy ddp."
        )

"""SIGTERM ends a command as Ctrl-C does: what is being written is finished or undone, locks go, and it says so.

Lightning by itself waits for the end of a step or a round and then ends with the code of an error. Nothing is gained
by waiting: what a run needs to go on is on the disk at any moment.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fkd_med.cli.processes import rank

INTERRUPTED, TERMINATED = 130, 143


class TerminatedError(KeyboardInterrupt):
    """The process was asked to end (SIGTERM); whoever handles Ctrl-C handles this."""


@contextmanager
def terminable() -> Iterator[None]:
    """Raise `TerminatedError` in the block at the first SIGTERM; later ones, during the cleaning up, are ignored.

    Of several processes only the first has something to clean up: the others end at once, even while they wait.
    """
    if rank() > 0 or threading.current_thread() is not threading.main_thread():
        yield
        return
    told = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal told
        if not told:
            told = True
            raise TerminatedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def interruption(error: BaseException) -> int | None:
    """Return the exit code of an interruption, or None if `error` is none; Lightning turns them into SystemExit."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, KeyboardInterrupt):
            return TERMINATED if isinstance(seen, TerminatedError) else INTERRUPTED
        seen = seen.__cause__ or seen.__context__
    return None

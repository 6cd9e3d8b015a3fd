"""What the tests of clients side by side send to other processes, which therefore must be importable there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L

from fkd_med.errors import TrainingError


class Trouble(L.Callback):
    """Does something to a client's process, in one round, for as long as a file is there.

    Args:
        flag: the file.
        kind: what happens at the round's first batch.
        client: to whom.
        round: when.
        pids: a file that gets the number of each process that trains.
    """

    def __init__(self, flag: str, kind: str, client: str, round: int, pids: str) -> None:
        self.flag, self.kind, self.client, self.round, self.pids = flag, kind, client, round, pids

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        with open(self.pids, "a") as file:
            file.write(f"{os.getpid()}\n")
        if batch["client"][0] != self.client or pl_module.clock.round != self.round or not Path(self.flag).exists():
            return
        if self.kind == "raises":
            raise TrainingError(f"Client {self.client} is in trouble.")
        if self.kind == "breaks":
            raise ValueError("of a bug")
        if self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "hangs":
            time.sleep(600)

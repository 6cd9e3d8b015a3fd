"""What the run's own process knows of a process that trains clients beside it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from typing import Any

from fkd_med.federated.beside import serve

_SECONDS = 10.0  # to wait for the end of a process that was killed


class Member:
    """A process that trains one client at a time.

    Args:
        context: how processes are started.
        device: the GPU it uses, as CUDA_VISIBLE_DEVICES names it; None for what the run has.
    """

    def __init__(self, context: Any, device: str | None) -> None:
        self.device = device
        self.connection, other = context.Pipe()
        # No daemon: its clients may have data workers.
        self.process = context.Process(target=serve, args=(other,), name="fkd-client", daemon=False)
        self.process.start()
        other.close()
        self.ends = [self.connection, self.process.sentinel]
        self.client: str | None = None
        self.is_ready = self.knows_round = False
        self.heard = time.monotonic()

    def begin(self, packed: bytes) -> None:
        """Hand over what every process needs (a packed `Handover`), and what surrounds the run."""
        environment = dict(os.environ) | ({} if self.device is None else {"CUDA_VISIBLE_DEVICES": self.device})
        around = {"environment": environment, "start_method": multiprocessing.get_start_method(allow_none=True)}
        self.connection.send_bytes(json.dumps(around).encode())
        self.connection.send_bytes(packed)

    def train(self, client: str, start: bytes) -> None:
        """Let it train a client.

        Args:
            client: the client.
            start: the packed `RoundStart`, sent once a round.

        Raises:
            OSError: the process is no more.
        """
        if not self.knows_round:
            self.connection.send_bytes(b"r" + start)
            self.knows_round = True
        self.connection.send_bytes(b"c" + client.encode())
        self.client, self.heard = client, time.monotonic()

    def hear(self) -> dict[str, Any]:
        """Return what it says.

        Raises:
            EOFError: it is no more.
        """
        said: dict[str, Any] = json.loads(self.connection.recv_bytes())
        self.heard = time.monotonic()
        self.is_ready |= said["kind"] == "ready"
        return said

    def how_it_ended(self) -> str:
        """Return in words how the process ended."""
        self.process.join(_SECONDS)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"was killed ({_name_of(-code)}; out of memory?)"
        return f"ended with exit code {code}"

    def end(self) -> None:
        """End the process and its data workers, whatever they do."""
        if self.process.pid is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):  # it has no group of its own yet, or is no more
                self.process.kill()
        self.process.join(_SECONDS)
        self.connection.close()


def _name_of(number: int) -> str:
    """Return a signal's name; of one that has none, a real-time signal's, its number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

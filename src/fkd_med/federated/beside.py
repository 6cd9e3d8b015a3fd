"""A process that trains clients beside others: it takes a round's start and clients' names, and leaves files.

It ends when the run's own process does, however that ended, and takes its data workers with it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from functools import partial
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from typing import Any, Never

import torch

from fkd_med.allocator import keep_memory
from fkd_med.errors import FkdError
from fkd_med.federated.client import ClientWorker, give_teacher
from fkd_med.federated.client_state import ClientStates
from fkd_med.federated.handover import Handover, RoundStart
from fkd_med.federated.inner import serving
from fkd_med.federated.part import ClientPart
from fkd_med.federated.progress import Reporter
from fkd_med.federated.quiet import quiet


def serve(connection: Connection) -> None:
    """Train clients until the run's own process ends this one, or is gone.

    Args:
        connection: first come the surroundings (JSON) and a packed `Handover`; then, by a letter, a packed `RoundStart`
            (``r``) or a client's name (``c``). Answers are JSON.
    """
    os.setpgid(0, 0)  # so that data workers can be ended with this process, and a Ctrl-C is the first process's to take
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True, name="parent-watch").start()
    tell = partial(_tell, connection)
    try:
        around = json.loads(connection.recv_bytes())
        os.environ.update(around["environment"])
        multiprocessing.set_start_method(around["start_method"], force=True)  # of data workers: as in the run's own
        packed = connection.recv_bytes()
        try:
            handover: Handover = pickle.loads(packed)  # from the process that started this one
        except Exception as error:
            tell(kind="refused", text=f"{type(error).__name__}: {error}")
            _end()
        _work(connection, handover, tell)
    except (EOFError, ConnectionError):
        pass
    _end()


def _work(connection: Connection, handover: Handover, tell: Any) -> None:
    keep_memory()
    torch.set_num_threads(handover.threads)
    torch.set_float32_matmul_precision(handover.matmul)
    with serving(handover.module), quiet():
        worker = ClientWorker(
            module=handover.module,
            data=handover.data,
            federation=handover.federation,
            flags=handover.flags,
            seed=handover.seed,
            states=ClientStates(handover.states),
            reporter=Voice(tell),
            prepare=partial(give_teacher, data=handover.data, maps=handover.maps),
        )
        part = ClientPart(worker, handover.exchange)
        start: RoundStart | None = None
        tell(kind="ready")
        while True:
            message = connection.recv_bytes()
            if message[:1] == b"r":
                start = RoundStart.unpacked(message[1:])
                worker.module.load_state_dict(start.server)
                worker.states.versions = start.versions
            else:
                assert start is not None
                _do(part, message[1:].decode(), start, tell)


def _do(part: ClientPart, client: str, start: RoundStart, tell: Any) -> None:
    """Let a client do its part, and tell how it ended."""
    try:
        part.do(client, start.broadcast, lambda _, metrics: tell(kind="measured", client=client, metrics=metrics))
    except FkdError as error:
        tell(kind="failed", client=client, error=type(error).__name__, text=str(error))
    except Exception as error:
        trace = traceback.format_exc()
        tell(kind="failed", client=client, error=type(error).__name__, text=str(error), trace=trace)
    else:
        tell(kind="done", client=client)


class Voice(Reporter):
    """A reporter whose words reach the run's own process: a sign of life, too.

    Args:
        tell: takes them there.
    """

    def __init__(self, tell: Any) -> None:
        super().__init__(enabled=False)
        self.tell = tell

    def show(self, text: str) -> None:
        """Send what stands beside the bar."""
        self.tell(kind="alive", text=text)


def _tell(connection: Connection, **what: Any) -> None:
    connection.send_bytes(json.dumps(what).encode())


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    _end()


def _end() -> Never:
    """End this process and its data workers at once, whatever they do."""
    os.killpg(0, signal.SIGKILL)
    os._exit(1)

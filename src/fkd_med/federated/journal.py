"""The journal of the open round: which clients have finished, so that a run that is killed need not ask them again.

``journal/round-00005/<client>.json`` is written last, after the client's update and state; it names both by their
SHA-256, and by the digest of its opening (see `opening`) the closed round and the settings it belongs to. What does
not agree with all three is as if it were not there: the client trains again.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fkd_med.communication import Broadcast, check_client_name
from fkd_med.errors import FkdError
from fkd_med.federated.opening import Openings
from fkd_med.files import atomic_write_text, file_digest, open_regular
from fkd_med.ranks import as_first_rank_says, is_first_rank

if TYPE_CHECKING:
    from fkd_med.federated.client import ClientWorker
    from fkd_med.federated.exchange import Exchange

_MOST_BYTES = 2**20  # of a note; it holds three hashes and a client's metrics


@dataclass(frozen=True)
class Finished:
    """A client that has finished its part of the open round.

    Args:
        opening: digest of what it started from.
        update: SHA-256 of its update, None if nothing travels.
        state: SHA-256 of the state it led to, None if there was nothing to keep.
        metrics: what it measured.
    """

    opening: str
    update: str | None
    state: str | None
    metrics: dict[str, float]


class Journal:
    """Notes who has finished in the open round, and finds them again after a kill.

    Under DDP rank 0 writes and decides; all ranks must ask.

    Args:
        exchange: has the folder of the updates, and unpacks them.
        worker: trains the clients; knows their states.
    """

    def __init__(self, exchange: Exchange, worker: ClientWorker) -> None:
        self.exchange, self.states = exchange, worker.states
        self.is_local = worker.federation.is_local
        self.openings = Openings(worker)

    def note(self, client: str, broadcast: Broadcast, metrics: dict[str, float]) -> None:
        """Note, durably, that a client has finished; its update and its state are written."""
        if not is_first_rank():
            return
        update, state = self._files(client, broadcast.round)
        found = Finished(self.openings.digest(client, broadcast), update, state, metrics)
        atomic_write_text(self._path(client, broadcast.round), json.dumps(vars(found)))

    def find(self, client: str, broadcast: Broadcast) -> dict[str, float] | None:
        """Return what a client measured that has finished already, or None if it must train.

        Anything missing, torn, altered or of another opening means None; it is never an error.
        """
        return as_first_rank_says(self._find(client, broadcast) if is_first_rank() else None)

    def _find(self, client: str, broadcast: Broadcast) -> dict[str, float] | None:
        note = _read(self._path(client, broadcast.round))
        if note is None or note.opening != self.openings.digest(client, broadcast):
            return None
        if (note.update, note.state) != self._files(client, broadcast.round) or not (note.update or note.state):
            return None
        if not self.is_local:
            try:
                list(self.exchange.updates({client: self.exchange.path(client, broadcast.round)}, broadcast))
            except FkdError:
                return None
        return note.metrics

    def _files(self, client: str, round: int) -> tuple[str | None, str | None]:
        """Return the SHA-256 of a client's update, if one travels, and of the state that it led to."""
        update = None if self.is_local else file_digest(self.exchange.path(client, round))
        return update, file_digest(self.states.path(client, round))

    def _path(self, client: str, round: int) -> Path:
        return self.exchange.folder(round) / f"{check_client_name(client)}.json"


def _read(path: Path) -> Finished | None:
    """Return a note, or None if there is none that can be read."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        with open_regular(path) as file:
            stored = json.loads(file.read(_MOST_BYTES))
        metrics = {str(name): float(value) for name, value in stored["metrics"].items()}
        return Finished(stored["opening"], stored["update"], stored["state"], metrics)
    return None

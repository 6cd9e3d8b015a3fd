"""The way between server and clients: everything is encoded, counted, checked and decoded, even in simulation.

What comes out of here is what was really sent, so a simulated run trains on what a deployed one would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from fkd_med.communication import AllowList, Broadcast, Ledger, State, Update, check_client_name, decode, encode
from fkd_med.errors import TrainingError
from fkd_med.files import atomic_write_bytes


class StoredUpdates:
    """The updates of a round, read from the journal one at a time, in the order of the clients' names.

    Can be iterated again and again; only the update in hand is in memory.

    Args:
        files: encoded updates by client.
        check: called with each decoded update.
    """

    def __init__(self, files: dict[str, Path], check: Callable[[Broadcast | Update], None]) -> None:
        self.files = files
        self.check = check

    def __iter__(self) -> Iterator[Update]:
        for client in sorted(self.files):
            message = decode(self.files[client].read_bytes(), f"client {client}")
            self.check(message)
            if not isinstance(message, Update) or message.client != client:
                raise TrainingError(f"The journal's {self.files[client]} does not hold an update of client {client}.")
            yield message

    def __len__(self) -> int:
        return len(self.files)


class Exchange:
    """Sends broadcasts and receives updates of one run.

    Args:
        state: the student's state, which says what may travel.
        sections: names of the extras the configured rules declare.
        ledger: where bytes are counted.
        journal: folder that holds the updates of the open round.
        writes: whether this process (rank 0) writes journal and ledger.
    """

    def __init__(
        self, state: State, sections: frozenset[str], ledger: Ledger, journal: Path, writes: bool = True
    ) -> None:
        self.allowed = AllowList(state, sections)
        self.ledger = ledger
        self.journal = journal
        self.writes = writes

    def broadcast(self, message: Broadcast, clients: list[str]) -> Broadcast:
        """Send a broadcast to clients and return it as they decode it."""
        self.allowed.check(message)
        data = encode(message)
        for client in clients:
            self.ledger.record_message(message.round, client, "down", data)
        received = decode(data, "the server")
        assert isinstance(received, Broadcast)
        return received

    def receive(self, update: Update) -> Path:
        """Take an update as its client sends it, into the journal; return the file."""
        self.allowed.check(update)
        data = encode(update)
        self.ledger.record_message(update.round, update.client, "up", data)
        path = self.journal / f"round-{update.round:05d}" / f"{check_client_name(update.client)}.update"
        if self.writes:
            atomic_write_bytes(path, data)
        return path

    def updates(self, files: dict[str, Path]) -> StoredUpdates:
        """Return the updates of a round, for the aggregator."""
        return StoredUpdates(files, self.allowed.check)

    def forget(self, round: int) -> None:
        """Delete the updates of a closed round and of those before it."""
        if not self.writes:
            return
        for folder in self.journal.glob("round-*"):
            if folder.name <= f"round-{round:05d}":
                for path in folder.iterdir():
                    path.unlink()
                folder.rmdir()

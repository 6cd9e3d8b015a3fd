"""The way between server and clients: everything is packed, counted, checked and unpacked, even in simulation.

What comes out of here is what was really sent, so a simulated run trains on what a deployed one would.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from fkd_med.communication import (
    AllowList,
    Broadcast,
    Ledger,
    Packing,
    PublicLogits,
    State,
    Update,
    check_client_name,
    specs,
)
from fkd_med.errors import TrainingError
from fkd_med.files import atomic_write_bytes
from fkd_med.modules import RunClock
from fkd_med.seeding import derive_seed

PLAIN = Packing(compress=False)


class Exchange:
    """Sends broadcasts and receives updates of one run.

    Args:
        state: what of the student travels: names, shapes and types.
        sections: names of the extras the configured rules declare.
        ledger: where bytes are counted.
        journal: folder that holds the updates of the open round.
        writes: whether this process (rank 0) writes journal and ledger.
        uplink: how updates are packed.
        downlink: how broadcasts are packed.
        seed: the run's seed, of the packings' random draws.
        rounds: rounds of the run, for packings that change in its course.
        logits: what logits on public images look like, if they are shared.
    """

    def __init__(
        self,
        state: State,
        sections: frozenset[str],
        ledger: Ledger,
        journal: Path,
        writes: bool = True,
        uplink: Packing | None = None,
        downlink: Packing | None = None,
        seed: int = 0,
        rounds: int = 1,
        logits: PublicLogits | None = None,
    ) -> None:
        self.allowed = AllowList(state, sections, logits)
        self.specs = specs(state)
        self.ledger = ledger
        self.journal = journal
        self.writes = writes
        self.uplink, self.downlink = uplink or PLAIN, downlink or PLAIN
        self.seed, self.rounds = seed, rounds

    def packing(self, way: Literal["up", "down"], round: int) -> Packing:
        """Return how messages of a round are packed, as both sides know it."""
        return (self.uplink if way == "up" else self.downlink).at(RunClock(round=round, rounds=self.rounds).progress)

    def broadcast(self, message: Broadcast, clients: list[str]) -> Broadcast:
        """Send a broadcast to clients and return it as they unpack it."""
        self.allowed.check(message)
        packing = self.packing("down", message.round)
        packed = packing.pack(message, seed=derive_seed(self.seed, "downlink", message.round))
        for client in clients:
            self.ledger.record_message(message.round, client, "down", packed.data)
        received = packed.message
        assert isinstance(received, Broadcast)
        return received

    def receive(
        self, update: Update, broadcast: Broadcast, residual: Mapping[str, Tensor] | None = None
    ) -> tuple[Path, State]:
        """Take an update as its client sends it, into the journal.

        Args:
            update: what the client sends.
            broadcast: what it started from, as it unpacked it.
            residual: what the client's packing has not sent yet.

        Returns:
            The file, and what the client's packing now has not sent.
        """
        self.allowed.check(update)
        seed = derive_seed(self.seed, "uplink", update.round, update.client)
        packed = self.packing("up", update.round).pack(update, broadcast.state, residual, seed)
        self.ledger.record_message(update.round, update.client, "up", packed.data)
        path = self.path(update.client, update.round)
        if self.writes:
            atomic_write_bytes(path, packed.data)
        return path, packed.residual or {}

    def count_again(self, client: str, round: int) -> Path:
        """Count an update that was sent before the run was interrupted; return its file."""
        path = self.path(client, round)
        self.ledger.record_message(round, client, "up", path.read_bytes())
        return path

    def folder(self, round: int) -> Path:
        """Return the journal's folder of a round."""
        return self.journal / f"round-{round:05d}"

    def path(self, client: str, round: int) -> Path:
        """Return the file of a client's update."""
        return self.folder(round) / f"{check_client_name(client)}.update"

    def updates(self, files: dict[str, Path], broadcast: Broadcast) -> StoredUpdates:
        """Return the updates of a round, for the aggregator."""
        return StoredUpdates(self, files, broadcast)

    def forget(self, round: int | None) -> None:
        """Delete what the journal holds of a closed round and of those before it; None deletes all of it."""
        if not self.writes:
            return
        for folder in self.journal.glob("round-*"):
            if round is not None and folder.name > self.folder(round).name:
                continue
            if folder.is_symlink() or not folder.is_dir():  # never through a link: what it leads to is not ours
                folder.unlink()
            else:
                shutil.rmtree(folder)


class StoredUpdates:
    """The updates of a round, read from the journal one at a time, in the order of the clients' names.

    Can be iterated again and again; only the update in hand is in memory.

    Args:
        exchange: how they are unpacked and checked.
        files: packed updates by client.
        broadcast: what the clients started from.
    """

    def __init__(self, exchange: Exchange, files: dict[str, Path], broadcast: Broadcast) -> None:
        self.exchange, self.files, self.start = exchange, files, broadcast

    def __iter__(self) -> Iterator[Update]:
        return (self.read(client) for client in sorted(self.files))

    def read(self, client: str) -> Update:
        """Return one client's update.

        Raises:
            TrainingError: what it sent is no update, not its own, or does not fit the student; says what.
        """
        packing = self.exchange.packing("up", self.start.round)
        data = self.files[client].read_bytes()
        message = packing.unpack(data, self.exchange.specs, self.start.state, f"client {client}")
        self.exchange.allowed.check(message)
        if not isinstance(message, Update) or message.client != client:
            raise TrainingError(f"The journal's {self.files[client]} does not hold an update of client {client}.")
        return message

    def __len__(self) -> int:
        return len(self.files)

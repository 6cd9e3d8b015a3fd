"""A client's part of a round, as far as it is the client's own: train, pack the update, note that it has finished.

The same whether the run's own process does it or one beside it: what counts for the round is what it leaves on the
disk, an update and a state that a note in the journal names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fkd_med.communication import Broadcast, Update
from fkd_med.errors import TrainingError
from fkd_med.federated.chaos import Event
from fkd_med.federated.client import ClientWorker
from fkd_med.federated.exchange import Exchange
from fkd_med.federated.journal import Journal
from fkd_med.ranks import is_first_rank

Measured = Callable[[str, dict[str, float]], None]


class ClientPart:
    """Lets clients do their part of a round.

    Args:
        worker: trains a client.
        exchange: takes its update.
    """

    def __init__(self, worker: ClientWorker, exchange: Exchange) -> None:
        self.worker, self.exchange = worker, exchange
        self.federation, self.states = worker.federation, worker.states
        self.journal = Journal(exchange, worker)

    def event(self, client: str, round: int) -> Event:
        """Return what befalls a client in a round (`federation.chaos`)."""
        chaos = self.federation.chaos
        return "fine" if chaos is None else chaos.happens(client, self.worker.seed, round)

    def do(self, client: str, broadcast: Broadcast, measured: Measured) -> Path | None:
        """Let a client train, send its update into the journal, and note that it has finished.

        Args:
            client: the client.
            broadcast: what it starts from.
            measured: told what it measured, as soon as it has trained.

        Returns:
            Its update; alone, its state; nothing from a client that is late, which nobody waits for.

        Raises:
            TrainingError: its training failed.
        """
        round = broadcast.round
        try:
            update = self.worker.fit(client, broadcast)
        except torch.OutOfMemoryError as error:
            fewer = " or federation.parallel" if self.federation.parallel > 1 else ""
            raise TrainingError(
                f"Client {client} ran out of device memory in round {round}: lower data.batch_size or "
                f"data.image_size{fewer}, or set trainer.precision to bf16-mixed."
            ) from error
        if self.event(client, round) == "late":
            return None
        measured(client, update.metrics)
        path = self.states.path(client, round)
        if not self.federation.is_local:
            chaos = self.federation.chaos
            path = self._sent(
                update if chaos is None else chaos.corrupt(update, broadcast, self.worker.seed), broadcast
            )
        self.journal.note(client, broadcast, update.metrics)
        return path

    def done(self, client: str, round: int) -> Path:
        """Return what a client that has finished already left, and count it."""
        if self.federation.is_local:
            return self.states.path(client, round)
        return self.exchange.count_again(client, round)

    def _sent(self, update: Update, broadcast: Broadcast) -> Path:
        """Send an update; what its packing could not send stays with the client, as part of the state it leads to."""
        states, client = self.states, update.client
        path, residual = self.exchange.receive(update, broadcast, states.load(client).residual)
        if residual and is_first_rank():
            after = states.read(client, update.round)
            after.residual = residual
            states.save(client, update.round, after)
        return path

"""Gathers the updates of a round: who trained, whose update is usable, and whether that is enough to go on."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from fkd_med.aggregation.firewall import change_norm, extra_sizes
from fkd_med.communication import Broadcast, Update
from fkd_med.errors import TrainingError
from fkd_med.federated.absences import Absence, Absences, Kind
from fkd_med.federated.client import ClientWorker
from fkd_med.federated.exchange import Exchange
from fkd_med.federated.federation import Federation
from fkd_med.federated.journal import Journal
from fkd_med.federated.progress import Reporter
from fkd_med.ranks import is_first_rank


class Gathering:
    """Asks the clients of a round, one after the other, and keeps the book of those whose update is missing.

    Args:
        federation: the round recipe: quorum, firewall, simulated trouble.
        worker: trains a client.
        exchange: takes its update.
        absences: the book.
        reporter: where absences are told.
        can_go_on: whether a client's failure may be survived; with several devices, the others would wait for it.
    """

    def __init__(
        self, federation: Federation, worker: ClientWorker, exchange: Exchange, absences: Absences, reporter: Reporter,
        can_go_on: bool,
    ) -> None:  # fmt: skip
        self.federation, self.worker, self.exchange = federation, worker, exchange
        self.absences, self.reporter, self.can_go_on = absences, reporter, can_go_on
        self.journal = Journal(exchange, worker)
        self.metrics: dict[str, float] = {}
        """What the clients of the round measured, as ``<client>/<metric>``."""

    def update_of(self, client: str, broadcast: Broadcast) -> Path | None:
        """Let a client train; return its update in the journal, or nothing if none came.

        Raises:
            TrainingError: its training failed, and no failure can be borne.
        """
        try:
            return self._received(client, broadcast)
        except TrainingError as error:
            if not self.can_go_on or self.federation.is_local or self.federation.quorum == 1:
                raise
            self._miss(broadcast.round, client, "failed", str(error))
            return None

    def _received(self, client: str, broadcast: Broadcast) -> Path | None:
        chaos, round, seed = self.federation.chaos, broadcast.round, self.worker.seed
        event = chaos.happens(client, seed, round) if chaos is not None else "fine"
        if event == "dropout":
            self._miss(round, client, "dropout")
            return None
        if event == "fail":
            raise TrainingError(f"Client {client}: simulated failure in round {round} (federation.chaos).")
        found = self.journal.find(client, broadcast)
        if found is not None and event == "fine":
            return self._found(client, round, found)
        try:
            update = self.worker.fit(client, broadcast)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"Client {client} ran out of device memory in round {round}: lower data.batch_size or "
                "data.image_size, or set trainer.precision to bf16-mixed."
            ) from error
        if event == "late" and chaos is not None:
            time.sleep(chaos.seconds)
            self._miss(round, client, "late")
            return None
        self._measured(client, update.metrics)
        path = self.worker.states.path(client, round)
        if not self.federation.is_local:
            path = self._sent(update if chaos is None else chaos.corrupt(update, broadcast, seed), broadcast)
        self.journal.note(client, broadcast, update.metrics)
        return path

    def _found(self, client: str, round: int, metrics: dict[str, float]) -> Path:
        """Take a client's update as it came before the run was interrupted."""
        what = "training" if self.federation.is_local else "update"
        self.reporter.line(f"round {round}: {what} of {client} found in the journal")
        self._measured(client, metrics)
        if self.federation.is_local:
            return self.worker.states.path(client, round)
        return self.exchange.count_again(client, round)

    def _measured(self, client: str, metrics: dict[str, float]) -> None:
        self.metrics |= {f"{client}/{name}": value for name, value in metrics.items()}

    def _sent(self, update: Update, broadcast: Broadcast) -> Path:
        """Send an update; what its packing could not send stays with the client, as part of the state it leads to."""
        states, client = self.worker.states, update.client
        path, residual = self.exchange.receive(update, broadcast, states.load(client).residual)
        if residual and is_first_rank():
            after = states.read(client, update.round)
            after.residual = residual
            states.save(client, update.round, after)
        return path

    def usable(self, broadcast: Broadcast, files: dict[str, Path]) -> dict[str, Path]:
        """Set harmful updates aside; return the files of the others."""
        firewall, aggregator = self.federation.firewall, self.federation.aggregator
        if firewall is None or aggregator is None:
            return files
        norms, extras, found = {}, {}, {}
        for update in self.exchange.updates(files, broadcast):
            quarantine = firewall.inspect(broadcast, update, aggregator)
            if quarantine is None:
                norms[update.client] = change_norm(broadcast, update)
                extras[update.client] = extra_sizes(update)
            else:
                found[update.client] = quarantine
        found |= firewall.inspect_round(norms, broadcast.round, extras)
        for client, quarantine in sorted(found.items()):
            reason = f"tensor {quarantine.tensor} {quarantine.reason}" if quarantine.tensor else quarantine.reason
            self._miss(broadcast.round, client, "quarantined", reason)
        aggregator.set_aside(len(found))
        return {client: path for client, path in files.items() if client not in found}

    def check_quorum(self, round: int, chosen: list[str], usable: int) -> None:
        """Stop the run when too few updates are usable; closed rounds are saved.

        Raises:
            TrainingError: says who is missing and why, and what can be done.
        """
        needed = self.federation.needed(len(chosen))
        if usable >= needed:
            return
        missing = "; ".join(absence.text for absence in self.absences.of(round))
        raise TrainingError(
            f"Round {round}: {usable} of {len(chosen)} clients sent a usable update, and {needed} are needed "
            f"(federation.quorum {self.federation.quorum:g}). {missing}. Earlier rounds are saved: mend the cause or "
            "lower federation.quorum, and go on with --ckpt_path last."
        )

    def _miss(self, round: int, client: str, kind: Kind, reason: str = "") -> None:
        absence = Absence(round, client, kind, reason)
        self.absences.note(absence)
        self.reporter.line(absence.text)

"""Gathers the updates of a round: who trained, whose update is usable, and whether that is enough to go on."""

from __future__ import annotations

import time
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from fkd_med.aggregation.firewall import Quarantine, change_norm, extra_sizes
from fkd_med.communication import Broadcast
from fkd_med.errors import ConfigError, DataError, FkdError, RunError, TrainingError, first_line
from fkd_med.federated.absences import Absence, Absences, Kind
from fkd_med.federated.chaos import Event
from fkd_med.federated.client import ClientWorker
from fkd_med.federated.crew import Crew
from fkd_med.federated.exchange import Exchange
from fkd_med.federated.federation import Federation
from fkd_med.federated.handover import RoundStart
from fkd_med.federated.part import ClientPart
from fkd_med.federated.progress import Reporter


class Gathering:
    """Asks the clients of a round, in the order of their names, and keeps the book of those whose update is missing.

    Args:
        federation: the round recipe: quorum, firewall, simulated trouble.
        worker: trains a client.
        exchange: takes its update.
        absences: the book.
        reporter: where absences are told.
        can_go_on: whether a client's failure may be survived; with several devices, the others would wait for it.
        crew: trains clients side by side; None trains them here, one after the other.
    """

    def __init__(
        self, federation: Federation, worker: ClientWorker, exchange: Exchange, absences: Absences, reporter: Reporter,
        can_go_on: bool, crew: Crew | None = None,
    ) -> None:  # fmt: skip
        self.federation, self.exchange, self.crew = federation, exchange, crew
        self.absences, self.reporter, self.can_go_on = absences, reporter, can_go_on
        self.part = ClientPart(worker, exchange)
        self.journal = self.part.journal
        self.metrics: dict[str, float] = {}
        """What the clients of the round measured, as ``<client>/<metric>``."""

    def update_of(self, client: str, broadcast: Broadcast) -> Path | None:
        """Let a client train; return its update in the journal, or nothing if none came.

        Raises:
            TrainingError: its training failed, and no failure can be borne.
            DataError: the same, of its images; names the client.
            Exception: whatever else its training raised.
        """
        try:
            return self._received(client, broadcast)
        except (ConfigError, RunError, MisconfigurationException):  # would be everybody's
            raise
        except Exception as error:
            if not self.can_go_on or self.federation.is_local or self.federation.quorum == 1:
                if isinstance(error, DataError):
                    raise DataError(f"Client {client}, round {broadcast.round}: {error}") from error
                raise
            self._miss(broadcast.round, client, "failed", _reason(error, client))
            return None

    def ask(self, chosen: list[str], broadcast: Broadcast) -> None:
        """Let the clients of a round train side by side, if they are to; `update_of` then waits for each."""
        if self.crew is not None:
            server = {name: tensor.detach().cpu() for name, tensor in self.part.worker.module.state_dict().items()}
            start = RoundStart(broadcast, server, dict(self.part.states.versions))
            self.crew.ask([client for client in chosen if self._trains(client, broadcast)], start)

    def _trains(self, client: str, broadcast: Broadcast) -> bool:
        event = self.part.event(client, broadcast.round)
        return event == "late" or (event == "fine" and self.journal.find(client, broadcast) is None)

    def _received(self, client: str, broadcast: Broadcast) -> Path | None:
        round = broadcast.round
        event = self.part.event(client, round)
        if event == "dropout":
            self._miss(round, client, "dropout")
            return None
        if event == "fail":
            raise TrainingError(f"Client {client}: simulated failure in round {round} (federation.chaos).")
        if self.crew is not None and client in self.crew:
            path = self._beside(self.crew, client, broadcast, event)
        else:
            found = self.journal.find(client, broadcast)
            if found is not None and event == "fine":
                return self._found(client, round, found)
            path = self.part.do(client, broadcast, self._measured)
        if event == "late" and self.federation.chaos is not None:
            time.sleep(self.federation.chaos.seconds)
            self._miss(round, client, "late")
            return None
        return path

    def _beside(self, crew: Crew, client: str, broadcast: Broadcast, event: Event) -> Path | None:
        """Take a client's update from the process that trains it; it counts as one that the journal names."""
        outcome = crew.wait(client)
        self._measured(client, outcome.metrics)
        if outcome.error is not None:
            raise outcome.error
        if event == "late":
            return None
        if self.journal.find(client, broadcast) is None:
            raise ConfigError(
                f"federation.parallel: what the process of client {client} has trained is not what this run asked for "
                f"(round {broadcast.round}): a part of the model, the data or the rules does not arrive there as it "
                "is here. Set federation.parallel: 1."
            )
        return self.part.done(client, broadcast.round)

    def _found(self, client: str, round: int, metrics: dict[str, float]) -> Path:
        """Take a client's update as it came before the run was interrupted."""
        what = "training" if self.federation.is_local else "update"
        self.reporter.line(f"round {round}: {what} of {client} found in the journal")
        self._measured(client, metrics)
        return self.part.done(client, round)

    def _measured(self, client: str, metrics: dict[str, float]) -> None:
        self.metrics |= {f"{client}/{name}": value for name, value in metrics.items()}

    def usable(self, broadcast: Broadcast, files: dict[str, Path]) -> dict[str, Path]:
        """Set harmful updates aside; return the files of the others."""
        firewall, aggregator = self.federation.firewall, self.federation.aggregator
        if firewall is None or aggregator is None:
            return files
        norms, extras, found = {}, {}, {}
        updates = self.exchange.updates(files, broadcast)
        for client in sorted(files):
            try:
                update = updates.read(client)
                quarantine = firewall.inspect(broadcast, update, aggregator)
            except TrainingError as error:
                quarantine = Quarantine(client, broadcast.round, "", f"cannot be read: {error}")
            if quarantine is None:
                norms[client], extras[client] = change_norm(broadcast, update), extra_sizes(update)
            else:
                found[client] = quarantine
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


def _reason(error: Exception, client: str) -> str:
    """Return why a client failed: the whole text of an error of ours, else the kind and first line of any."""
    told = isinstance(error, FkdError) or str(error).startswith(f"Client {client}:")
    return str(error) if told else f"{type(error).__name__}: {first_line(error)}"

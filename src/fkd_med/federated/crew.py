"""Clients side by side: several train at the same time, each in a process of its own (`federation.parallel`).

The processes are made by a server that has imported the stack and done nothing else, so that they have neither threads
nor CUDA from the run's own. What a client's part of a round leaves is what it leaves in the run's own process, files
that the journal names; the run looks at them as at those that an interruption has left.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fkd_med.distillation import TeacherMaps
from fkd_med.errors import ConfigError, DataError, RunError, TrainingError
from fkd_med.federated.client import ClientWorker
from fkd_med.federated.exchange import Exchange
from fkd_med.federated.handover import Handover, RoundStart, visible_devices
from fkd_med.federated.member import Member
from fkd_med.files import remove_leftovers

SILENCE = 1800.0
"""Seconds without a batch after which a process counts as stuck; as long as collectives wait."""
BEGINNING = 1800.0
"""The same before its first client: it may have to import the stack from a slow disk."""
_KNOWN = {kind.__name__: kind for kind in (ConfigError, DataError, RunError, TrainingError, MisconfigurationException)}


@dataclass
class Outcome:
    """How a client's part of a round ended.

    Args:
        metrics: what it measured, if it came so far.
        error: why it failed, if it did.
        is_over: whether it has ended.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None
    is_over: bool = False


class Crew:
    """Lets the clients of a round train in processes beside the run's own.

    Args:
        size: how many at the same time.
        handover: gives what every process needs; called when some start.
        devices: GPUs to share out, see `visible_devices`.
        folders: where processes write; what a killed one left half-written there is removed.
        show: shows a text beside the progress bar.
    """

    def __init__(
        self, size: int, handover: Callable[[], Handover], devices: list[str], folders: list[Path],
        show: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.size, self.handover, self.devices, self.folders, self.show = size, handover, devices, folders, show
        self._members: list[Member] = []
        self._queue: deque[str] = deque()
        self._outcomes: dict[str, Outcome] = {}
        self._start = b""
        self._context = _context()

    @classmethod
    def of(
        cls, worker: ClientWorker, exchange: Exchange, maps: Mapping[str, TeacherMaps], device: torch.device
    ) -> Crew | None:
        """Return the crew that a run's recipe asks for, or None; its processes start with the first round.

        Raises:
            ConfigError: something of the run cannot go to another process.
        """
        size = worker.federation.parallel
        if size == 1:
            return None
        Handover.of(worker, exchange, maps).check()  # now, before teachers are trained
        threads, cores = torch.get_num_threads(), os.cpu_count() or 1
        if device.type == "cpu" and size * threads > cores:
            worker.reporter.line(
                f"federation.parallel: {size} processes of {threads} CPU threads on {cores} cores wait for each other; "
                f"federation.threads: {max(1, cores // size)} gives each cores of its own (and the run other bits)"
            )
        folders, devices = [worker.states.folder, exchange.journal], visible_devices(worker.flags, device)
        return cls(size, lambda: Handover.of(worker, exchange, maps), devices, folders, worker.reporter.show)

    def ask(self, clients: list[str], start: RoundStart) -> None:
        """Let clients of a round train; `wait` for each."""
        self._queue, self._outcomes = deque(clients), {client: Outcome() for client in clients}
        self._start = start.packed()
        for member in self._members:
            member.knows_round = False
        self._give_work()

    def __contains__(self, client: object) -> bool:
        """Tell whether a client of this round was asked."""
        return client in self._outcomes

    def wait(self, client: str) -> Outcome:
        """Return how the part of a client that was asked ended; meanwhile all go on.

        Raises:
            ConfigError: no process can take the run over.
            TrainingError: a process was killed before it began.
        """
        while not self._outcomes[client].is_over:
            self._listen()
            self._give_work()
        return self._outcomes[client]

    def stop(self) -> None:
        """End all processes, whatever they do."""
        for member in self._members:
            member.end()
        if self._members:
            self._tidy()
        self._members, self._outcomes = [], {}
        self._queue.clear()

    # --- the processes ----------------------------------------------------------------------------------------

    def _give_work(self) -> None:
        """Let every idle process train the next client; start as many processes as there is work for."""
        idle = [member for member in self._members if member.client is None]
        self._hire(min(self.size - len(self._members), len(self._queue) - len(idle)))
        for member in [member for member in self._members if member.client is None]:
            if not self._queue:
                return
            client = self._queue.popleft()
            try:
                member.train(client, self._start)
            except OSError:  # it has ended while it was idle, so no client has failed
                self._queue.appendleft(client)
                self._part_with(member)
                self._give_work()
                return

    def _hire(self, number: int) -> None:
        """Start some processes, all before the first is told anything: each has to begin, which takes a while."""
        if number < 1:
            return
        packed = self.handover().packed()
        new = []
        for _ in range(number):
            used = [member.device for member in self._members]
            device = min(self.devices, key=used.count) if self.devices else None
            new.append(Member(self._context, device))
            self._members.append(new[-1])
        for member in new:
            try:
                member.begin(packed)
            except OSError:
                raise self._never_began(member) from None

    def _listen(self) -> None:
        """Wait until a process says something or ends, or has been silent for too long."""
        busy = [member for member in self._members if member.client is not None]
        patience = max(0.0, min(_deadline(member) for member in busy) - time.monotonic())
        ready = connection.wait([end for member in busy for end in member.ends], timeout=patience)
        for member in busy:
            if member.connection in ready:
                self._hear(member)
            elif member.ends[1] in ready:
                self._lost(member, f"the process that trained it {member.how_it_ended()}")
            elif time.monotonic() >= _deadline(member):
                self._lost(
                    member, f"the process that trained it did nothing for {SILENCE / 60:g} minutes and was ended"
                )

    def _hear(self, member: Member) -> None:
        """Take what a process says."""
        try:
            said = member.hear()
        except (EOFError, OSError):
            self._lost(member, f"the process that trained it {member.how_it_ended()}")
            return
        kind, outcome = said["kind"], self._outcomes[str(member.client)]
        if kind == "alive":
            self.show(said["text"])
        elif kind == "measured":
            outcome.metrics = {str(name): float(value) for name, value in said["metrics"].items()}
        elif kind == "refused":
            raise ConfigError(
                f"federation.parallel: a process cannot take the run over: {said['text']}. Define functions and "
                "classes in modules that can be imported (a notebook's cannot), or set federation.parallel: 1."
            )
        elif kind in ("done", "failed"):
            outcome.error, outcome.is_over = _error(said) if kind == "failed" else None, True
            member.client = None

    def _lost(self, member: Member, why: str) -> None:
        """A process is no more: its client has failed."""
        if not member.is_ready:
            raise self._never_began(member)
        outcome = self._outcomes[str(member.client)]
        outcome.is_over, outcome.error = True, TrainingError(f"Client {member.client}: {why}.")
        self._part_with(member)

    def _never_began(self, member: Member) -> Exception:
        how = member.how_it_ended()
        self._part_with(member)
        return ConfigError(
            f"federation.parallel: a process {how} before it could begin. If there is an error above, it says why; a "
            'script of your own must start under `if __name__ == "__main__":`. If it was killed, lower '
            "federation.parallel: there may be too little memory."
        )

    def _part_with(self, member: Member) -> None:
        member.end()
        self._members.remove(member)
        self._tidy()

    def _tidy(self) -> None:
        for folder in self.folders:
            remove_leftovers(folder)


def _deadline(member: Member) -> float:
    """Return until when a process has to say something."""
    return member.heard + (SILENCE if member.is_ready else BEGINNING)


def _error(said: Mapping[str, Any]) -> Exception:
    """Return what a client's part of a round raised, as it would have been in this process."""
    kind, text = said["error"], said["text"]
    if kind in _KNOWN:
        return _KNOWN[kind](text)
    error = RuntimeError(f"Client {said['client']}: {kind}: {text}")
    error.add_note(said.get("trace", ""))
    return error


def _context() -> Any:
    """Return how processes are started: by a server that begins at once to import what they need."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fkd_med.federated.beside"])
    forkserver.ensure_running()
    return context

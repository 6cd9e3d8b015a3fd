"""How teachers travel, where the partners agree to it: each up to the server once, and down to every other client.

Really encoded, checked, counted and decoded, in simulation too: what clients load is what was decoded. It is the only
way in which anything of a teacher is ever in a message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fkd_med.communication import TEACHER, AllowList, Ledger, State, Update, check_client_name, decode, encode
from fkd_med.errors import ConfigError, RunError, TrainingError
from fkd_med.evaluation.tables import human_bytes
from fkd_med.files import atomic_write_bytes
from fkd_med.modules import DistillationModule


def check_consent(consents: bool, is_local: bool, module: nn.Module) -> None:
    """Refuse teachers that would travel without the partners' consent, and a consent that nobody uses.

    Args:
        consents: ``federation.share_teachers``.
        is_local: whether nothing travels at all; a source that shares is then used without partners.
        module: the module that is federated.

    Raises:
        ConfigError: says which, and the remedy.
    """
    source = module.teacher_source if isinstance(module, DistillationModule) else None
    shares = source is not None and source.shares
    if consents and not shares:
        raise ConfigError(
            "federation.share_teachers: true lets teachers travel, and nothing here would learn from them: set "
            "model.teacher to fkd_med.federated.EnsembleStage, or remove share_teachers."
        )
    if source is None or not shares or is_local:
        return
    name = type(source).__name__
    if not consents and isinstance(module, DistillationModule) and module.active_losses:
        raise ConfigError(
            f"{name} sends every client's teacher to all its partners, and they have not agreed to it: set "
            "federation.share_teachers: true once they have, or let each client learn from its own teacher "
            "(fkd_med.federated.TeacherStage)."
        )
    if source.architecture() is None:
        raise ConfigError(
            f"{name}: its teachers come from a source that does not tell their architecture(), without which "
            "nobody can say what of them may travel. Use fkd_med.federated.TeacherStage, or implement it."
        )


class TeacherExchange:
    """Carries teachers from client to client, one at a time, and counts them in round 0 of the ledger.

    One file per teacher holds the message as it travelled, for all who receive it.

    Args:
        architecture: a network as the teachers are; only names, shapes and types of its tensors count.
        folder: where the messages lie.
        ledger: where their bytes are counted, once: not again when a resumed run already has.
        writes: whether this process (rank 0) sends; the others read what it has written.
        barrier: waits for the other ranks.
    """

    def __init__(
        self,
        architecture: nn.Module | None,
        folder: Path,
        ledger: Ledger,
        writes: bool = True,
        barrier: Callable[[], Any] | None = None,
    ) -> None:
        assert architecture is not None  # see check_consent
        self.allowed = AllowList(architecture.state_dict(), whose="teacher")
        self.folder, self.ledger, self.writes = folder, ledger, writes
        self.barrier = barrier or _wait_for_nobody
        self._counts = not ledger.total(section=TEACHER)
        self._digests: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Go to another process of this run, which only receives."""
        return vars(self) | {"ledger": Ledger(), "writes": False, "barrier": _wait_for_nobody}

    def send(self, client: str, partners: list[str], teacher: nn.Module) -> None:
        """Send a client's teacher up, and from the server down to its partners.

        Args:
            client: whose teacher it is.
            partners: all other clients.
            teacher: its network.

        Raises:
            TrainingError: the teacher has weights that are not finite, or is not as all others are.
        """
        state = {name: tensor.detach().cpu() for name, tensor in teacher.state_dict().items()}
        _check_finite(client, state)
        # A message has counts, and these say nothing: the mean over teachers is not weighted.
        message = Update(client, round=0, attempt=0, state=state, num_examples=1, num_steps=1)
        self.allowed.check(message)
        data = encode(message)
        self._open(data, client)  # the server, before it passes the message on
        atomic_write_bytes(self._path(client), data)
        if self._counts:
            self.ledger.record(0, client, "up", TEACHER, len(data))
            for partner in partners:
                self.ledger.record(0, partner, "down", TEACHER, len(data))

    def receive(self, client: str) -> State:
        """Return the tensors of a client's teacher as its partners decode them.

        Raises:
            RunError: the message is gone.
            TrainingError: it is damaged, or holds other tensors than a teacher's.
        """
        return self._open(self._read(client), client)

    def digest(self, client: str) -> str:
        """Return the SHA-256 of the message that holds a client's teacher; it is read once."""
        if client not in self._digests:
            self._digests[client] = hashlib.sha256(self._read(client)).hexdigest()
        return self._digests[client]

    def summary(self) -> str:
        """Return in words what the ledger has counted of teachers."""
        up = self.ledger.total(section=TEACHER, direction="up")
        down = self.ledger.total(section=TEACHER, direction="down")
        return f"{human_bytes(up)} up, {human_bytes(down)} down, once"

    def _path(self, client: str) -> Path:
        return self.folder / f"{check_client_name(client)}.teacher"

    def _read(self, client: str) -> bytes:
        try:
            return self._path(client).read_bytes()
        except OSError as error:
            raise RunError(
                f"The shared teacher of client {client}, {self._path(client)}, cannot be read ({error.strerror}): go "
                "on with --ckpt_path last, which shares it again."
            ) from error

    def _open(self, data: bytes, client: str) -> State:
        message = decode(data, f"client {client}")
        self.allowed.check(message)
        if not isinstance(message, Update) or message.client != client:
            raise TrainingError(f"What came as the teacher of client {client} is another's. Start the run again.")
        return message.state


def _wait_for_nobody() -> None:
    """Return at once: there are no other ranks."""


def _check_finite(client: str, state: State) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise TrainingError(
                f"The teacher of client {client} has NaN or infinity in {name} and would spoil its partners' teachers "
                "too: train it again (delete it from the teacher store), or bring another one."
            )

"""What a client keeps between rounds, on its own disk: optimizer state, personal tensors, what rules remember.

One file per client and round. A version becomes current when its round is closed by a checkpoint that names it;
after a crash the version named by the checkpoint holds, whatever else lies there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fkd_med.checkpoints import read_checkpoint, write_checkpoint
from fkd_med.errors import RunError


@dataclass
class ClientState:
    """The state of one client after a round.

    Args:
        optimizers: state dicts of the optimizers, if the policy keeps them.
        parameters: names of the parameters they belong to, in their order.
        personal: tensors of the student that stay with the client.
        rules: what client rules remember, by the rule's name.
        residual: what an encoding with error feedback has not sent yet.
        companions: what trains beside the student and never leaves the client: connectors, a teacher that trains.
    """

    optimizers: list[dict[str, Any]] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    personal: dict[str, Tensor] = field(default_factory=dict)
    rules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    residual: dict[str, Tensor] = field(default_factory=dict)
    companions: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to keep."""
        return not any(vars(self).values())


class ClientStates:
    """The states of all clients of a run, by client and round.

    Args:
        folder: holds ``<client>/state-<round>.pt``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.versions: dict[str, int] = {}

    def path(self, client: str, round: int) -> Path:
        """Return the file of a client's state after a round."""
        return self.folder / client / f"state-{round:05d}.pt"

    def load(self, client: str) -> ClientState:
        """Return the current state of a client; an empty one before its first round.

        Raises:
            RunError: the file a checkpoint names is missing or damaged.
        """
        return self.read(client, self.versions[client]) if client in self.versions else ClientState()

    def read(self, client: str, round: int) -> ClientState:
        """Return the state of a client after a round, current or not; an empty one if there was nothing to keep.

        Raises:
            RunError: a checkpoint names the file, and it is missing or damaged.
        """
        path = self.path(client, round)
        if self.versions.get(client) != round and not path.exists():
            return ClientState()
        try:
            stored = read_checkpoint(path)
            return ClientState(**{name: stored[name] for name in vars(ClientState()) if name in stored})
        except (RunError, TypeError) as error:
            raise RunError(
                f"The state of client {client} after round {round} cannot be read from {path} "
                f"({error}). Resume from another checkpoint, or start afresh with --overwrite."
            ) from error

    def save(self, client: str, round: int, state: ClientState) -> None:
        """Write a client's state after a round; an empty one takes away what an interrupted attempt had left."""
        if state.is_empty:
            self.path(client, round).unlink(missing_ok=True)
            return
        write_checkpoint(vars(state), self.path(client, round))

    def accept(self, client: str, round: int) -> None:
        """Make the state of a round the current one, if one was written."""
        if self.path(client, round).exists():
            self.versions[client] = round

    def prune(self, needed: set[tuple[str, int]]) -> None:
        """Delete versions that neither is current nor a checkpoint (`needed`) names."""
        keep = {self.path(client, round) for client, round in needed | set(self.versions.items())}
        for path in self.folder.glob("*/state-*.pt"):
            if path not in keep:
                path.unlink(missing_ok=True)

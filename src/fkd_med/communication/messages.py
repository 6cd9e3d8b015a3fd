"""What travels between the server and a client: a `Broadcast` down, an `Update` up; tensors, counts, metrics.

Both are plain containers of CPU tensors. Neither knows how it is serialised (`wire`), whether it may travel
(`allowlist`) or what it costs (`ledger`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from fkd_med.errors import DataError

State: TypeAlias = dict[str, Tensor]
Extras: TypeAlias = dict[str, State]

MAX_NAME_CHARACTERS = 100
MAX_NAME_BYTES = 240  # a client's name is also a folder's, and file systems stop at 255 bytes


@dataclass(frozen=True, eq=False)
class Broadcast:
    """What the server sends to the clients of one round.

    Args:
        round: the round it opens, counted from 1.
        state: the global student, ``{name: CPU tensor}``.
        extras: further tensors by section (control variates, ...), as the configured rules declare them.
    """

    round: int
    state: State
    extras: Extras = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Update:
    """What one client sends back after training in one round.

    Args:
        client: the client's name (see `check_client_name`).
        round: the round of the broadcast it started from.
        attempt: 0, or how often the client had to start this round again.
        state: the student after training, ``{name: CPU tensor}``.
        num_examples: training images of the client; its weight in a weighted mean.
        num_steps: optimizer steps taken.
        metrics: what the client measured, NaN allowed.
        extras: further tensors by section.
    """

    client: str
    round: int
    attempt: int
    state: State
    num_examples: int
    num_steps: int
    metrics: dict[str, float] = field(default_factory=dict)
    extras: Extras = field(default_factory=dict)


def check_client_name(name: str) -> str:
    """Return `name` if it may name a client, a folder and the sender of a message.

    Any script is allowed; path separators, control characters, ``.`` and ``..``, spaces at either end, and more
    than 100 characters (240 bytes of UTF-8) are not.

    Raises:
        DataError: the name cannot be used; the message says why.
    """
    problem = _name_problem(name)
    if problem:
        shown = ascii(name if len(name) <= 120 else name[:120] + "...")
        raise DataError(f"Client name {shown} {problem}. Rename the client (its folder, or its rows in clients.csv).")
    return name


def _name_problem(name: str) -> str:
    if not name:
        return "is empty"
    if name in {".", ".."} or "/" in name or "\\" in name:
        return "would be a path: '/', '\\', '.' and '..' cannot name a client"
    if not name.isprintable():
        return "has characters that cannot be printed"
    if name != name.strip():
        return "begins or ends with a space"
    if len(name) > MAX_NAME_CHARACTERS or len(name.encode()) > MAX_NAME_BYTES:
        return f"is longer than {MAX_NAME_CHARACTERS} characters or {MAX_NAME_BYTES} bytes"
    return ""

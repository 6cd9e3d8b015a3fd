"""The ledger: how many bytes really travelled, by round, client, direction and part of the message.

``ledger.csv`` has the columns of `LedgerRow`. Bytes are those of the encoded messages, headers included; seconds are
what they would take on the links that the user states.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from fkd_med.communication.link import Direction, Link
from fkd_med.communication.wire import broadcast_size, section_bytes
from fkd_med.errors import RunError
from fkd_med.files import append_text, atomic_write_text

TEACHER = "teacher"  # the section of teachers that partners share: whole messages, once, in round 0


@dataclass(frozen=True)
class LedgerRow:
    """Bytes of one part (``header``, ``state``, ``extras:<section>``) of one message, and of all until then.

    `seconds` is what the part takes on its client's link; it is 0 where no link is stated.
    A shared teacher is one row, of round 0 and section ``teacher``, for each time it travelled.
    """

    round: int
    client: str
    direction: str
    section: str
    bytes: int
    cumulative: int
    seconds: float = 0.0


_COLUMNS = [field.name for field in fields(LedgerRow)]


class Ledger:
    """What travelled so far, kept in memory and, by `flush`, in a file.

    Args:
        path: ``ledger.csv``, continued when it exists; ``None`` keeps no file.
        link: how fast the clients' links are.

    Raises:
        RunError: `path` is not a ledger, or is damaged; names the line.
    """

    def __init__(self, path: str | Path | None = None, link: Link | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.link = link
        self.rows: list[LedgerRow] = [] if self.path is None or not self.path.exists() else _read(self.path)
        self._written = len(self.rows)

    def record(self, round: int, client: str, direction: Direction, section: str, bytes: int) -> None:
        """Note that `bytes` of `section` travelled ``"up"`` from or ``"down"`` to `client`."""
        if direction not in ("up", "down") or bytes < 0:
            raise ValueError(f"direction is 'up' or 'down' and bytes are not negative, not {direction!r}, {bytes}")
        cumulative = (self.rows[-1].cumulative if self.rows else 0) + bytes
        seconds = 0.0 if self.link is None else self.link.seconds(client, direction, bytes)
        self.rows.append(LedgerRow(round, client, direction, section, bytes, cumulative, seconds))

    def record_message(self, round: int, client: str, direction: Direction, data: bytes) -> None:
        """Note every part of an encoded message."""
        for section, size in section_bytes(data).items():
            self.record(round, client, direction, section, size)

    def flush(self) -> None:
        """Append the new rows to the file, durably.

        Raises:
            RunError: the file cannot be written.
        """
        new = self.rows[self._written :]
        if self.path is None or not new:
            return
        if self._written == 0:
            atomic_write_text(self.path, _to_csv(new, header=True))
        else:
            append_text(self.path, _to_csv(new))
        self._written = len(self.rows)

    def drop_after(self, round: int) -> None:
        """Forget the rows of rounds later than `round`, in the file too: a resumed run records them again."""
        kept = [row for row in self.rows if row.round <= round]
        self.rows, self._written = [], 0
        for row in kept:
            self.record(row.round, row.client, "up" if row.direction == "up" else "down", row.section, row.bytes)
        if self.path is not None and (kept or self.path.exists()):
            atomic_write_text(self.path, _to_csv(self.rows, header=True))
            self._written = len(self.rows)

    def total(
        self,
        round: int | None = None,
        client: str | None = None,
        direction: Direction | None = None,
        section: str | None = None,
    ) -> int:
        """Return the bytes of all rows that match what is given."""
        wanted = {"round": round, "client": client, "direction": direction, "section": section}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        return sum(row.bytes for row in self.rows if all(getattr(row, k) == v for k, v in wanted.items()))

    def per_message(self) -> dict[tuple[int, str, str], int]:
        """Return ``{(round, client, direction): bytes}``, in the order in which they were recorded."""
        sums: Counter[tuple[int, str, str]] = Counter()
        for row in self.rows:
            sums[row.round, row.client, row.direction] += row.bytes
        return dict(sums)

    def mean_per_message(self, direction: Direction) -> float:
        """Return the mean bytes that one client sends (``"up"``) or receives (``"down"``) in one round, 0 if none.

        Shared teachers belong to no round and are left out.
        """
        sizes: Counter[tuple[int, str]] = Counter()
        for row in self.rows:
            if row.direction == direction and row.section != TEACHER:
                sizes[row.round, row.client] += row.bytes
        return sum(sizes.values()) / len(sizes) if sizes else 0.0

    def seconds(self, round: int) -> float:
        """Return what a round's messages take: down and up one after the other, the clients side by side."""
        each: dict[str, float] = {}
        for row in self.rows:
            if row.round == round:
                each[row.client] = each.get(row.client, 0.0) + row.seconds
        return max(each.values(), default=0.0)


def counterfactual_bytes(state: Mapping[str, Tensor]) -> int:
    """Return the bytes of one message with `state`, floats as fp32: what federating that network would send.

    It is ``len(encode(Broadcast(0, state.float())))``, header included and integer buffers kept, computed from
    shapes alone: a network built under ``torch.device("meta")`` will do.
    """
    return broadcast_size(
        {n: (tuple(t.shape), torch.float32 if t.is_floating_point() else t.dtype) for n, t in state.items()}
    )


def _to_csv(rows: Iterable[LedgerRow], header: bool = False) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(_COLUMNS)
    writer.writerows(astuple(row) for row in rows)
    return text.getvalue()


def _read(path: Path) -> list[LedgerRow]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise RunError(f"Cannot read the ledger {path}: {error}. Restore it or move it away.") from error
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # a crash while appending; the resumed round records it again
    try:
        table = list(csv.reader(lines))
    except csv.Error as error:
        raise RunError(f"Cannot read the ledger {path}: {error}. Restore it or move it away.") from error
    if not lines:
        return []
    if table[0] != _COLUMNS:
        raise RunError(f"{path} is not a ledger (its columns are not {','.join(_COLUMNS)}). Move it away.")
    return [_row(path, number, values) for number, values in enumerate(table[1:], start=2)]


def _row(path: Path, number: int, values: list[str]) -> LedgerRow:
    try:
        round, client, direction, section, size, cumulative, seconds = values
        return LedgerRow(int(round), client, direction, section, int(size), int(cumulative), float(seconds))
    except ValueError as error:
        raise RunError(f"Line {number} of the ledger {path} is damaged. Remove that line, or the file.") from error

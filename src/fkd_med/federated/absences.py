"""Whose update is missing in a round, and why: ``absences.csv`` of the run, and what a person reads."""

from __future__ import annotations

import csv
import io
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Literal, cast

from fkd_med.errors import RunError
from fkd_med.files import append_text, atomic_write_text

Kind = Literal["dropout", "late", "failed", "quarantined"]
_WORDS = {"dropout": "did not answer", "late": "answered too late", "failed": "failed", "quarantined": "is set aside"}


@dataclass(frozen=True)
class Absence:
    """A client that was chosen in a round and whose update is not part of it."""

    round: int
    client: str
    kind: Kind
    reason: str = ""

    @property
    def text(self) -> str:
        """The line for the log."""
        return f"round {self.round} · {self.client} {_WORDS[self.kind]}" + (f": {self.reason}" if self.reason else "")


_COLUMNS = [field.name for field in fields(Absence)]


class Absences:
    """All absences of a run, in memory and in a file.

    Args:
        path: ``absences.csv``; None keeps no file.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[Absence] = []
        if path is not None and path.exists():
            self.rows = _read(path)

    def note(self, absence: Absence) -> None:
        """Add one, durably."""
        self.rows.append(absence)
        if self.path is None:
            return
        if self.path.exists():
            append_text(self.path, _to_csv([absence]))
        else:
            atomic_write_text(self.path, _to_csv([absence], header=True))

    def drop_after(self, round: int) -> None:
        """Forget those of rounds later than `round`: a resumed run meets them again."""
        self.rows = [row for row in self.rows if row.round <= round]
        if self.path is not None and self.path.exists():
            atomic_write_text(self.path, _to_csv(self.rows, header=True))

    def of(self, round: int) -> list[Absence]:
        """Return those of one round."""
        return [row for row in self.rows if row.round == round]


def _read(path: Path) -> list[Absence]:
    """Read the file, without a last line that a crash cut off; RunError if it is damaged otherwise."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        rows = list(csv.DictReader([line for line in lines if line.endswith("\n")]))
        found = [Absence(int(r["round"]), r["client"], cast(Kind, r["kind"]), r["reason"]) for r in rows]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise RunError(f"{path} cannot be read ({error!r:.200}). Restore it, or remove it to go on without.") from error
    if strange := [row.kind for row in found if row.kind not in _WORDS]:
        raise RunError(f"{path}: {ascii(strange[0])[:80]} is no kind of absence. Restore it, or remove it to go on.")
    return found


def _to_csv(rows: list[Absence], header: bool = False) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(_COLUMNS)
    writer.writerows([" ".join(str(value).split()) for value in astuple(row)] for row in rows)
    return text.getvalue()

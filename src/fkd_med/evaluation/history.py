"""How an arm's validation Dice rose, round by round, and what had been sent by then."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Sequence
from pathlib import Path

from fkd_med.evaluation.plots import Curve
from fkd_med.evaluation.rows import ImageRow
from fkd_med.evaluation.summary import summarize


def read_curve(rows: Sequence[ImageRow], ledger: Path) -> Curve | None:
    """Return the curve of one arm from its validation rows and its run's ledger.

    Args:
        rows: Validation rows of one model and arm, all rounds.
        ledger: ledger.csv of the run; only federated students are counted in it, so teachers get no bytes.

    Returns:
        The curve, without bytes where the ledger is missing or unreadable; None without rows.
    """
    if not rows:
        return None
    by_round: dict[int, list[ImageRow]] = {}
    for row in rows:
        by_round.setdefault(row.round, []).append(row)
    rounds = sorted(by_round)
    summaries = [summarize(by_round[r]) for r in rounds]
    sent = read_bytes(ledger) if rows[0].model != "teacher" else {}
    until = [sum(size for r, size in sent.items() if r <= last) / 1e6 for last in rounds]
    return Curve(rounds, [s.mean.dice for s in summaries], [s.worst.dice for s in summaries], until if sent else None)


def read_bytes(ledger: Path) -> dict[int, int]:
    """Return the bytes of each round; empty without a ledger, and with a warning when it cannot be read."""
    sent: dict[int, int] = {}
    if not ledger.is_file():
        return sent
    try:
        with ledger.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                number = int(row["round"])
                sent[number] = sent.get(number, 0) + int(row["bytes"])
    except (KeyError, ValueError, TypeError, csv.Error, UnicodeDecodeError) as error:
        warnings.warn(f"{ledger} cannot be read ({error!r}); its run is drawn without bytes.", stacklevel=2)
        return {}
    return sent

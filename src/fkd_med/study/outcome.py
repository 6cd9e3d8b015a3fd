"""What the runs of a study came to: their rows, by cell, arm and seed, and the traffic that made them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fkd_med.evaluation.history import read_bytes
from fkd_med.evaluation.rows import ImageRow, ImageTable, group_arms
from fkd_med.evaluation.summary import summarize
from fkd_med.study.curves import LearningCurve, read_curves
from fkd_med.study.jobs import Job

Split = Literal["val", "test"]
Rows = dict[int, list[ImageRow]]  # by seed


@dataclass
class Outcome:
    """One arm of one cell.

    Attributes:
        rows: seed -> the student's rows (of the arm's network, where it is no student).
        teacher: seed -> the rows of the hospitals' teachers, where the arm has some.
        bytes: seed -> bytes sent in the whole run, by all hospitals and the server.
        seconds: seed -> how long the run took.
        curves: seed -> the learning curves of ``"student"`` and, where this arm trained them, ``"teacher"``.
    """

    rows: Rows = field(default_factory=dict)
    teacher: Rows = field(default_factory=dict)
    bytes: dict[int, int] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    curves: dict[int, dict[str, LearningCurve]] = field(default_factory=dict)

    @property
    def hospitals(self) -> list[str]:
        """The hospitals in any seed."""
        return sorted({row.client for rows in self.rows.values() for row in rows})


def read_outcomes(jobs: Iterable[Job], split: Split = "test") -> dict[tuple[str, str, str], Outcome]:
    """Read what finished jobs left, by data set, teacher (empty where it does not matter) and arm.

    Args:
        jobs: the jobs; those that are not finished are left out.
        split: ``"test"``, or ``"val"`` for choices that must not see test images: the best round's rows.

    Raises:
        RunError: an images.csv, or the curves of a run, cannot be read.
    """
    outcomes: dict[tuple[str, str, str], Outcome] = {}
    for job in jobs:
        if not job.finished:
            continue
        outcome = outcomes.setdefault((job.data, job.teacher, job.arm), Outcome())
        table = ImageTable.read(job.run / "images.csv")
        arms = list(group_arms(table.latest("test") if split == "test" else _best(table)).values())
        federated = any(rows[0].arm == "federated" for rows in arms)
        for rows in arms:
            if federated and rows[0].arm == "local-only":  # a baseline that the run trained beside its own student
                continue
            (outcome.teacher if rows[0].model == "teacher" else outcome.rows)[job.seed] = rows
        outcome.bytes[job.seed] = sum(read_bytes(job.run / "ledger.csv").values())
        outcome.seconds[job.seed] = float(job.note().get("seconds", 0.0))
        outcome.curves[job.seed] = read_curves(job.run, table)
    return outcomes


def kept_rows(table: ImageTable) -> list[ImageRow]:
    """Return the rows of a finished run from which all tables are made: its test, and validation of the best round."""
    return [*_best(table), *table.latest("test")]


def _best(table: ImageTable) -> list[ImageRow]:
    """Return the validation rows of the round that was kept, of hospitals with students of their own each one's.

    It is the round that was tested. Where no row says which that was, it is the best by mean Dice; of hospitals alone,
    the best of each.
    """
    tested = {(row.model, row.arm, row.client): row.round for row in table.latest("test")}
    found = []
    for rows in group_arms(table.of("val")).values():
        own = {client: [row for row in rows if row.client == client] for client in sorted({row.client for row in rows})}
        for client, group in own.items():
            kept = tested.get((group[0].model, group[0].arm, client))
            if kept not in {row.round for row in group}:
                kept = _best_round(group if group[0].arm == "local-only" else rows)
            found += [row for row in group if row.round == kept]
    return found


def _best_round(rows: Sequence[ImageRow]) -> int:
    rounds = {row.round for row in rows}
    return max(rounds, key=lambda r: (summarize([row for row in rows if row.round == r]).mean.dice, -r))

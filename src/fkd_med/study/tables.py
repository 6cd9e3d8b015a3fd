"""The tables of a study: arms per cell, differences, students beside teachers, hospitals; and what is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fkd_med.evaluation.intervals import MIN_PATIENTS, Interval
from fkd_med.evaluation.sheet import Column, Sheet
from fkd_med.evaluation.summary import summarize
from fkd_med.evaluation.tables import human_bytes, number
from fkd_med.study.design import Difference, Study
from fkd_med.study.intervals import MIN_SEEDS, Samples, interval_of, mean_of, means_of_seeds, paired, samples
from fkd_med.study.jobs import Job
from fkd_med.study.outcome import Outcome, Rows

_INTERVALS = (
    "Intervals: 95 %, Student's t over the seeds, each of which deals patients, trains and tests anew; of one seed a "
    "bootstrap over the patients of each hospital, which says nothing of other seeds. Too few: fewer than "
    f"{MIN_PATIENTS} patients (of one seed also one alone in a hospital), or fewer than {MIN_SEEDS} seeds."
)


@dataclass(frozen=True)
class Tables:
    """Tables of what is there; what is not is left out and named in `missing`.

    Attributes:
        study: the design.
        jobs: the runs that were asked for.
        outcomes: what the finished ones came to, by data set, teacher and arm.
        split: the split that was scored, for the titles.
        asked: the cells that were asked for, as ``data/teacher``; None for all that the runs belong to.
    """

    study: Study
    jobs: Sequence[Job]
    outcomes: Mapping[tuple[str, str, str], Outcome]
    split: str = "test"
    asked: Sequence[str] | None = None

    @property
    def missing(self) -> list[str]:
        """The runs that are not finished."""
        return [job.name for job in self.jobs if not job.finished]

    def missing_by_arm(self) -> str:
        """Name the runs that are not finished for people, the seeds of an arm together."""
        seeds: dict[str, list[int]] = {}
        for name in self.missing:
            arm, _, seed = name.rpartition(" seed ")
            seeds.setdefault(arm, []).append(int(seed))
        return ", ".join(f"{arm} seed{'s' * (len(own) > 1)} {_in_short(own)}" for arm, own in seeds.items())

    def sheets(self) -> list[Sheet]:
        """Return all tables that have a row."""
        sheets = [self.arms(), self.differences(), self.teachers(), *map(self.hospitals, self.study.differences)]
        return [sheet for sheet in sheets if sheet.rows]

    def cells(self) -> list[tuple[str, str]]:
        """Return the cells asked for, data set and teacher, in the design's order.

        Of a data set whose teachers have runs, those that have none are left out: they would only repeat the others.
        """
        found = {(data, teacher) for (data, teacher, _), outcome in self.outcomes.items() if outcome.rows}
        bare = {data for data, teacher in found if not teacher}
        cells = [cell for cell in self.study.cells if self.asked is None or cell in self.asked]
        pairs = [tuple(cell.split("/")) for cell in cells]
        taught = {data for data, teacher in found if teacher}
        return [(d, t) for d, t in pairs if (d, t) in found or (d in bare and d not in taught)]

    def outcome(self, cell: tuple[str, str], arm: str) -> Outcome:
        """Return what an arm came to in a cell; one without rows where it is missing."""
        data, teacher = cell
        return self.outcomes.get((data, teacher if self.study.arms[arm].has_teacher else "", arm), Outcome())

    def of_cell(self, cell: tuple[str, str]) -> dict[str, Outcome]:
        """Return what every arm came to in a cell."""
        return {arm: self.outcome(cell, arm) for arm in self.study.arms}

    def arms(self) -> Sheet:
        """Return the scores of each arm in each cell."""
        columns = [Column("cell", left=True), Column("arm", left=True), Column("seeds")]
        columns += [Column("mean", group="Dice"), Column("95 %", group="Dice"), Column("IoU"), Column("HD95")]
        columns += [Column("worst hospital"), Column("sent"), Column("time")]
        rows: list[list[str]] = []
        sections = []
        for cell in self.cells():
            first = len(rows)
            for arm, design in self.study.arms.items():
                outcome = self.outcome(cell, arm)
                if outcome.rows:
                    name = self.name(cell) if len(rows) == first else ""
                    rows.append([name, design.label, *_scores(outcome.rows), *_costs(outcome)])
                if outcome.teacher:
                    rows.append(["", f"{design.label}: its teachers", *_scores(outcome.teacher), "", ""])
            sections.append(len(rows) - 1)
        notes = [
            _INTERVALS,
            "Worst hospital: its mean Dice, averaged over seeds. Sent: all hospitals, up and down. Time: with the "
            "training of teachers for the arm that needed them first, and attempts that were interrupted.",
        ]
        return Sheet(f"Arms on {self.split} images", columns, rows, notes, frozenset(sections[:-1]))

    def differences(self) -> Sheet:
        """Return the paired differences of each cell, in Dice points."""
        columns = [Column("cell", left=True), Column("difference", left=True), Column("seeds")]
        columns += [Column("points"), Column("95 %"), Column("by seed", left=True)]
        rows, shown = [], {}
        for cell in self.cells():
            for difference in self.study.differences:
                found = self.pairs(cell, difference)
                if found:
                    interval = interval_of(found)
                    each = ", ".join(f"{100 * mean:+.1f}" for mean in means_of_seeds(found).values())
                    shown[difference.label] = difference
                    numbers = [str(len(found)), f"{100 * interval.estimate:+.2f}", _bounds(interval, 100, "+.2f"), each]
                    rows.append([self.name(cell), difference.label, *numbers])
        notes = [f"{d.label}: {self.compared(d)}." for d in shown.values()]
        return Sheet("Differences in Dice points, image by image", columns, rows, [*notes, _INTERVALS])

    def pairs(self, cell: tuple[str, str], difference: Difference) -> Samples:
        """Return the differences of a cell by seed, hospital and patient; empty where an arm is missing."""
        base, other = self.outcome(cell, difference.over), self.outcome(cell, difference.of)
        if difference.model == "teacher":
            return paired(base.teacher, other.teacher)
        return paired(base.rows, other.rows)

    def compared(self, difference: Difference) -> str:
        """Say what a difference compares."""
        of, over = (self.study.arms[name].label for name in (difference.of, difference.over))
        whose = ", hospitals' teachers" if difference.model == "teacher" else ""
        return f"{of} minus {over}{whose}"

    def teachers(self) -> Sheet:
        """Return how each distilled student stands beside the teachers it learned from."""
        columns = [Column("cell", left=True), Column("arm", left=True), Column("seeds"), Column("teachers")]
        columns += [Column("student"), Column("student / teacher"), Column("paired points"), Column("95 %")]
        rows = []
        for cell in self.cells():
            for arm, design in self.study.arms.items():
                outcome = self.outcome(cell, arm)
                if outcome.teacher:
                    teacher, student = (mean_of(samples(r)) for r in (outcome.teacher, outcome.rows))
                    points = interval_of(paired(outcome.teacher, outcome.rows))
                    ratio = student / teacher if teacher else math.nan
                    shown = [number(teacher, 3), number(student, 3), f"{100 * ratio:.1f} %"]
                    shown += [f"{100 * points.estimate:+.2f}", _bounds(points, 100, "+.2f")]
                    rows.append([self.name(cell), design.label, str(len(outcome.teacher)), *shown])
        whose = (
            "Teachers: what each hospital's student learned from, on that hospital's images. Those that train on "
            "are as after the last round, beside the student of the round that was kept."
        )
        notes = [whose, _INTERVALS]
        return Sheet("Student beside teachers", columns, rows, notes)

    def hospitals(self, difference: Difference) -> Sheet:
        """Return a difference hospital by hospital: does anybody lose?"""
        columns = [Column("cell", left=True), Column("hospital", left=True), Column("seeds"), Column("images")]
        columns += [Column("patients"), Column("points"), Column("95 %")]
        rows = []
        for cell in self.cells():
            found = self.pairs(cell, difference)
            for hospital in sorted({name for of in found.values() for name in of}):
                interval = interval_of(found, hospital)
                seeds = sum(hospital in of for of in found.values())
                shown = [str(seeds), str(interval.n), str(interval.patients), f"{100 * interval.estimate:+.2f}"]
                shown.append(_bounds(interval, 100, "+.2f"))
                rows.append([self.name(cell), hospital, *shown])
        counts = "Images: of all seeds. Patients: different ones; where seeds share some, intervals are too narrow."
        notes = [counts, _INTERVALS]
        return Sheet(f"Hospital by hospital: {self.compared(difference)}, Dice points", columns, rows, notes)

    def name(self, cell: tuple[str, str]) -> str:
        """Return a cell's name for people."""
        return f"{self.study.data[cell[0]].label}, {self.study.teachers[cell[1]]}"


def _scores(rows: Rows) -> list[str]:
    """Return seeds, Dice with its interval, IoU, HD95 and the worst hospital's Dice as cells."""
    dice = interval_of(samples(rows))
    others = [mean_of(samples(rows, metric)) for metric in ("iou", "hd95")]
    worst = float(np.mean([summarize(kept).worst.dice for kept in rows.values()]))
    shown = [number(dice.estimate, 3), _bounds(dice, 1, ".3f"), number(others[0], 3), number(others[1], 1)]
    return [str(len(rows)), *shown, number(worst, 3)]


def _costs(outcome: Outcome) -> list[str]:
    sent, seconds = np.mean(list(outcome.bytes.values())), np.mean(list(outcome.seconds.values()))
    return [human_bytes(float(sent)) if sent else "–", f"{seconds / 60:.1f} min"]


def _in_short(seeds: Sequence[int]) -> str:
    """Return seeds in order, three and more in a row as first and last."""
    runs: list[list[int]] = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else " ".join(map(str, run)) for run in runs)


def _bounds(interval: Interval, scale: float, style: str) -> str:
    if math.isnan(interval.low):
        return "too few"
    return f"{scale * interval.low:{style}} to {scale * interval.high:{style}}"

"""Learning curves of the runs of a study: validation Dice after each round, and of teachers after each epoch."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from fkd_med.errors import RunError
from fkd_med.evaluation.history import read_curve
from fkd_med.evaluation.rows import ImageTable, group_arms
from fkd_med.files import atomic_write_text
from fkd_med.tracking.metrics_csv import read_metrics

LearningCurve = dict[int, float]
"""Round, or epoch where there are no rounds -> mean validation Dice of the hospitals."""

_KEPT = "curves.csv"
_COLUMNS = ("model", "step", "dice")
_DIGITS = 4


def read_curves(run: Path, table: ImageTable) -> dict[str, LearningCurve]:
    """Return the curves of a run: ``"student"``, and ``"teacher"`` where it was this run that trained the teachers.

    Args:
        run: the run's directory, or what `write_curves` left of it. Rows that were kept without curves have none.
        table: its images.csv.

    Raises:
        RunError: its curves cannot be read.
    """
    kept = run / _KEPT
    if kept.is_file():
        return _read_kept(kept)
    metrics = run / "metrics.csv"
    if not metrics.is_file():
        return {}
    curves: dict[str, LearningCurve] = {}
    for rows in group_arms(table.of("val")).values():
        curve = read_curve(rows, run / "ledger.csv") if rows[0].model != "teacher" else None
        if curve is not None:
            pairs = zip(curve.rounds, curve.mean, strict=True)
            curves["student"] = {step: round(dice, _DIGITS) for step, dice in pairs}
    teachers = _of_teachers(metrics)
    return curves | ({"teacher": teachers} if teachers else {})


def write_curves(curves: Mapping[str, LearningCurve], run: Path) -> None:
    """Write curves where `read_curves` finds them; nothing where there are none."""
    if not curves:
        return
    lines = [f"{model},{step},{dice}\n" for model, curve in curves.items() for step, dice in curve.items()]
    atomic_write_text(run / _KEPT, "".join([",".join(_COLUMNS) + "\n", *lines]))


def mean_curve(curves: Sequence[LearningCurve]) -> LearningCurve:
    """Return the mean over curves, at the steps that all of them have."""
    if not curves:
        return {}
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: sum(curve[step] for curve in curves) / len(curves) for step in steps}


def _of_teachers(metrics: Path) -> LearningCurve:
    """Return the mean over the hospitals' teachers."""
    each: dict[str, LearningCurve] = {}
    for step, name, value in read_metrics(metrics):
        if name.startswith("teacher/") and name.endswith("/val/dice"):
            each.setdefault(name, {})[step] = value
    return {step: round(dice, _DIGITS) for step, dice in mean_curve(list(each.values())).items()}


def _read_kept(path: Path) -> dict[str, LearningCurve]:
    curves: dict[str, LearningCurve] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                curves.setdefault(line["model"], {})[int(line["step"])] = float(line["dice"])
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise RunError(f"{path} cannot be read ({error!r}). Restore it, or delete it to do without curves.") from error
    return curves

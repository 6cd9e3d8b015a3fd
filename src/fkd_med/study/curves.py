"""Learning curves of the runs of a study: validation Dice after each round, and of teachers after each epoch."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from fkd_med.errors import RunError
from fkd_med.evaluation.rows import ImageRow, ImageTable, group_arms
from fkd_med.evaluation.summary import summarize
from fkd_med.files import atomic_write_text
from fkd_med.tracking.metrics_csv import read_metrics

LearningCurve = dict[int, float]
"""Round, or epoch where there are no rounds -> mean validation Dice of the hospitals."""

_KEPT = "curves.csv"
_COLUMNS = ("model", "step", "dice")
_DIGITS = 4


def read_curves(run: Path, table: ImageTable) -> dict[str, LearningCurve]:
    """Return the curves of a run: ``"student"``, and ``"teacher"`` where it trained the teachers of all its hospitals.

    Args:
        run: the run's directory, or what `write_curves` left of it. Rows that were kept without curves have none.
        table: its images.csv.

    Raises:
        RunError: its curves cannot be read.
    """
    metrics = run / "metrics.csv"
    if not metrics.is_file():
        return _read_kept(run / _KEPT)
    curves: dict[str, LearningCurve] = {}
    for rows in group_arms(table.of("val")).values():
        if rows[0].model != "teacher":
            rounds = sorted({row.round for row in rows})
            curves["student"] = {n: _mean_dice([row for row in rows if row.round == n]) for n in rounds}
    teachers = _of_teachers(metrics, {row.client for row in table.of("val")})
    return curves | ({"teacher": teachers} if teachers else {})


def _mean_dice(rows: Sequence[ImageRow]) -> float:
    return round(summarize(rows).mean.dice, _DIGITS)


def write_curves(curves: Mapping[str, LearningCurve], run: Path) -> None:
    """Write curves where `read_curves` finds them; those of models that are kept there already and not given stay."""
    merged = _read_kept(run / _KEPT) | dict(curves)
    if not merged:
        return
    lines = [f"{model},{step},{dice}\n" for model, curve in merged.items() for step, dice in curve.items()]
    atomic_write_text(run / _KEPT, "".join([",".join(_COLUMNS) + "\n", *lines]))


def mean_curve(curves: Sequence[LearningCurve]) -> LearningCurve:
    """Return the mean over curves, at the steps that all of them have."""
    if not curves:
        return {}
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: sum(curve[step] for curve in curves) / len(curves) for step in steps}


def _of_teachers(metrics: Path, hospitals: Set[str]) -> LearningCurve:
    """Return the mean over the hospitals' teachers; nothing where not all of them were trained by this run."""
    each: dict[str, LearningCurve] = {}
    for step, name, value in read_metrics(metrics):
        if name.startswith("teacher/") and name.endswith("/val/dice"):
            each.setdefault(name.removeprefix("teacher/").removesuffix("/val/dice"), {})[step] = value
    curve = mean_curve(list(each.values())) if each.keys() == hospitals else {}
    return {step: round(dice, _DIGITS) for step, dice in curve.items()}


def _read_kept(path: Path) -> dict[str, LearningCurve]:
    curves: dict[str, LearningCurve] = {}
    if not path.is_file():
        return curves
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                step, dice = int(line["step"]), float(line["dice"])
                if step < 1 or not 0 <= dice <= 1:
                    raise ValueError(f"step {step} with a Dice of {dice}")
                curves.setdefault(line["model"], {})[step] = dice
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise RunError(f"{path} cannot be read ({error!r}). Restore it, or delete it to do without curves.") from error
    return curves

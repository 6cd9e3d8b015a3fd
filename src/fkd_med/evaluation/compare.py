"""`fkd compare`: the arms of several runs side by side, from their images.csv.

An arm is one model trained one way in one run, such as the federated student. Every arm is compared with the
reference, the student of the first run, image by image.
"""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fkd_med.errors import RunError
from fkd_med.evaluation.history import read_curve
from fkd_med.evaluation.intervals import MIN_PATIENTS, Interval, Intervals, bootstrap_difference, bootstrap_mean
from fkd_med.evaluation.plots import Curve, plot_bytes, plot_rounds
from fkd_med.evaluation.rows import ImageRow, ImageTable, group_arms
from fkd_med.evaluation.same_images import read_hashes, unchanged
from fkd_med.evaluation.sheet import Column, Sheet
from fkd_med.evaluation.summary import Summary, summarize
from fkd_med.evaluation.tables import number
from fkd_med.files import atomic_write_text

MEAN = "mean of hospitals"


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison: its test rows, what they come to, and its validation curve if there is one."""

    name: str
    run: Path
    rows: list[ImageRow]
    summary: Summary
    dice: Intervals
    difference: Intervals | None
    curve: Curve | None

    def interval(self, hospital: str) -> Interval | None:
        """Return the interval of the Dice in a hospital or of `MEAN`."""
        return self.dice.mean if hospital == MEAN else self.dice.clients.get(hospital)

    def against_reference(self, hospital: str) -> Interval | None:
        """Return the interval of the Dice difference to the reference; None for the reference itself."""
        if self.difference is None:
            return None
        return self.difference.mean if hospital == MEAN else self.difference.clients.get(hospital)


@dataclass(frozen=True)
class Comparison:
    """Arms side by side.

    Attributes:
        arms: The arms, reference first.
        overview: One line per arm.
        details: Dice per hospital and arm with intervals and differences.
        files: What was written.
    """

    arms: list[Arm]
    overview: Sheet
    details: Sheet
    files: list[Path]


def compare(run_dirs: Sequence[Path], output: Path | None = None, seed: int = 0) -> Comparison:
    """Compare the arms of runs on their test images; a teacher that runs share is listed once.

    Args:
        run_dirs: Run directories; the first one holds the reference: its student, and not that of hospitals alone where
            it has both.
        output: Folder for compare.csv, compare.md and the plots; made when absent.
        seed: Seed of the bootstrap.

    Raises:
        RunError: If a run has no test rows, or an arm shares no image with the reference.
    """
    arms = _read_arms([Path(run) for run in run_dirs], seed)
    comparison = Comparison(arms, _overview(arms), _details(arms), [])
    return comparison if output is None else replace(comparison, files=_write(comparison, Path(output)))


def _read_arms(runs: Sequence[Path], seed: int) -> list[Arm]:
    if not runs:
        raise RunError("Nothing to compare: name one run directory or more, as in `fkd compare runs/a runs/b`.")
    if len({run.resolve() for run in runs}) < len(runs):
        raise RunError("A run directory is named twice; name each run once.")
    found: list[tuple[str, Path, list[ImageRow], Curve | None]] = []
    for run in runs:
        table = _read_table(run)
        for name, rows in group_arms(table.latest("test")).items():
            shared = rows[0].model == "teacher" and any(_same_scores(rows, other) for _, _, other, _ in found)
            if not shared:
                curve = read_curve(table.of("val", rows[0].model, rows[0].arm), run / "ledger.csv")
                found.append((name, run, rows, curve))
    names = _distinct([(name, run) for name, run, _, _ in found])
    first = _reference([(run, rows[0]) for _, run, rows, _ in found])
    order = [first, *(i for i in range(len(found)) if i != first)]
    hashes = {run: read_hashes(run / "manifest.csv") for run in runs}
    arms = []
    for i in order:
        _, run, rows, curve = found[i]
        difference = None
        if i != first:
            with _named(f"{names[i]} against {names[first]}"):
                same = unchanged(rows, hashes[found[first][1]], hashes[run])
                difference = bootstrap_difference(found[first][2], same, "dice", seed)
        arms.append(Arm(names[i], run, rows, summarize(rows), bootstrap_mean(rows, "dice", seed), difference, curve))
    return arms


def _read_table(run: Path) -> ImageTable:
    if not run.is_dir():
        raise RunError(f"{run} is not a folder; `fkd compare` takes run directories.")
    table = ImageTable.read(run / "images.csv")
    if not table.of("test"):
        raise RunError(
            f"{run / 'images.csv'} has no test rows: the run did not end with a test; run `fkd test` for it."
        )
    return table


def _same_scores(rows: list[ImageRow], other: list[ImageRow]) -> bool:
    return {replace(r, round=0) for r in rows} == {replace(r, round=0) for r in other}


def _distinct(arms: Sequence[tuple[str, Path]]) -> list[str]:
    """Add the run's folder to names that occur twice, and as many parents as it takes."""
    names = [name for name, _ in arms]
    labels = list(names)
    depth = 1
    while len(set(labels)) < len(labels):
        labels = [
            f"{name} ({'/'.join(run.resolve().parts[-depth:])})" if names.count(name) > 1 else name
            for name, run in arms
        ]
        depth += 1
    return labels


def _reference(arms: Sequence[tuple[Path, ImageRow]]) -> int:
    """Return which arm all others are compared with: a student of the first run that has one, a federated one first.

    The order of rows does not decide: an arm that is tested again stands last.
    """
    students = [i for i, (_, row) in enumerate(arms) if row.model != "teacher"] or [0]
    together = [i for i in students if arms[i][0] == arms[students[0]][0]]
    return min(together, key=lambda i: arms[i][1].arm == "local-only")


@contextmanager
def _named(pair: str) -> Iterator[None]:
    """Put the names of two arms before what is said of them inside the block."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    except RunError as error:
        raise RunError(f"{pair}: {error}") from None
    finally:
        for warning in caught:
            warnings.warn(f"{pair}: {warning.message}", stacklevel=3)


def _hospitals(arms: Sequence[Arm]) -> list[str]:
    return sorted({client for arm in arms for client in arm.summary.clients})


def _overview(arms: Sequence[Arm]) -> Sheet:
    columns = [Column("arm", left=True), Column("images")]
    columns += [Column(name, group="mean of hospitals") for name in ("Dice", "IoU", "HD95")]
    columns += [Column("Dice", group="worst hospital"), Column("", group="worst hospital", left=True), Column("empty")]
    rows = []
    for arm in arms:
        mean, worst = arm.summary.mean, arm.summary.worst
        scores = [number(mean.dice, 3), number(mean.iou, 3), number(mean.hd95, 1)]
        rows.append([arm.name, str(mean.n), *scores, number(worst.dice, 3), worst.name, str(mean.n_empty)])
    notes = ["empty: images where one mask lacks what the other shows; their HD95 is the image diagonal."]
    return Sheet("Arms on their test images", columns, rows, notes)


def _details(arms: Sequence[Arm]) -> Sheet:
    columns = [Column("hospital", left=True), Column("arm", left=True), Column("images"), Column("patients")]
    columns += [Column("mean", group="Dice"), Column("95 % interval", group="Dice")]
    against = "points, paired"
    columns += [Column("mean", group=against), Column("95 % interval", group=against), Column("", against, left=True)]
    rows: list[list[str]] = []
    sections = []
    for hospital in [*_hospitals(arms), MEAN]:
        before = len(rows)
        for arm in arms:
            interval = arm.interval(hospital)
            if interval is None:
                continue
            shown = [str(interval.n), str(interval.patients), number(interval.estimate, 3)]
            shown.append(_bounds(interval, 1, ".3f", "–"))
            name = hospital if len(rows) == before else ""
            rows.append([name, arm.name, *shown, *_points(arm, hospital)])
        sections.append(len(rows) - 1)
    notes = [
        f"Points: Dice x 100 minus that of {arms[0].name}, image by image; * where the 95 % interval excludes 0.",
        "Bootstrap over the patients of each hospital, each with all images: other such patients, the same hospitals "
        f"and weights. Too few: fewer than {MIN_PATIENTS} patients, or, for the mean, one alone in a hospital.",
    ]
    return Sheet("Dice per hospital", columns, rows, notes, frozenset(sections[:-1]))


def _points(arm: Arm, hospital: str) -> list[str]:
    difference = arm.against_reference(hospital)
    if difference is None:
        return ["", "reference" if arm.difference is None else "none in common", ""]
    mark = "*" if difference.excludes_zero else ""
    return [f"{100 * difference.estimate:+.2f}", _bounds(difference, 100, "+.2f", " to "), mark]


def _bounds(interval: Interval, scale: float, style: str, between: str) -> str:
    if math.isnan(interval.low):
        return "too few"
    return f"{scale * interval.low:{style}}{between}{scale * interval.high:{style}}"


def _write(comparison: Comparison, output: Path) -> list[Path]:
    atomic_write_text(output / "compare.csv", _csv(comparison.arms))
    curves = {arm.name: arm.curve for arm in comparison.arms if arm.curve and len(arm.curve.rounds) > 1}
    plots = []
    if curves:
        plots.append(output / "dice_over_rounds.png")
        plot_rounds(curves, plots[-1])
    if any(curve.megabytes for curve in curves.values()):
        plots.append(output / "dice_over_bytes.png")
        plot_bytes(curves, plots[-1])
    parts = [comparison.overview.to_markdown(), comparison.details.to_markdown()]
    parts += [f"![{plot.stem.replace('_', ' ')}]({plot.name})\n" for plot in plots]
    atomic_write_text(output / "compare.md", "\n".join(["# Comparison\n", *parts]))
    return [output / "compare.csv", output / "compare.md", *plots]


def _csv(arms: Sequence[Arm]) -> str:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    intervals = ["dice", "dice_low", "dice_high", "iou", "hd95", "n", "n_patients", "n_empty"]
    writer.writerow(
        ["hospital", "arm", "run", *intervals, "difference", "difference_low", "difference_high", "excludes_0"]
    )
    for hospital in [*_hospitals(arms), MEAN]:
        for arm in arms:
            interval, difference = arm.interval(hospital), arm.against_reference(hospital)
            if interval is None:
                continue
            group = arm.summary.mean if hospital == MEAN else arm.summary.clients[hospital]
            scores = [interval.estimate, interval.low, interval.high, group.iou, group.hd95]
            counts = [group.n, interval.patients, group.n_empty]
            row: list[object] = [hospital, arm.name, arm.run.name, *map(_blank, scores), *counts]
            if difference:
                row += [
                    *map(_blank, (difference.estimate, difference.low, difference.high)),
                    int(difference.excludes_zero),
                ]
            writer.writerow(row + [""] * (15 - len(row)))
    return buffer.getvalue()


def _blank(value: float) -> str:
    return "" if math.isnan(value) else repr(value)

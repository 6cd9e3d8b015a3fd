"""Bootstrap intervals: how far a mean, or the difference of two arms, could have come out otherwise.

Percentile bootstrap (Efron and Tibshirani 1993, chapters 13 and 15) of clusters (Davison and Hinkley 1997, section
3.8): inside each hospital, patients are drawn with replacement, each with all of its images, for images of one patient
resemble each other. An interval answers "other patients like these, of the same hospitals and the same trained
weights"; it says nothing about new hospitals or another training run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fkd_med.errors import RunError
from fkd_med.evaluation.rows import ImageRow
from fkd_med.seeding import derive_seed

# With five or fewer patients, even if all differences have one sign, a sign test stays above 5 %: no interval then.
MIN_PATIENTS = 6
_CHUNK = 2_000_000  # elements drawn at a time

Values = npt.NDArray[np.float64]
Patients = Mapping[str, Values]  # patient -> values of their images, (n,)


@dataclass(frozen=True)
class Interval:
    """A mean of `n` images with its percentile interval; `low` and `high` are NaN where `patients` are too few."""

    estimate: float
    low: float
    high: float
    n: int
    patients: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0 (False without an interval)."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Intervals:
    """Intervals per hospital and of the unweighted mean over hospitals."""

    clients: dict[str, Interval]
    mean: Interval


def bootstrap_mean(
    rows: Iterable[ImageRow], metric: str = "dice", seed: int = 0, draws: int = 10_000, level: float = 0.95
) -> Intervals:
    """Return intervals of a metric's mean for one arm.

    Args:
        rows: Rows of one model, arm and split; rows without the metric are left out.
        metric: ``"dice"``, ``"iou"`` or ``"hd95"``.
        seed: Seed of the draws; each hospital's draws depend on its name only, not on the other hospitals.
        draws: Bootstrap samples.
        level: Coverage, 0.95 for a 95 % interval.
    """
    scores = [(row, metric_of(row, metric)) for row in {r.key: r for r in rows}.values()]
    return stratified_bootstrap(by_patient(scores), seed, draws, level)


def bootstrap_difference(
    first: Iterable[ImageRow],
    second: Iterable[ImageRow],
    metric: str = "dice",
    seed: int = 0,
    draws: int = 10_000,
    level: float = 0.95,
) -> Intervals:
    """Return intervals of the mean of `second` minus `first`, paired image by image; patients are those of `second`.

    Images are matched by client and id; those that only one arm has are left out with a warning that counts them.

    Args:
        first: Rows of the reference arm, each image once.
        second: Rows of the other arm, each image once.
        metric: ``"dice"``, ``"iou"`` or ``"hd95"``.
        seed: Seed of the draws.
        draws: Bootstrap samples.
        level: Coverage.

    Raises:
        RunError: If the arms have no image in common.
    """
    ours, theirs = _by_image(first, metric), _by_image(second, metric)
    common = [key for key in ours if key in theirs]
    counts = f"{len(ours)} and {len(theirs)} scored images, {len(common)} of them in both"
    if not common:
        raise RunError(
            f"Arms without a common image cannot be paired: {counts}. Test both on the same data (data.manifest)."
        )
    if len(common) < max(len(ours), len(theirs)):
        warnings.warn(f"Paired differences use the common images only: {counts}.", stacklevel=2)
    differences = [(theirs[key][0], theirs[key][1] - ours[key][1]) for key in common]
    return stratified_bootstrap(by_patient(differences), seed, draws, level)


def stratified_bootstrap(
    values: Mapping[str, Patients], seed: int = 0, draws: int = 10_000, level: float = 0.95
) -> Intervals:
    """Bootstrap the mean of each hospital's values and the unweighted mean of these means.

    Args:
        values: Hospital -> patient -> values of their images, (n,).
        seed: Seed of the draws.
        draws: Bootstrap samples.
        level: Coverage.

    Raises:
        RunError: If there is no value.
    """
    if not values:
        raise RunError("No image was scored, so there is no interval: check the split and the metric.")
    means = {client: _resampled_means(values[client].values(), client, seed, draws) for client in sorted(values)}
    clients = {}
    for client, resampled in means.items():
        patients = list(values[client].values())
        estimate = mean_of_images(values[client])
        counts = sum(map(len, patients)), len(patients)
        clients[client] = _interval(estimate, resampled, *counts, len(patients) >= MIN_PATIENTS, level)
    images, total = (sum(counts) for counts in zip(*((i.n, i.patients) for i in clients.values()), strict=True))
    # A hospital with one patient shows no spread at all; the mean over hospitals would borrow its certainty.
    enough = total >= MIN_PATIENTS and min(i.patients for i in clients.values()) > 1
    estimate = math.fsum(i.estimate for i in clients.values()) / len(clients)
    return Intervals(clients, _interval(estimate, np.mean(list(means.values()), axis=0), images, total, enough, level))


def by_patient(scores: Iterable[tuple[ImageRow, float | None]]) -> dict[str, Patients]:
    """Return hospital -> patient -> values of their images, (n,); images without a value are left out."""
    found: dict[str, dict[str, list[float]]] = {}
    for row, value in scores:
        if value is not None:
            found.setdefault(row.client, {}).setdefault(row.patient, []).append(value)
    return {c: {p: np.asarray(v, dtype=np.float64) for p, v in own.items()} for c, own in found.items()}


def mean_of_images(patients: Patients) -> float:
    """Return the mean over all images of a hospital's patients."""
    return float(np.concatenate(list(patients.values())).mean())


def _resampled_means(patients: Collection[Values], client: str, seed: int, draws: int) -> Values:
    """Return the mean over images of as many patients as there are, drawn with replacement, `draws` times: (draws,)."""
    rng = np.random.default_rng(derive_seed("bootstrap", seed, client))
    sums, counts = np.array([v.sum() for v in patients]), np.array([len(v) for v in patients])
    step = max(1, _CHUNK // len(patients))
    chunks = []
    for start in range(0, draws, step):
        drawn = rng.integers(len(patients), size=(min(step, draws - start), len(patients)))
        chunks.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(chunks)


def _interval(estimate: float, means: Values, n: int, patients: int, enough: bool, level: float) -> Interval:
    if not enough:
        return Interval(estimate, math.nan, math.nan, n, patients)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), n, patients)


def _by_image(rows: Iterable[ImageRow], metric: str) -> dict[tuple[str, str], tuple[ImageRow, float]]:
    images: dict[tuple[str, str], tuple[ImageRow, float]] = {}
    for row in {r.key: r for r in rows}.values():
        value = metric_of(row, metric)
        if (row.client, row.id) in images:
            raise ValueError(f"client {row.client!r}, image {row.id!r} appears twice in one arm; choose one round")
        if value is not None:
            images[row.client, row.id] = row, value
    return images


def metric_of(row: ImageRow, metric: str) -> float | None:
    """Return an image's ``"dice"``, ``"iou"`` or ``"hd95"``; None where it was not computed."""
    return {"dice": row.dice, "iou": row.iou, "hd95": row.hd95}[metric]

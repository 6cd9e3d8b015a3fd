"""Intervals of a study: what another training, on other such patients, might have come to.

Several seeds: Student's t over the seeds' means. A seed deals patients, trains and tests anew, so the spread of these
means holds all of that; a bootstrap of so few would be far too narrow (of three seeds, 75 % for 95). Patients whom
several seeds test are the same ones, so for others the interval is too narrow still. One seed: the bootstrap over its
patients, of this one training (see `fkd_med.evaluation.intervals`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import stdtrit

from fkd_med.evaluation.intervals import (
    MIN_PATIENTS,
    Interval,
    Patients,
    by_patient,
    mean_of_images,
    metric_of,
    stratified_bootstrap,
)
from fkd_med.evaluation.rows import ImageRow

MIN_SEEDS = 3  # of two, a t interval goes 13 standard errors to each side: nothing is said

Samples = Mapping[int, Mapping[str, Patients]]  # seed -> hospital -> patient -> values, (n,)


def samples(rows: Mapping[int, Sequence[ImageRow]], metric: str = "dice") -> Samples:
    """Return a metric's values by seed, hospital and patient; images without it are left out."""
    return {seed: by_patient((row, metric_of(row, metric)) for row in kept) for seed, kept in rows.items()}


def paired(first: Mapping[int, Sequence[ImageRow]], second: Mapping[int, Sequence[ImageRow]]) -> Samples:
    """Return the Dice of `second` minus that of `first` image by image, for the seeds and images that both have.

    Warns where a seed's two arms were scored on different images: their data or splits were not the same.
    """
    found = {}
    for seed in sorted(first.keys() & second.keys()):
        base = {(row.client, row.id): row.dice for row in first[seed]}
        common = [(row, base[row.client, row.id]) for row in second[seed] if (row.client, row.id) in base]
        if not len(common) == len(base) == len(second[seed]):
            warnings.warn(
                f"seed {seed}: of {len(base)} images of one arm and {len(second[seed])} of the other, {len(common)} "
                "are in both; only these are compared. Were both arms given the same data?",
                stacklevel=2,
            )
        found[seed] = by_patient((row, row.dice - dice) for row, dice in common)
    return {seed: values for seed, values in found.items() if values}


def means_of_seeds(values: Samples, hospital: str | None = None) -> dict[int, float]:
    """Return each seed's unweighted mean over hospitals of the mean over images (or the mean of one hospital)."""
    return {
        seed: float(np.mean([mean_of_images(own) for own in of.values()]))
        for seed, of in _kept(values, hospital).items()
    }


def mean_of(values: Samples) -> float:
    """Return the mean over seeds; NaN without any."""
    means = list(means_of_seeds(values).values())
    return float(np.mean(means)) if means else math.nan


def interval_of(values: Samples, hospital: str | None = None, level: float = 0.95) -> Interval:
    """Return the mean over seeds of the mean over hospitals (or of one hospital), with its interval.

    Args:
        values: by seed, hospital and patient.
        hospital: only this one.
        level: coverage.

    Returns:
        The interval; its ends are NaN for two seeds and for fewer than six patients. It counts the images of all
        seeds, but a patient once.
    """
    kept = _kept(values, hospital)
    if len(kept) == 1:
        (of,) = kept.values()
        found = stratified_bootstrap(of, level=level)
        return found.mean if hospital is None else found.clients[hospital]
    means = list(means_of_seeds(values, hospital).values())
    images = sum(len(v) for of in kept.values() for own in of.values() for v in own.values())
    patients = len({(client, name) for of in kept.values() for client, own in of.items() for name in own})
    estimate = float(np.mean(means)) if means else math.nan
    if len(means) < MIN_SEEDS or patients < MIN_PATIENTS:
        return Interval(estimate, math.nan, math.nan, images, patients)
    error = float(np.std(means, ddof=1)) / math.sqrt(len(means))
    half = float(stdtrit(len(means) - 1, (1 + level) / 2)) * error
    return Interval(estimate, estimate - half, estimate + half, images, patients)


def _kept(values: Samples, hospital: str | None = None) -> dict[int, dict[str, Patients]]:
    kept = {s: {c: own for c, own in of.items() if hospital in (None, c) and own} for s, of in values.items()}
    return {seed: of for seed, of in kept.items() if of}

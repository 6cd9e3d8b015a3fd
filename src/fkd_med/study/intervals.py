"""Intervals over seeds and patients: what another training, tested on other such patients, might have come to.

A nested percentile bootstrap (Davison and Hinkley 1997, both levels with replacement): seeds are drawn with
replacement, and for each seed drawn the patients of each hospital, each with all of its images. Few seeds are a weak
sample of all seeds: of k seeds the spread between seeds comes out too small, by (k - 1) / k in variance, and that of
patients, which counts at both levels, too large, by up to 2 - 1 / k. Tables say so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from fkd_med.evaluation.intervals import (
    MIN_PATIENTS,
    Interval,
    Patients,
    Values,
    by_patient,
    metric_of,
    resampled_means,
)
from fkd_med.evaluation.rows import ImageRow
from fkd_med.seeding import derive_seed

# From so many seeds on, the spread between them stands for that of patients where a hospital has one to test a seed.
MIN_SEEDS = 3

Samples = Mapping[int, Mapping[str, Patients]]  # seed -> hospital -> the values of each patient, (n,) each


def samples(rows: Mapping[int, Sequence[ImageRow]], metric: str = "dice") -> Samples:
    """Return a metric's values by seed and hospital; images without it are left out."""
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


def nested_bootstrap(values: Samples, hospital: str | None = None, draws: int = 4000, level: float = 0.95) -> Interval:
    """Return the mean over seeds of the mean over hospitals (or of one hospital), with its interval.

    Args:
        values: by seed and hospital.
        hospital: only this one.
        draws: bootstrap samples.
        level: coverage.

    Returns:
        The interval; its ends are NaN where patients are too few: less than six in all, or, with one or two seeds, less
        than six in a seed or two in a hospital. Its counts are of all seeds, in each of which a patient is another.
    """
    kept = {s: {c: v for c, v in of.items() if hospital in (None, c) and len(v)} for s, of in values.items()}
    kept = {seed: of for seed, of in kept.items() if of}
    if not kept:
        return Interval(math.nan, math.nan, math.nan, 0, 0)
    estimate = float(np.mean([np.mean([np.concatenate(v).mean() for v in of.values()]) for of in kept.values()]))
    images = sum(len(v) for of in kept.values() for patients in of.values() for v in patients)
    counts = [[len(patients) for patients in of.values()] for of in kept.values()]
    total = sum(map(sum, counts))
    spread = min(map(sum, counts)) >= MIN_PATIENTS and min(map(min, counts)) > 1  # one patient has none to draw from
    if total < MIN_PATIENTS or not (spread or len(kept) >= MIN_SEEDS):
        return Interval(estimate, math.nan, math.nan, images, total)
    rng = np.random.default_rng(derive_seed("nested bootstrap", hospital or ""))
    seeds = sorted(kept)
    # (slot, seed, draw): the mean of a seed if it is drawn in that slot, from patients drawn for that slot
    resampled = np.stack([[_resampled(kept[seed], rng, draws) for seed in seeds] for _ in seeds])
    chosen = rng.integers(len(seeds), size=(len(seeds), draws))
    means = np.take_along_axis(resampled, chosen[:, None, :], axis=1)[:, 0].mean(axis=0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), images, total)


def _resampled(of: Mapping[str, Patients], rng: np.random.Generator, draws: int) -> Values:
    found: Values = np.mean([resampled_means(of[client], rng, draws) for client in sorted(of)], axis=0)
    return found

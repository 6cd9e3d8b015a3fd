"""Intervals over seeds and images: what another training, tested on other such images, might have come to.

A nested percentile bootstrap (Davison and Hinkley 1997, both levels with replacement): seeds are drawn with
replacement, and for each seed drawn the images of each hospital. Few seeds are a weak sample of all seeds: of k seeds
the spread between seeds comes out too small, by (k - 1) / k in variance, and that of images, which counts at both
levels, too large, by up to 2 - 1 / k. Images of one patient count as independent. Tables say so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from fkd_med.evaluation.intervals import MIN_IMAGES, Interval, Values, metric_of
from fkd_med.evaluation.rows import ImageRow
from fkd_med.seeding import derive_seed

Samples = Mapping[int, Mapping[str, Values]]  # seed -> hospital -> values, (n,)


def samples(rows: Mapping[int, Sequence[ImageRow]], metric: str = "dice") -> Samples:
    """Return a metric's values by seed and hospital; images without it are left out."""
    return {seed: _by_hospital([(r.client, metric_of(r, metric)) for r in kept]) for seed, kept in rows.items()}


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
        found[seed] = _by_hospital([(row.client, row.dice - dice) for row, dice in common])
    return {seed: values for seed, values in found.items() if values}


def nested_bootstrap(values: Samples, hospital: str | None = None, draws: int = 4000, level: float = 0.95) -> Interval:
    """Return the mean over seeds of the mean over hospitals (or of one hospital), with its interval.

    Args:
        values: by seed and hospital.
        hospital: only this one.
        draws: bootstrap samples.
        level: coverage.

    Returns:
        The interval; its ends are NaN where images are too few, `n` counts images of all seeds.
    """
    kept = {s: {c: v for c, v in of.items() if hospital in (None, c) and len(v)} for s, of in values.items()}
    kept = {seed: of for seed, of in kept.items() if of}
    if not kept:
        return Interval(math.nan, math.nan, math.nan, 0)
    estimate = float(np.mean([np.mean([v.mean() for v in of.values()]) for of in kept.values()]))
    count = sum(len(v) for of in kept.values() for v in of.values())
    few = min(sum(len(v) for v in of.values()) for of in kept.values()) < MIN_IMAGES
    if few or min(len(v) for of in kept.values() for v in of.values()) < 2:  # one image has no spread to draw from
        return Interval(estimate, math.nan, math.nan, count)
    rng = np.random.default_rng(derive_seed("nested bootstrap", hospital or ""))
    seeds = sorted(kept)
    # (slot, seed, draw): the mean of a seed if it is drawn in that slot, from images drawn for that slot
    resampled = np.stack([[_resampled(kept[seed], rng, draws) for seed in seeds] for _ in seeds])
    chosen = rng.integers(len(seeds), size=(len(seeds), draws))
    means = np.take_along_axis(resampled, chosen[:, None, :], axis=1)[:, 0].mean(axis=0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), count)


def _resampled(of: Mapping[str, Values], rng: np.random.Generator, draws: int) -> Values:
    means = [of[c][rng.integers(len(of[c]), size=(draws, len(of[c])))].mean(axis=1) for c in sorted(of)]
    found: Values = np.mean(means, axis=0)
    return found


def _by_hospital(pairs: Sequence[tuple[str, float | None]]) -> dict[str, Values]:
    found: dict[str, list[float]] = {}
    for client, value in pairs:
        if value is not None:
            found.setdefault(client, []).append(value)
    return {client: np.asarray(values, dtype=np.float64) for client, values in found.items()}

"""Bootstrap intervals: right size, seeded, stratified, paired."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest

from fkd_med.errors import RunError
from fkd_med.evaluation import ImageRow, bootstrap_difference, bootstrap_mean
from fkd_med.evaluation.intervals import stratified_bootstrap


def rows(values: dict[str, list[float]], arm: str = "federated", start: int = 0) -> list[ImageRow]:
    return [
        ImageRow("student", arm, "test", 0, client, f"i{i}", v, v / 2, None, "")
        for client, vs in values.items()
        for i, v in enumerate(vs, start=start)
    ]


def apart(values: np.ndarray) -> dict[str, np.ndarray]:
    """Each value as a patient's."""
    return {str(i): values[i : i + 1] for i in range(len(values))}


def test_interval_agrees_with_the_exact_bootstrap_distribution() -> None:
    values = [0.1, 0.4, 0.35, 0.8, 0.9, 0.55]
    exact = np.mean(list(itertools.product(values, repeat=6)), axis=1)  # all 46656 resamples
    interval = bootstrap_mean(rows({"a": values}), draws=40_000).clients["a"]
    assert interval.estimate == pytest.approx(np.mean(values)) and interval.n == 6
    assert interval.low == pytest.approx(np.quantile(exact, 0.025), abs=0.006)
    assert interval.high == pytest.approx(np.quantile(exact, 0.975), abs=0.006)


def test_mean_over_hospitals_is_stratified_and_unweighted() -> None:
    # Constant within hospitals, so resampling inside them changes nothing, whatever lies between them.
    intervals = bootstrap_mean(rows({"a": [0.2] * 8, "b": [0.6] * 80}))
    assert intervals.mean.low == intervals.mean.high == pytest.approx(0.4)
    rng = np.random.default_rng(0)
    spread = {"a": rng.normal(size=50), "b": rng.normal(size=20)}
    mean = stratified_bootstrap({c: apart(v) for c, v in spread.items()}, draws=20_000).mean
    error = math.sqrt(spread["a"].var() / 50 + spread["b"].var() / 20) / 2  # standard error of the mean of two means
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * error, rel=0.03)


def test_patients_are_drawn_with_all_their_images() -> None:
    values = [0.1, 0.4, 0.35, 0.8, 0.9, 0.55]
    frames = [
        ImageRow("student", "federated", "test", 0, "a", f"{i}/{j}", v, v / 2, None, "", f"video {i}")
        for i, v in enumerate(values)
        for j in range(10)
    ]
    one_each, videos = bootstrap_mean(rows({"a": values})).mean, bootstrap_mean(frames).mean
    assert (videos.n, videos.patients) == (60, 6) and (one_each.n, one_each.patients) == (6, 6)
    assert (videos.low, videos.high) == pytest.approx((one_each.low, one_each.high)), "frames alike tell nothing new"
    better = [replace(row, dice=row.dice + 0.02) for row in frames]
    assert bootstrap_difference(frames, better).mean.patients == 6
    few = bootstrap_mean(row for row in frames if row.patient != "video 0").mean
    assert few.n == 50 and math.isnan(few.low)


def test_patients_with_more_images_weigh_more() -> None:
    """Of 7 patients, one has half of the images: a draw without it is the others' mean, exactly."""
    own = {"p": np.full(6, 1.0), **apart(np.zeros(6))}
    interval = stratified_bootstrap({"a": own}, draws=40_000).clients["a"]
    shares = np.array([6 * k / (6 * k + 7 - k) for k in range(8)])  # it is drawn k times of 7
    chances = np.cumsum([math.comb(7, k) * 6 ** (7 - k) / 7**7 for k in range(8)])
    assert interval.estimate == pytest.approx(0.5) and interval.low == 0.0
    assert interval.high == pytest.approx(shares[np.searchsorted(chances, 0.975)])


def test_draws_depend_on_seed_and_hospital_only() -> None:
    values = {c: list(np.random.default_rng(i).random(30)) for i, c in enumerate("abc")}
    first, again = bootstrap_mean(rows(values)), bootstrap_mean(list(reversed(rows(dict(reversed(values.items()))))))
    assert first.clients["b"] == bootstrap_mean(rows({"b": values["b"]})).clients["b"]
    assert list(again.clients) == ["a", "b", "c"]
    assert first != bootstrap_mean(rows(values), seed=1)
    assert bootstrap_mean(rows(values)) == first


def test_paired_difference_by_id() -> None:
    rng = np.random.default_rng(3)
    base = {c: list(rng.random(25)) for c in "ab"}
    better = {c: [v + 0.02 + 0.001 * (i % 3) for i, v in enumerate(vs)] for c, vs in base.items()}
    shuffled = rows(better, "fkd")
    np.random.default_rng(0).shuffle(shuffled)  # type: ignore[arg-type]
    difference = bootstrap_difference(rows(base), shuffled)
    assert difference.mean.estimate == pytest.approx(0.02 + 0.001 * 24 / 25)
    assert difference.mean.excludes_zero and difference.mean.high < 0.0225  # unpaired, it would be 0.1 wide
    assert bootstrap_difference(rows(base), rows(base)).mean.excludes_zero is False
    worse = bootstrap_difference(shuffled, rows(base)).clients["a"]
    assert worse.high < 0 and worse.excludes_zero


def test_unpaired_images_are_counted() -> None:
    first, second = rows({"a": [0.5] * 10}), rows({"a": [0.6] * 10}, "fkd", start=4)
    with pytest.warns(UserWarning, match="10 and 10 scored images, 6 of them in both"):
        difference = bootstrap_difference(first, second)
    assert difference.mean.n == 6
    with pytest.raises(RunError, match="10 and 8 scored images, 0 of them in both"):
        bootstrap_difference(first, rows({"b": [0.5] * 8}, "fkd"))


def test_too_few_patients_give_no_interval() -> None:
    five = bootstrap_mean(rows({"a": [0.1, 0.2, 0.3, 0.4, 0.5]}))
    assert five.mean.estimate == pytest.approx(0.3) and math.isnan(five.mean.low) and not five.mean.excludes_zero
    uneven = bootstrap_mean(rows({"a": list(np.linspace(0, 1, 20)), "b": [0.5]}))
    assert not math.isnan(uneven.clients["a"].low) and math.isnan(uneven.mean.low)


def test_images_without_the_metric_are_left_out() -> None:
    with pytest.raises(RunError, match="No image was scored"):
        bootstrap_mean(rows({"a": [0.5] * 9}), metric="hd95")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bootstrap_mean(rows({"a": [0.5] * 9}), metric="iou").mean.estimate == 0.25

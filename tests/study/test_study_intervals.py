"""Intervals over seeds and images, against what is known exactly."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from study_rows import row

from fkd_med.study.intervals import nested_bootstrap, paired, samples


def test_with_constant_images_only_seeds_are_drawn() -> None:
    values = [0.1, 0.4, 0.7]
    exact = np.repeat(np.mean(list(itertools.product(values, repeat=3)), axis=1), 1000)  # no value between two
    interval = nested_bootstrap({seed: {"a": [np.full(1, v)] * 8} for seed, v in enumerate(values)}, draws=20_000)
    assert interval.estimate == pytest.approx(0.4) and interval.n == 24
    assert interval.low == pytest.approx(np.quantile(exact, 0.025))
    assert interval.high == pytest.approx(np.quantile(exact, 0.975))


def test_with_one_seed_only_images_are_drawn() -> None:
    values = np.array([0.1, 0.4, 0.35, 0.8, 0.9, 0.55])
    exact = np.mean(list(itertools.product(values, repeat=6)), axis=1)
    interval = nested_bootstrap({7: {"a": values[:, None]}}, draws=40_000)
    assert interval.low == pytest.approx(np.quantile(exact, 0.025), abs=0.006)
    assert interval.high == pytest.approx(np.quantile(exact, 0.975), abs=0.006)


def test_images_of_a_seed_are_drawn_anew_for_each_time_it_is_drawn() -> None:
    """Two seeds of the same spread: the mean of two independent draws has half the variance of one."""
    rng = np.random.default_rng(0)
    spread = rng.normal(size=200)
    patients = list((spread - spread.mean())[:, None])
    one = nested_bootstrap({0: {"a": patients}}, draws=20_000)
    two = nested_bootstrap({0: {"a": patients}, 1: {"a": patients}}, draws=20_000)
    assert (two.high - two.low) / (one.high - one.low) == pytest.approx(math.sqrt(0.5), abs=0.03)


def test_hospitals_count_alike_and_one_can_be_looked_at() -> None:
    of = {0: {"a": [np.full(10, 0.2)], "b": [np.full(50, 0.6)]}, 1: {"b": [np.full(20, 0.7), np.full(30, 13 / 15)]}}
    assert nested_bootstrap(of).estimate == pytest.approx((0.4 + 0.8) / 2)
    assert nested_bootstrap(of, "b").estimate == pytest.approx(0.7)
    assert (nested_bootstrap(of, "b").n, nested_bootstrap(of, "b").patients) == (100, 3)


def test_too_few_patients_have_no_interval_and_none_no_mean() -> None:
    one, nine = [np.array([0.1])], [np.full(1, 0.5)] * 9
    assert math.isnan(nested_bootstrap({0: {"a": nine, "b": one}}).low), "no spread in b"
    interval = nested_bootstrap({0: {"a": nine}, 1: {"a": [np.array([0.1]), np.array([0.2])]}})
    assert math.isnan(interval.low) and interval.estimate == pytest.approx((0.5 + 0.15) / 2)
    assert math.isnan(nested_bootstrap({}).estimate)


def test_seeds_stand_for_patients_where_a_hospital_tests_one_in_each() -> None:
    """Three videos a seed: their frames are no spread, the seeds are, and of five videos in all nothing is said."""
    of = {s: {c: [np.full(30, 0.1 * (s + i))] for i, c in enumerate("abc")} for s in range(3)}
    interval = nested_bootstrap(of)
    assert interval.patients == 9 and (interval.low, interval.high) == pytest.approx((0.1, 0.3))
    assert math.isnan(nested_bootstrap({s: of[s] for s in (0, 1)}).low)
    assert math.isnan(nested_bootstrap(of, "a").low), "three videos of it"


def test_pairs_are_of_the_same_seed_and_image() -> None:
    first = {0: [row(0.5, id="1"), row(0.6, id="2"), row(0.1, client="b", id="1")], 1: [row(0.3)]}
    second = {0: [row(0.9, id="2"), row(0.7, id="3"), row(0.4, client="b", id="1")], 2: [row(0.3)]}
    with pytest.warns(UserWarning, match="seed 0: of 3 images of one arm and 3 of the other, 2 are in both"):
        found = paired(first, second)
    assert list(found) == [0]
    assert {client: [values.tolist() for values in own] for client, own in found[0].items()} == {
        "a": [[pytest.approx(0.3)]], "b": [[pytest.approx(0.3)]],
    }  # fmt: skip


def test_images_without_a_metric_are_left_out() -> None:
    found = samples({0: [row(0.5, hd95=None), row(0.6, id="1", hd95=8.0)]}, "hd95")
    assert [values.tolist() for values in found[0]["a"]] == [[8.0]]

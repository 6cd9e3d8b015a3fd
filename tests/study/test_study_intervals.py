"""Intervals over seeds and patients, against what is known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from study_rows import row

from fkd_med.evaluation import bootstrap_mean
from fkd_med.study.intervals import interval_of, mean_of, means_of_seeds, paired, samples


def apart(*values: float) -> dict[str, np.ndarray]:
    """Each value as a patient's."""
    return {str(i): np.array([value]) for i, value in enumerate(values)}


def test_several_seeds_have_an_interval_of_student() -> None:
    """By hand: mean 0.4, deviation 0.3, t of 2 degrees of freedom 4.3027."""
    of = {seed: {"a": apart(*[value] * 8)} for seed, value in enumerate((0.1, 0.4, 0.7))}
    interval = interval_of(of)
    half = 4.302653 * 0.3 / math.sqrt(3)
    assert (interval.low, interval.estimate, interval.high) == pytest.approx((0.4 - half, 0.4, 0.4 + half), abs=1e-6)
    assert (interval.n, interval.patients) == (24, 8), "the same eight in each seed"
    assert interval_of(of, level=0.5).high == pytest.approx(0.4 + 0.816497 * 0.3 / math.sqrt(3), abs=1e-6)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Where each hospital tests one patient a seed, too: a bootstrap of three seeds does so in 75 of 100 cases."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        of = {s: {c: {f"{s}{c}": np.full(20, rng.normal())} for c in "abc"} for s in range(3)}
        interval = interval_of(of)
        hits += interval.low <= 0 <= interval.high
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


def test_one_seed_has_the_interval_of_compare() -> None:
    rows = [row(0.1 * (i % 7), id=str(i), patient=f"p{i // 2}") for i in range(20)]
    rows += [row(0.3 + 0.05 * i, client="b", id=str(i)) for i in range(9)]
    found, compared = samples({7: rows}), bootstrap_mean(rows)
    assert interval_of(found) == compared.mean and interval_of(found, "b") == compared.clients["b"]
    assert not math.isnan(compared.mean.low)


def test_hospitals_count_alike_and_one_can_be_looked_at() -> None:
    of = {
        0: {"a": {"p": np.full(10, 0.2)}, "b": {"q": np.full(50, 0.6)}},
        1: {"b": {"q": np.full(20, 0.7), "r": np.full(30, 13 / 15)}},
    }
    assert means_of_seeds(of) == {0: pytest.approx(0.4), 1: pytest.approx(0.8)}
    assert interval_of(of).estimate == mean_of(of) == pytest.approx(0.6)
    one = interval_of(of, "b")
    assert (one.estimate, one.n, one.patients) == (pytest.approx(0.7), 100, 2)


def test_too_few_have_no_interval_and_none_no_mean() -> None:
    nine, two = apart(*[0.5] * 9), apart(0.1, 0.2)
    assert math.isnan(interval_of({0: {"a": nine, "b": apart(0.1)}}).low), "no spread in b"
    interval = interval_of({0: {"a": nine}, 1: {"a": two}})
    assert math.isnan(interval.low) and interval.estimate == pytest.approx((0.5 + 0.15) / 2), "two seeds"
    same = interval_of({seed: {"a": apart(0.1, 0.2, 0.3 + seed)} for seed in range(5)})
    assert same.patients == 3 and math.isnan(same.low), "five seeds that test the same three patients"
    assert math.isnan(interval_of({}).estimate) and math.isnan(mean_of({}))


def test_pairs_are_of_the_same_seed_and_image() -> None:
    first = {0: [row(0.5, id="1"), row(0.6, id="2"), row(0.1, client="b", id="1")], 1: [row(0.3)]}
    second = {0: [row(0.9, id="2"), row(0.7, id="3"), row(0.4, client="b", id="1")], 2: [row(0.3)]}
    with pytest.warns(UserWarning, match="seed 0: of 3 images of one arm and 3 of the other, 2 are in both"):
        found = paired(first, second)
    assert list(found) == [0]
    assert {client: {name: values.tolist() for name, values in own.items()} for client, own in found[0].items()} == {
        "a": {"2": [pytest.approx(0.3)]}, "b": {"1": [pytest.approx(0.3)]},
    }  # fmt: skip


def test_images_without_a_metric_are_left_out() -> None:
    found = samples({0: [row(0.5, hd95=None), row(0.6, id="1", hd95=8.0)]}, "hd95")
    assert {name: values.tolist() for name, values in found[0]["a"].items()} == {"1": [8.0]}

"""Means per hospital, over hospitals and over images."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fkd_med.errors import RunError
from fkd_med.evaluation import ImageRow, summarize

ROW = ImageRow("student", "federated", "test", 3, "a", "1", 0.9, 0.8, 2.0, "")
ROWS = [
    ROW,
    replace(ROW, id="2", dice=0.7, iou=0.6, hd95=4.0),
    replace(ROW, id="3", dice=0.5, iou=0.4, hd95=12.0, empty="prediction"),
    replace(ROW, client="b", dice=0.2, iou=0.1, hd95=30.0),
    replace(ROW, client="c", dice=0.6, iou=0.05, hd95=50.0, empty="both"),
]


def test_means_by_hand() -> None:
    summary = summarize(ROWS)
    assert list(summary.clients) == ["a", "b", "c"]
    a = summary.clients["a"]
    assert (a.n, a.n_empty) == (3, 1)
    assert (a.dice, a.iou, a.hd95) == (pytest.approx(0.7), pytest.approx(0.6), pytest.approx(6.0))
    assert a.dice_sd == pytest.approx(0.2) and a.hd95_sd == pytest.approx(math.sqrt((16 + 4 + 36) / 2))
    assert math.isnan(summary.clients["b"].dice_sd)
    assert summary.mean.dice == pytest.approx((0.7 + 0.2 + 0.6) / 3)
    assert summary.mean.hd95 == pytest.approx((6 + 30 + 50) / 3)
    assert summary.pooled.dice == pytest.approx((0.9 + 0.7 + 0.5 + 0.2 + 0.6) / 5)
    assert (summary.n, summary.n_empty) == (5, 1)  # "both" has no diagonal in it


def test_worst_hospital_per_metric() -> None:
    summary = summarize(ROWS)
    assert summary.worst.name == "b" and summary.worst.dice == 0.2
    assert summary.worst_by("dice") == ("b", 0.2)
    assert summary.worst_by("iou") == ("c", 0.05)
    assert summary.worst_by("hd95") == ("c", 50.0)


def test_rows_written_twice_count_once() -> None:
    assert summarize([*ROWS, ROWS[0], ROWS[3]]) == summarize(ROWS)


def test_hd95_that_was_not_computed_is_nan() -> None:
    summary = summarize([replace(r, hd95=None) for r in ROWS])
    assert math.isnan(summary.mean.hd95) and summary.mean.dice == summarize(ROWS).mean.dice
    partly = summarize([replace(r, hd95=None) if r.client == "b" else r for r in ROWS])
    assert partly.mean.hd95 == pytest.approx((6 + 50) / 2) and partly.worst_by("hd95")[0] == "c"


def test_mixtures_are_refused() -> None:
    with pytest.raises(ValueError, match="several models"):
        summarize([ROW, replace(ROW, arm="local-only", id="9")])
    with pytest.raises(ValueError, match="two rounds"):
        summarize([ROW, replace(ROW, round=4)])
    with pytest.raises(RunError, match="No image was scored"):
        summarize([])

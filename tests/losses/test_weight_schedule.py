"""The ramp of a term's weight, by hand, and what it refuses."""

from __future__ import annotations

import math

import pytest

from fkd_med.errors import ConfigError
from fkd_med.losses import LogitKL, Ramp, WeightSchedule


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        (Ramp(), {0.0: 1.0, 0.25: 0.75, 0.5: 0.5, 1.0: 0.0}),
        (Ramp(first=0.5, last=2.0), {0.0: 0.5, 0.5: 1.25, 1.0: 2.0}),
        (Ramp(first=0.0, last=1.0, begin=0.2, end=0.6), {0.0: 0.0, 0.2: 0.0, 0.3: 0.25, 0.5: 0.75, 0.6: 1.0, 1.0: 1.0}),
        (Ramp(begin=0.5, end=0.5), {0.0: 1.0, 0.49: 1.0, 0.5: 0.0, 1.0: 0.0}),
        (Ramp(begin=0.0, end=0.0), {0.0: 0.0, 1.0: 0.0}),
        (Ramp(begin=1.0, end=1.0), {0.0: 1.0, 0.99: 1.0, 1.0: 0.0}),
        (Ramp(first=3.0, last=3.0), {0.0: 3.0, 0.3: 3.0, 1.0: 3.0}),
    ],
)
def test_ramp(ramp: Ramp, expected: dict[float, float]) -> None:
    assert {progress: ramp(progress) for progress in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"first": -0.1}, "first must be 0 or above"),
        ({"last": math.inf}, "last must be 0 or above"),
        ({"last": math.nan}, "last must be 0 or above"),
        ({"begin": 0.6, "end": 0.5}, "begin is 0.6 and end 0.5"),
        ({"begin": -0.1}, "0 <= begin"),
        ({"end": 1.1}, "end <= 1"),
        ({"begin": math.nan}, "begin is nan"),
    ],
)
def test_unusable_ramps_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Ramp(**settings)


def test_the_schedule_is_a_factor_of_the_weight() -> None:
    term = LogitKL(weight=4.0, schedule=Ramp(first=1.0, last=0.5))
    assert [term.weight_at(progress) for progress in (0.0, 0.5, 1.0)] == [4.0, 3.0, 2.0]
    assert term.weight == 4.0  # what decides whether the term is on
    assert LogitKL(weight=4.0).weight_at(0.3) == 4.0


def test_a_schedule_of_ones_own() -> None:
    class Pulse(WeightSchedule):
        def __call__(self, progress: float) -> float:
            return float(progress > 0.5)

    assert [LogitKL(weight=2.0, schedule=Pulse()).weight_at(p) for p in (0.2, 0.8)] == [0.0, 2.0]

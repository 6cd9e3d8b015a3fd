"""Arithmetic on states."""

from __future__ import annotations

import pytest
import torch

from fkd_med.aggregation import add, assert_finite, cast_like, identical, subtract
from fkd_med.errors import TrainingError


def test_a_delta_added_to_its_base_is_the_state_again() -> None:
    generator = torch.Generator().manual_seed(1)
    base = {"w": torch.randn(1000, generator=generator), "n": torch.tensor(5)}
    state = {"w": torch.randn(1000, generator=generator), "n": torch.tensor(9)}
    delta = subtract(state, base)
    assert all(tensor.dtype == torch.float64 for tensor in delta.values())
    assert identical(add(base, delta), state)


def test_integers_are_rounded_halves_to_even() -> None:
    like = {"n": torch.zeros(4, dtype=torch.int64)}
    assert cast_like({"n": torch.tensor([0.5, 1.5, -0.6, 2.4]).double()}, like)["n"].tolist() == [0, 2, -1, 2]


def test_identical_sees_every_bit() -> None:
    nan = {"w": torch.tensor([float("nan")])}
    assert identical(nan, {"w": nan["w"].clone()})
    assert identical({"w": torch.ones(2, 3).t()}, {"w": torch.ones(3, 2)})
    assert not identical({"w": torch.tensor(0.0)}, {"w": torch.tensor(-0.0)})
    assert not identical({"w": torch.zeros(2)}, {"w": torch.zeros(2, dtype=torch.int32)})
    assert not identical({"w": torch.zeros(2)}, {"w": torch.zeros(2, 1)})
    assert not identical({"w": torch.zeros(2)}, {})
    assert identical({"e": torch.zeros(0)}, {"e": torch.zeros(0)})


def test_finite_means_every_element_whatever_their_sum() -> None:
    inf, big = float("inf"), torch.finfo(torch.float64).max
    assert_finite(
        {"a": torch.full((9,), big, dtype=torch.float64), "b": torch.full((9,), 3e38), "n": torch.tensor(3)}, "x"
    )
    assert_finite({"half": torch.full((9,), 65504.0).half(), "empty": torch.zeros(0)}, "x")
    for bad in ([inf, -inf], [float("nan"), 1.0], [1.0, inf]):
        with pytest.raises(TrainingError, match="x: tensor 'w'"):
            assert_finite({"w": torch.tensor(bad)}, "x")

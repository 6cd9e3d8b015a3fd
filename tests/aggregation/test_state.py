"""Arithmetic on states."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fkd_med.aggregation import (
    add,
    assert_finite,
    cast_like,
    delta_norm,
    identical,
    is_buffer,
    parameter_names,
    subtract,
)
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


def test_parameters_are_told_from_statistics_by_name() -> None:
    norms = nn.ModuleDict({"a": nn.BatchNorm2d(3), "b": nn.InstanceNorm2d(3, affine=True, track_running_stats=True)})
    net = nn.Sequential(nn.Conv2d(3, 3, 1), norms["a"], nn.GroupNorm(1, 3), norms["b"])
    buffers = {name for name, _ in net.named_buffers()}
    assert {name for name in net.state_dict() if is_buffer(name)} == buffers
    assert parameter_names(net.state_dict()) == [name for name, _ in net.named_parameters()]
    assert parameter_names({"n": torch.tensor(3), "running_var": torch.ones(2), "w": torch.ones(2).half()}) == ["w"]
    assert not is_buffer("running_var.weight")


def test_the_norm_of_a_change_is_that_of_all_its_numbers() -> None:
    state = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor(5.0), "c": torch.zeros(0)}
    base = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor(1.0), "c": torch.zeros(0)}
    assert delta_norm(state, base, ["a", "b", "c"]) == 5.0
    assert delta_norm(state, base, ["a"]) == 3.0
    assert delta_norm(state, base, []) == 0.0
    far = {"w": torch.tensor([1e8 + 8, 1e8])}
    assert delta_norm(far, {"w": torch.tensor([1e8, 1e8])}, ["w"]) == 8.0

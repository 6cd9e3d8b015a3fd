"""The mean of many states: the same bits however its numbers are cut, and every bad number named."""

from __future__ import annotations

import math

import pytest
import torch

from fkd_med.aggregation import WeightedMean, delta_norm, identical
from fkd_med.aggregation.state import CHUNK
from fkd_med.communication import State
from fkd_med.errors import TrainingError

SIZES = {"a": (3,), "big": (2, CHUNK + 7), "b": (), "c": (5, 2), "exact": (CHUNK,), "empty": (0,), "d": (CHUNK - 1,)}


def a_state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(size, generator=generator) * 10.0 ** (seed % 3) for name, size in SIZES.items()}
    state["turned"] = torch.randn(40, 300, generator=generator).t()
    for name, dtype in {"half": torch.float16, "brain": torch.bfloat16, "double": torch.float64}.items():
        state[name] = torch.randn(33, generator=generator).to(dtype)
    return state | {"n": torch.tensor(2**53 + seed), "flag": torch.tensor([seed % 2 == 0]), "zero": torch.tensor(-0.0)}


def by_the_formula(states: list[State], weights: list[float]) -> State:
    """West's running mean, tensor by tensor, in torch."""
    mean = {name: tensor.double() for name, tensor in states[0].items()}
    total = weights[0]
    for state, weight in zip(states[1:], weights[1:], strict=True):
        total += weight
        for name, tensor in state.items():
            mean[name] = mean[name] + (tensor.double() - mean[name]) * (weight / total)
    return mean


@pytest.mark.parametrize("weights", [[1], [7, 100, 1, 33], [0.3, 2.7, 1 / 3]])
def test_the_bits_are_those_of_the_formula_tensor_by_tensor(weights: list[float]) -> None:
    states = [a_state(seed) for seed in range(len(weights))]
    mean = WeightedMean()
    for state, weight in zip(states, weights, strict=True):
        mean.add(state, weight)
    assert identical(mean.values(), by_the_formula(states, weights))
    assert all(identical(states[seed], a_state(seed)) for seed in range(len(states)))


def test_the_result_has_memory_of_its_own() -> None:
    mean = WeightedMean()
    mean.add(a_state(0), 1)
    result = mean.result(like=a_state(0))
    mean.add(a_state(1), 1)
    assert identical(result, a_state(0))
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in result.values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "at"), [("a", 2), ("big", 2 * CHUNK + 13), ("c", 0), ("exact", 5), ("half", 32)])
@pytest.mark.parametrize("which", [0, 1])
def test_every_bad_number_is_named(value: float, name: str, at: int, which: int) -> None:
    states = [a_state(0), a_state(1)]
    states[which][name].view(-1)[at] = value
    mean = WeightedMean()
    with pytest.raises(TrainingError, match=f"North: tensor '{name}' holds NaN or infinity"):
        for state in states:
            mean.add(state, 3, "North")


def test_infinities_that_cancel_are_found_and_large_numbers_are_none() -> None:
    mean = WeightedMean()
    big = torch.finfo(torch.float64).max
    mean.add({"w": torch.full((9,), big, dtype=torch.float64)}, 1)
    with pytest.raises(TrainingError, match="tensor 'w'"):
        mean.add({"w": torch.tensor([math.inf, -math.inf] + 7 * [0.0], dtype=torch.float64)}, 1)


def test_parameters_that_want_gradients_are_taken_as_numbers() -> None:
    mean = WeightedMean()
    mean.add(dict(torch.nn.Linear(2, 2).named_parameters()), 1)
    assert not any(tensor.requires_grad for tensor in mean.values().values())


def test_the_norm_of_large_tensors_has_the_bits_of_one_sum() -> None:
    state, base = a_state(1), a_state(2)
    for name in ("big", "exact", "turned", "half"):
        difference = (state[name].double() - base[name].double()).contiguous().numpy()
        assert delta_norm(state, base, [name]) == math.sqrt(float((difference * difference).sum()))

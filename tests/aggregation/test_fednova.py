"""FedNova against the paper's equations in float64 NumPy."""

from __future__ import annotations

import math

import pytest
import torch
from aggregation_cases import CLIENTS, PARAMETERS, a_state, an_update, assert_close, numbers, plain_mean, updates_of

from fkd_med.aggregation import FedAvg, FedNova
from fkd_med.communication import Broadcast, Update
from fkd_med.errors import TrainingError

START = Broadcast(1, a_state(99))


def test_several_rounds_are_those_of_the_paper() -> None:
    state = a_state(99)
    for round in range(1, 5):
        start = Broadcast(round, state)
        updates = updates_of(start)
        state = FedNova().aggregate(start, updates)
        shares = [u.num_examples / sum(v.num_examples for v in updates) for u in updates]
        a_norms = [u.extras["fednova"]["a_norm"].item() for u in updates]
        assert len(set(a_norms)) > 1
        tau = sum(p * a for p, a in zip(shares, a_norms, strict=True))
        for name, tensor in state.items():
            want = plain_mean(updates, name)
            if name in PARAMETERS:
                x = numbers(start.state[name])
                d = [(x - numbers(u.state[name])) / a for u, a in zip(updates, a_norms, strict=True)]
                want = x - tau * sum(p * d_i for p, d_i in zip(shares, d, strict=True))
            assert_close(tensor, want, name)


def test_a_client_with_more_steps_pulls_no_harder() -> None:
    """Two clients pull with unit gradient in opposite directions, one of them for three times as many steps."""
    start = Broadcast(1, {"w": torch.zeros(1)})
    updates = [
        Update("a", 1, 0, {"w": torch.tensor([3.0])}, 5, 3, {}, {"fednova": {"a_norm": torch.tensor(3.0)}}),
        Update("b", 1, 0, {"w": torch.tensor([-1.0])}, 5, 1, {}, {"fednova": {"a_norm": torch.tensor([1.0])}}),
    ]
    assert FedAvg().aggregate(start, updates)["w"].item() == 1.0
    assert FedNova().aggregate(start, updates)["w"].item() == 0.0


def test_equal_numbers_of_steps_are_federated_averaging() -> None:
    extras = {"fednova": {"a_norm": torch.tensor(7.0)}}
    updates = [an_update(START, i, extras=extras) for i in range(len(CLIENTS))]
    want = FedAvg().aggregate(START, updates)
    for name, tensor in FedNova().aggregate(START, updates).items():
        torch.testing.assert_close(tensor, want[name], rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("extras", "named"),
    [
        ({}, "section 'fednova' is missing"),
        ({"fednova": {}}, "'a_norm' is missing"),
        ({"fednova": {"a_norm": torch.tensor(1.0), "more": torch.tensor(1.0)}}, "'more' is not expected"),
        ({"fednova": {"a_norm": torch.ones(2)}}, r"'a_norm' is torch.float32 .2,"),
        ({"fednova": {"a_norm": torch.tensor(3)}}, "'a_norm' is torch.int64"),
        ({"fednova": {"a_norm": torch.tensor(math.nan)}}, "'a_norm' holds NaN"),
        ({"fednova": {"a_norm": torch.tensor(0.0)}}, "a_norm is 0.0"),
        ({"fednova": {"a_norm": torch.tensor(-2.0)}}, "a_norm is -2.0"),
    ],
)
def test_a_section_that_cannot_be_used_names_the_client(extras: dict[str, dict[str, torch.Tensor]], named: str) -> None:
    with pytest.raises(TrainingError, match=rf"Client 'c1', round 1.*{named}"):
        FedNova().aggregate(START, [an_update(START, 0), an_update(START, 1, extras=extras)])


def test_it_says_what_it_needs() -> None:
    assert FedNova.required_sections == {"fednova"}
    assert FedNova.down_sections == frozenset()

"""SCAFFOLD's server against Algorithm 1 in float64 NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from aggregation_cases import PARAMETERS, a_state, an_update, assert_close, numbers, plain_mean, stacked, updates_of

from fkd_med.aggregation import Scaffold
from fkd_med.communication import Broadcast
from fkd_med.errors import ConfigError, TrainingError

START = Broadcast(1, a_state(99))
PARTICIPANTS = ((0, 1, 2, 3, 4, 5, 6), (1, 4), (3,), (0, 2, 6))


def test_several_rounds_with_some_clients_are_those_of_the_paper() -> None:
    aggregator, state = Scaffold(server_lr=0.7), a_state(99)
    aggregator.begin(num_clients=7)
    c: dict[str, Any] = dict.fromkeys(PARAMETERS, 0.0)
    for round, members in enumerate(PARTICIPANTS, start=1):
        start = Broadcast(round, state, aggregator.broadcast_extras())
        updates = [an_update(start, index) for index in members]
        state = aggregator.aggregate(start, updates)
        for name, tensor in state.items():
            want = plain_mean(updates, name)
            if name in PARAMETERS:
                x = numbers(start.state[name])
                want = x + 0.7 / len(members) * (stacked(updates, name) - x).sum(axis=0)
                drift = np.mean([numbers(u.extras["scaffold"][name]) for u in updates], axis=0)
                c[name] = c[name] + len(members) / 7 * drift
            assert_close(tensor, want, name)
        sent = aggregator.broadcast_extras()["scaffold"]
        assert set(sent) == set(PARAMETERS)
        for name, tensor in sent.items():
            assert tensor.dtype == torch.float32
            np.testing.assert_allclose(numbers(aggregator.control[name]), c[name], rtol=1e-12, atol=1e-15)
            np.testing.assert_allclose(numbers(tensor), c[name], rtol=1e-6, atol=1e-9)


def test_nothing_goes_down_before_the_first_round() -> None:
    aggregator = Scaffold(clients=7)
    assert aggregator.broadcast_extras() == {}
    aggregator.aggregate(START, updates_of(START))
    assert aggregator.broadcast_extras().keys() == {"scaffold"} == Scaffold.down_sections == Scaffold.required_sections


def test_the_control_variate_stays_the_mean_of_all_clients() -> None:
    """With every client's own c_i kept by hand, c is their mean after every round, whoever took part."""
    aggregator, state = Scaffold(clients=7), a_state(99)
    own = np.zeros((7, 11))
    for round, members in enumerate(PARTICIPANTS, start=1):
        start = Broadcast(round, state)
        updates = [an_update(start, index) for index in members]
        state = aggregator.aggregate(start, updates)
        for index, update in zip(members, updates, strict=True):
            own[index] += numbers(update.extras["scaffold"]["precise"])
        np.testing.assert_allclose(numbers(aggregator.control["precise"]), own.mean(axis=0), atol=1e-15)


def test_what_was_sent_does_not_change_in_the_next_round() -> None:
    aggregator = Scaffold(clients=7)
    aggregator.aggregate(START, updates_of(START))
    sent = aggregator.broadcast_extras()["scaffold"]
    before = {name: tensor.clone() for name, tensor in sent.items()}
    aggregator.aggregate(START, updates_of(START))
    assert all(torch.equal(sent[name], before[name]) for name in sent)


def test_the_number_of_clients_must_be_known_and_large_enough() -> None:
    with pytest.raises(ConfigError, match="`clients`"):
        Scaffold().aggregate(START, updates_of(START))
    with pytest.raises(ConfigError, match=r"clients is 5.*there are 6"):
        Scaffold(clients=5).begin(6)
    with pytest.raises(TrainingError, match=r"7 clients sent updates, but there are 3"):
        Scaffold(clients=3).aggregate(START, updates_of(START))
    told = Scaffold(clients=20)
    told.begin(7)
    assert told.total == 20


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda e: e.pop("scaffold"), "section 'scaffold' is missing"),
        (lambda e: e["scaffold"].pop("precise"), "'precise' is missing"),
        (lambda e: e["scaffold"].update({"1.running_mean": torch.zeros(8)}), r"'1.running_mean' is not expected"),
        (lambda e: e["scaffold"].update(half=torch.zeros(6)), "'half' is torch.float32 .6,"),
        (lambda e: e["scaffold"]["half"].fill_(math.inf), "'half' holds NaN or infinity"),
    ],
)
def test_a_section_that_cannot_be_used_names_the_client_and_changes_nothing(change: Any, named: str) -> None:
    aggregator = Scaffold(clients=7)
    aggregator.aggregate(START, updates_of(START))
    before = aggregator.state_dict()
    updates = updates_of(START)
    change(updates[4].extras)
    with pytest.raises(TrainingError, match=rf"Client 'c4', round 1, .*{named}"):
        aggregator.aggregate(START, updates)
    assert all(aggregator.control[name] is before["control"][name] for name in PARAMETERS)

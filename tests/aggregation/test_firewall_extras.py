"""Lies in what a client rule adds to an update: set aside with client, section, tensor and reason."""

from __future__ import annotations

import math

import pytest
import torch

from fkd_med.aggregation import Aggregator, FedNova, Quarantine, Scaffold, parameter_names
from fkd_med.aggregation.firewall import Firewall, change_norm, extra_sizes
from fkd_med.communication import Broadcast, Extras, Update

STATE = {"w": torch.zeros(4, 3), "bn.running_mean": torch.zeros(3), "bn.num_batches_tracked": torch.tensor(0)}
BROADCAST = Broadcast(4, STATE)
STEPS = {"east": 8, "north": 400, "south": 60, "west": 30}  # honest clients may differ this much


def an_update(client: str, extras: Extras) -> Update:
    state = STATE | {"w": torch.full((4, 3), 0.1), "bn.num_batches_tracked": torch.tensor(STEPS[client])}
    return Update(client, 4, 0, state, 5, STEPS[client], {}, extras)


def nova(lie: float | None = None) -> list[Update]:
    """Honest updates under momentum 0.9, and what north says instead."""
    updates = []
    for client, steps in STEPS.items():
        a_norm = sum((1 - 0.9**k) / 0.1 for k in range(1, steps + 1))
        a_norm = a_norm if lie is None or client != "north" else lie
        updates.append(an_update(client, {"fednova": {"a_norm": torch.tensor(a_norm, dtype=torch.float64)}}))
    return updates


def drift(factor: float = 1.0) -> list[Update]:
    """Honest changes of control variates, and north's times a factor."""
    updates = []
    for place, client in enumerate(STEPS):
        size = 0.1 * (place + 1) * (factor if client == "north" else 1.0)
        section = {name: torch.full(STATE[name].shape, size) for name in parameter_names(STATE)}
        updates.append(an_update(client, {"scaffold": section}))
    return updates


def caught(updates: list[Update], aggregator: Aggregator, wall: Firewall | None = None) -> dict[str, Quarantine]:
    """What the gathering of a round does: each alone, then the rest beside each other."""
    wall = wall or Firewall()
    found = {u.client: q for u in updates if (q := wall.inspect(BROADCAST, u, aggregator)) is not None}
    rest = [update for update in updates if update.client not in found]
    norms = {update.client: change_norm(BROADCAST, update) for update in rest}
    return found | wall.inspect_round(norms, 4, {update.client: extra_sizes(update) for update in rest})


def test_honest_extras_pass_however_unequal_the_clients() -> None:
    assert caught(nova(), FedNova()) == {}
    assert caught(drift(), Scaffold()) == {}


@pytest.mark.parametrize(("lie", "reason"), [
    (1e30, "is 1e+30, and 400 steps can only make"),
    (1e-30, "is 1e-30, and 400 steps can only make"),
    (0.0, "is 0, and it is a sum of positive numbers"),
    (-7.0, "is -7, and it is a sum of positive numbers"),
    (math.nan, "holds NaN or infinity"),
    (math.inf, "holds NaN or infinity"),
    (5e6, "has the size 5e+06, more than 100 times above the median of the other 3 clients"),
    (0.5, "has the size 0.5, more than 100 times below the median of the other 3 clients"),
])  # fmt: skip
def test_a_lie_about_local_work_is_set_aside(lie: float, reason: str) -> None:
    found = caught(nova(lie), FedNova())
    assert found.keys() == {"north"}
    assert (found["north"].client, found["north"].round, found["north"].tensor) == ("north", 4, "fednova/a_norm")
    assert reason in found["north"].reason


@pytest.mark.parametrize("lie", [1e30, 1e-30])
def test_what_no_training_makes_is_seen_without_others(lie: float) -> None:
    (update,) = [update for update in nova(lie) if update.client == "north"]
    assert caught([update], FedNova()).keys() == {"north"}


def test_one_step_may_have_any_rate_of_a_schedule() -> None:
    for a_norm in (1e-6, 1.0, 25.0):
        update = Update("east", 4, 0, STATE, 5, 1, {}, {"fednova": {"a_norm": torch.tensor([a_norm])}})
        assert Firewall().inspect(BROADCAST, update, FedNova()) is None


@pytest.mark.parametrize(("factor", "is_caught"), [(1e6, True), (-1e6, True), (1e3, True), (50.0, False), (0.0, False)])
def test_a_control_variate_too_large_is_set_aside(factor: float, is_caught: bool) -> None:
    found = caught(drift(factor), Scaffold())
    assert found.keys() == ({"north"} if is_caught else set())
    if is_caught:
        assert found["north"].tensor == "scaffold"
        assert "more than 100 times above the median of the other 3 clients, 1.039" in found["north"].reason
        assert found["north"].text.startswith("Client 'north', round 4: tensor 'scaffold' has the size ")


def test_the_factor_for_extras_is_the_square_and_can_be_switched_off() -> None:
    assert caught(drift(50.0), Scaffold(), Firewall(median_factor=3)).keys() == {"north"}
    assert caught(drift(1e6), Scaffold(), Firewall(median_factor=None)) == {}
    assert caught(drift(1e6)[:2], Scaffold()) == {}  # of two, who is to say which one lies?


@pytest.mark.parametrize(("aggregator", "extras", "tensor", "reason"), [
    (Scaffold(), {"scaffold": {"w": torch.zeros(4, 4)}}, "scaffold/w", "is torch.float32 (4, 4) where"),
    (Scaffold(), {"scaffold": {"w": torch.zeros(4, 3), "v": torch.zeros(2)}}, "scaffold/v", "is not expected"),
    (Scaffold(), {"scaffold": {"v": torch.zeros(2)}}, "scaffold/v", "is not expected"),
    (Scaffold(), {"scaffold": {"w": torch.full((4, 3), 1e300, dtype=torch.float64)}}, "scaffold", "can be measured"),
    (FedNova(), {"fednova": {"a_norm": torch.zeros(3)}}, "fednova/a_norm", "is torch.float32 (3,) where"),
    (FedNova(), {"fednova": {"a_norm": torch.tensor(3)}}, "fednova/a_norm", "is torch.int64 () where"),
    (FedNova(), {"fednova": {"b": torch.tensor(3.0)}}, "fednova/a_norm", "is missing"),
])  # fmt: skip
def test_sections_the_aggregator_cannot_use_are_set_aside(
    aggregator: Aggregator, extras: Extras, tensor: str, reason: str
) -> None:
    found = Firewall().inspect(BROADCAST, an_update("north", extras), aggregator)
    assert found is not None
    assert found.tensor == tensor
    assert reason in found.reason

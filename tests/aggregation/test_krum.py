"""Krum and Multi-Krum against a plain loop in NumPy, and what they are for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from aggregation_cases import CLIENTS, PARAMETERS, a_state, assert_close, numbers, stacked, updates_of

from fkd_med.aggregation import Krum, MultiKrum, identical
from fkd_med.communication import Broadcast, State, Update
from fkd_med.errors import TrainingError

START = Broadcast(1, a_state(99))


def ranking(updates: list[Update], f: int) -> list[int]:
    """Blanchard et al., 2017, section 3: clients by the sum of squared distances to their n - f - 2 nearest."""
    vectors = [np.concatenate([numbers(u.state[name]).ravel() for name in PARAMETERS]) for u in updates]
    scores = []
    for i, vector in enumerate(vectors):
        others = sorted(float(np.sum((vector - other) ** 2)) for j, other in enumerate(vectors) if j != i)
        scores.append(sum(others[: len(vectors) - f - 2]))
    return sorted(range(len(vectors)), key=lambda i: scores[i])


@pytest.mark.parametrize("f", [0, 1, 2])
@pytest.mark.parametrize("round", range(1, 6))
def test_krum_takes_the_parameters_of_the_best_score(f: int, round: int) -> None:
    start = Broadcast(round, a_state(99))
    updates = updates_of(start)
    best = updates[ranking(updates, f)[0]]
    got = Krum(f).aggregate(start, updates)
    assert identical({n: got[n] for n in PARAMETERS}, {n: best.state[n] for n in PARAMETERS})


@pytest.mark.parametrize(("f", "keep", "kept"), [(1, None, 6), (2, None, 5), (2, 3, 3), (0, 7, 7), (1, 1, 1)])
def test_multi_krum_averages_the_best(f: int, keep: int | None, kept: int) -> None:
    updates = updates_of(START)
    chosen = [updates[i] for i in ranking(updates, f)[:kept]]
    for name, tensor in MultiKrum(f, keep).aggregate(START, updates).items():
        taken, rule = (chosen, np.mean) if name in PARAMETERS else (updates, np.median)
        assert_close(tensor, rule(stacked(taken, name), axis=0), name)


def test_two_liars_who_agree_are_not_chosen() -> None:
    updates = updates_of(START)
    for liar in updates[:2]:
        for name in PARAMETERS:
            liar.state[name].copy_(START.state[name] - 40 * (updates[2].state[name] - START.state[name]))
    honest = [{n: u.state[n] for n in PARAMETERS} for u in updates[2:]]
    got = Krum(2).aggregate(START, updates)
    assert any(identical({n: got[n] for n in PARAMETERS}, state) for state in honest)
    for name, tensor in MultiKrum(2).aggregate(START, updates).items():
        if name in PARAMETERS:
            assert_close(tensor, np.mean(stacked(updates[2:], name), axis=0), name)


def test_statistics_of_a_client_with_good_parameters_are_not_believed() -> None:
    updates = updates_of(START)
    best = updates[ranking(updates, 2)[0]]
    best.state["1.running_var"].fill_(1e30)
    got = Krum(2).aggregate(START, updates)
    assert torch.equal(got["0.weight"], best.state["0.weight"])
    assert (got["1.running_var"] < 10).all()


def line(values: list[float]) -> tuple[Broadcast, list[Update]]:
    like: State = {"w": torch.zeros(1)}
    return Broadcast(1, like), [Update(c, 1, 0, {"w": torch.tensor([v])}, 1, 1) for c, v in zip("abcdefg", values)]  # noqa: B905


def test_distances_do_not_cancel_far_from_zero() -> None:
    """Around 4096 a float32 square has steps of 1 to 2: the expanded form sees no distance at all."""
    values = [4096 + d for d in (0.0, 0.0625, 0.09375, 0.125, 9.0)]
    start, updates = line(values)
    assert Krum(1).aggregate(start, updates)["w"].item() == 4096.09375


def test_squares_of_large_numbers_do_not_overflow() -> None:
    start, updates = line([0.0, 1e25, 1.5e25, 1.7e25, 1.8e25])  # float32 squares would all be infinite, a tie
    assert Krum(1).aggregate(start, updates)["w"].item() == pytest.approx(1.7e25)


def test_a_tie_goes_to_the_first_name() -> None:
    start, updates = line([0.0, 1.0, 2.0, 3.0, 4.0])  # scores with two neighbours: 5, 2, 2, 2, 5
    assert Krum(1).aggregate(start, updates)["w"].item() == 1.0
    assert Krum(1).aggregate(start, updates[::-1])["w"].item() == 1.0


@pytest.mark.parametrize(("make", "count", "needed"), [(Krum, 4, 5), (MultiKrum, 4, 5), (Krum, 1, 5)])
def test_too_few_updates_are_refused_with_numbers(make: Any, count: int, needed: int) -> None:
    pattern = rf"Round 1: {make.__name__} with byzantine 1 needs {needed} updates, but {count} came"
    with pytest.raises(TrainingError, match=pattern):
        make(1).aggregate(START, updates_of(START)[:count])
    make(1).aggregate(START, updates_of(START)[:needed])


def test_keeping_more_than_can_be_honest_is_refused() -> None:
    with pytest.raises(TrainingError, match=rf"keeps 6 of {len(CLIENTS)} updates, of which 2 may lie.*5 at most"):
        MultiKrum(2, keep=6).aggregate(START, updates_of(START))


def test_a_liar_that_was_set_aside_need_not_be_found_again() -> None:
    start, updates = line([0.0, 1.0, 2.0, 4.0])
    rule = MultiKrum(1)
    with pytest.raises(TrainingError, match="needs 5 updates, but 4 came"):
        rule.aggregate(start, updates)
    rule.set_aside(1)  # one came and was refused: of the four others nobody lies
    assert rule.aggregate(start, updates)["w"].item() == pytest.approx(1.75)
    rule.set_aside(0)  # in the next round all five may lie again
    with pytest.raises(TrainingError, match="needs 5 updates, but 4 came"):
        rule.aggregate(start, updates)

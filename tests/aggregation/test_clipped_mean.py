"""The mean of clipped updates against NumPy, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from aggregation_cases import (
    COUNTER,
    COUNTS,
    PARAMETERS,
    STATISTICS,
    Lazy,
    a_state,
    an_update,
    assert_close,
    numbers,
    plain_mean,
    updates_of,
)

from fkd_med.aggregation import FedAvg, NormClippedMean, identical
from fkd_med.communication import Broadcast, State, Update

START = Broadcast(1, a_state(99))


def norm(state: State, start: State, names: tuple[str, ...]) -> float:
    return float(np.linalg.norm(np.concatenate([(numbers(state[n]) - numbers(start[n])).ravel() for n in names])))


@pytest.mark.parametrize("max_norm", [None, 0.4, 0.95])
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_several_rounds_are_those_of_the_rule(max_norm: float | None, weighting: str) -> None:
    state = a_state(99)
    aggregator = NormClippedMean(max_norm, "uniform" if weighting == "uniform" else "examples")
    weights = np.array(COUNTS) if weighting == "examples" else np.ones(len(COUNTS))
    for round in range(1, 5):
        start = Broadcast(round, state)
        updates = updates_of(start)
        state = aggregator.aggregate(start, updates)
        norms = {g: [norm(u.state, start.state, g) for u in updates] for g in (PARAMETERS, STATISTICS)}
        limits = {PARAMETERS: max_norm or np.median(norms[PARAMETERS]), STATISTICS: np.median(norms[STATISTICS])}
        for group in (PARAMETERS, STATISTICS):
            scales = [min(1.0, limits[group] / n) for n in norms[group]]
            for name in group:
                x = numbers(start.state[name])
                moves = np.stack([s * (numbers(u.state[name]) - x) for s, u in zip(scales, updates, strict=True)])
                assert_close(state[name], x + np.average(moves, axis=0, weights=weights), name)
        assert_close(state[COUNTER], np.average([u.state[COUNTER] for u in updates], weights=weights), COUNTER)


def test_a_wide_norm_is_federated_averaging_of_the_parameters_bit_for_bit() -> None:
    want, got = (a.aggregate(START, updates_of(START)) for a in (FedAvg(), NormClippedMean(max_norm=1e9)))
    assert identical({n: got[n] for n in PARAMETERS}, {n: want[n] for n in PARAMETERS})


def test_clients_that_did_not_move_divide_by_nothing() -> None:
    updates = [an_update(START, i, state=START.state) for i in range(3)]
    assert identical(NormClippedMean().aggregate(START, updates), START.state)
    assert identical(NormClippedMean(max_norm=1.0).aggregate(START, updates), START.state)
    mostly = [*updates, an_update(START, 3)]  # the median is 0: nobody may move
    got = NormClippedMean().aggregate(START, mostly)
    assert identical({n: got[n] for n in PARAMETERS}, {n: START.state[n] for n in PARAMETERS})


def test_one_client_alone_is_the_identity() -> None:
    update = an_update(START, 2)
    assert identical(NormClippedMean().aggregate(START, [update]), update.state)


def test_a_liar_moves_the_mean_no_further_than_the_norm() -> None:
    updates = updates_of(START)
    liar = updates[6]
    for name in (*PARAMETERS, *STATISTICS):
        liar.state[name].fill_(6e4)
    got = NormClippedMean(weighting="uniform").aggregate(START, updates)
    for group in (PARAMETERS, STATISTICS):
        largest = float(np.median([norm(u.state, START.state, group) for u in updates]))
        assert norm(got, START.state, group) <= largest * (1 + 1e-3)
    assert np.abs(plain_mean(updates, "0.weight")).max() > 1000


def test_the_norm_is_over_all_parameters_together() -> None:
    start = Broadcast(1, {"a": torch.zeros(1), "b": torch.zeros(1)})
    update = Update("x", 1, 0, {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, 1, 1)
    got = NormClippedMean(max_norm=1.0).aggregate(start, [update])
    assert [got["a"].item(), got["b"].item()] == pytest.approx([0.6, 0.8])


def test_updates_are_read_twice() -> None:
    lazy = Lazy(START)
    NormClippedMean().aggregate(START, lazy)
    assert lazy.passes == 2

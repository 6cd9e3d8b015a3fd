"""What every aggregator promises, whatever its rule."""

from __future__ import annotations

import math
import random

import pytest
import torch
from aggregation_cases import (
    CLIENTS,
    COUNTER,
    EVERY,
    PARAMETERS,
    REMEMBERING,
    STATISTICS,
    Lazy,
    a_state,
    an_update,
    assert_close,
    numbers,
    run,
    through_a_file,
    updates_of,
)

from fkd_med.aggregation import FedAdam, FedAvg, FedAvgM, identical
from fkd_med.communication import AllowList, Broadcast, Update
from fkd_med.errors import RunError, TrainingError

every = pytest.mark.parametrize("name", EVERY)
START = Broadcast(1, a_state(99))


@every
def test_the_result_is_a_state_of_the_same_student(name: str) -> None:
    got = EVERY[name]().aggregate(START, updates_of(START))
    assert list(got) == list(START.state)
    assert all(got[n].shape == t.shape and got[n].dtype == t.dtype for n, t in START.state.items())
    assert all(t.isfinite().all() for t in got.values())
    assert not identical(got, START.state)


@every
def test_the_order_of_clients_changes_no_bit(name: str) -> None:
    first = EVERY[name]().aggregate(START, updates_of(START))
    for seed in range(5):
        updates = updates_of(START)
        random.Random(seed).shuffle(updates)
        assert identical(first, EVERY[name]().aggregate(START, updates))


@every
def test_scaling_all_weights_changes_no_bit(name: str) -> None:
    scaled = [an_update(START, i, num_examples=4 * u.num_examples) for i, u in enumerate(updates_of(START))]
    assert identical(EVERY[name]().aggregate(START, updates_of(START)), EVERY[name]().aggregate(START, scaled))


@every
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    state = {"w": torch.randn(33_001), "bn.running_var": torch.rand(9)}
    start = Broadcast(1, state)
    extras = {"scaffold": {"w": torch.randn(33_001)}, "fednova": {"a_norm": torch.tensor(3.0)}}
    updates = [
        Update(c, 1, 0, {n: t + 0.1 * torch.rand(t.shape) for n, t in state.items()}, i + 1, 1, {}, extras)
        for i, c in enumerate(CLIENTS)
    ]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(EVERY[name]().aggregate(start, updates))
    finally:
        torch.set_num_threads(before)
    assert identical(results[0], results[1])
    assert identical(results[0], results[2])


@every
def test_lazy_updates_give_the_same_bits_with_one_in_memory(name: str) -> None:
    lazy = Lazy(START)
    got = EVERY[name]().aggregate(START, lazy)
    assert identical(got, EVERY[name]().aggregate(START, updates_of(START)))
    assert lazy.most <= 2  # the one in hand, and the next one while it is made
    assert lazy.alive == 0


@every
def test_inputs_are_left_alone(name: str) -> None:
    start, updates = Broadcast(1, a_state(99)), updates_of(START)
    aggregator = EVERY[name]()
    for _ in range(2):
        aggregator.aggregate(start, updates)
    assert identical(start.state, a_state(99))
    assert all(identical(u.state, v.state) for u, v in zip(updates, updates_of(START), strict=True))
    for u, v in zip(updates, updates_of(START), strict=True):
        assert all(identical(u.extras[section], v.extras[section]) for section in v.extras)


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("FedAdam", "FedYogi", "FedAdagrad")])
def test_equal_updates_are_that_update_in_the_first_round(name: str) -> None:
    one = an_update(START, 0)
    extras = one.extras | {"fednova": {"a_norm": torch.tensor(7.0)}}
    updates = [Update(c, 1, 0, one.state, 3 + i, 1, {}, extras) for i, c in enumerate(CLIENTS)]
    if "absolute" in name:
        updates = [Update(u.client, 1, 0, START.state, u.num_examples, 1) for u in updates]
    got = EVERY[name]().aggregate(START, updates)
    factor = 1.9 if name == "Nesterov" else 1.0  # the first Nesterov step is (1 + beta) delta
    for n, tensor in got.items():
        x, y = numbers(START.state[n]), numbers(updates[0].state[n])
        assert_close(tensor, x + (factor if n in PARAMETERS else 1.0) * (y - x), n)


@every
@pytest.mark.parametrize("tensor", ["0.weight", "half", "1.running_var"])
def test_one_bad_number_names_client_and_tensor(name: str, tensor: str) -> None:
    updates = updates_of(START)
    updates[3].state[tensor].view(-1)[2] = math.nan
    aggregator = EVERY[name]()
    before = aggregator.state_dict()
    with pytest.raises(TrainingError, match=rf"Client 'c3', round 1: tensor '{tensor}' holds NaN"):
        aggregator.aggregate(START, updates)
    assert aggregator.state_dict() == before  # a refused round leaves no trace


@every
def test_a_round_that_cannot_be_combined_is_refused(name: str) -> None:
    with pytest.raises(TrainingError, match="no client sent"):
        EVERY[name]().aggregate(START, [])
    with pytest.raises(TrainingError, match=r"Client 'c2'.*num_examples is -1"):
        EVERY[name]().aggregate(START, [*updates_of(START)[:2], an_update(START, 2, num_examples=-1)])
    with pytest.raises(TrainingError, match=r"Client 'c0'.*another round"):
        EVERY[name]().aggregate(START, [an_update(START, 0, round=2)])
    wrong = updates_of(START)
    wrong[1].state["half"] = torch.zeros(6).half()
    with pytest.raises(TrainingError, match=r"Client 'c1'.*'half'"):
        EVERY[name]().aggregate(START, wrong)


@pytest.mark.parametrize("name", ["CoordinateMedian", "TrimmedMean", "Krum", "MultiKrum", "NormClippedMean"])
def test_updates_that_can_be_read_only_once_are_refused_where_they_are_read_again(name: str) -> None:
    with pytest.raises(TrainingError, match="only once"):
        EVERY[name]().aggregate(START, iter(updates_of(START)))


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_resumed_run_gives_the_same_bits(name: str) -> None:
    unbroken = EVERY[name]()
    whole = run(unbroken, range(1, 7), a_state(99))
    first, second = EVERY[name](), EVERY[name]()
    half = run(first, range(1, 4), a_state(99))
    stored = first.state_dict()
    saved = through_a_file(stored)
    run(first, range(4, 6), half[-1])  # what is stored must not change with the run that goes on
    assert all(identical(stored[key], saved[key]) for key in stored if key != "aggregator")
    second.load_state_dict(saved)
    rest = run(second, range(4, 7), half[-1])
    assert all(identical(a, b) for a, b in zip(whole, half + rest, strict=True))
    assert all(identical(getattr(unbroken, a), getattr(second, a)) for a in second.memory)
    forgetful = run(EVERY[name](), range(4, 5), half[-1])
    assert name == "Scaffold" or not identical(forgetful[0], rest[0])  # Scaffold's memory is for its clients


@pytest.mark.parametrize("name", EVERY)
def test_the_state_of_another_aggregator_is_refused(name: str) -> None:
    mine = EVERY[name]()
    for other in (FedAvg(), FedAvgM(), FedAdam()):
        if type(other) is type(mine) or other.state_dict() == mine.state_dict():
            continue
        with pytest.raises(RunError, match=rf"{type(mine).__name__}.*started with"):
            mine.load_state_dict(other.state_dict())
    mine.load_state_dict(mine.state_dict())
    with pytest.raises(RunError, match=type(mine).__name__):
        mine.load_state_dict({"memories": {}})


@pytest.mark.parametrize("name", REMEMBERING)
def test_memory_of_another_student_is_refused(name: str) -> None:
    aggregator = EVERY[name]()
    run(aggregator, range(1, 2), a_state(99))
    small = {n: t for n, t in a_state(99).items() if n != "precise"}
    extras = {"scaffold": {n: torch.zeros(small[n].shape) for n in PARAMETERS if n != "precise"}}
    with pytest.raises(TrainingError, match=r"differ in tensor 'precise'"):
        aggregator.aggregate(Broadcast(2, small), [Update("a", 2, 0, small, 1, 1, {}, extras)])


@every
def test_statistics_stay_possible_however_far_the_parameters_go(name: str) -> None:
    aggregator, state = EVERY[name](), a_state(99)
    state["1.running_var"] = torch.full((8,), 50.0)
    for round in range(1, 9):
        state["1.running_var"] = state["1.running_var"] * 0.5
        start = Broadcast(round, state)
        updates = updates_of(start)
        for update in updates:
            update.state["1.running_var"].mul_(0.01)
        state = aggregator.aggregate(start, updates)
        assert (state["1.running_var"] > 0).all()
        assert (state["1.running_var"] < 25).all()


@every
def test_what_travels_passes_the_allow_list(name: str) -> None:
    aggregator = EVERY[name]()
    aggregator.begin(9)
    run(aggregator, range(1, 3), a_state(99))
    extras = aggregator.broadcast_extras()
    assert extras.keys() <= aggregator.down_sections
    AllowList(a_state(0), aggregator.down_sections).check(Broadcast(3, a_state(0), extras))


def test_the_cases_hold_what_they_say() -> None:
    assert {*PARAMETERS, *STATISTICS, COUNTER} == a_state(0).keys()

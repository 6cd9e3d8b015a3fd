"""Median and trimmed mean of each coordinate, and the reading of slices beneath them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from aggregation_cases import CLIENTS, Lazy, a_state, an_update, assert_close, stacked, updates_of

from fkd_med.aggregation import CoordinateMedian, Krum, MultiKrum, TrimmedMean, identical
from fkd_med.aggregation.slices import slices
from fkd_med.communication import Broadcast, Update
from fkd_med.errors import TrainingError

START = Broadcast(1, a_state(99))


@pytest.mark.parametrize("count", range(1, 8))
def test_the_median_is_numpys(count: int) -> None:
    updates = updates_of(START)[:count]
    for name, tensor in CoordinateMedian().aggregate(START, updates).items():
        assert_close(tensor, np.median(stacked(updates, name), axis=0), name)


@pytest.mark.parametrize(("fraction", "drop"), [(0.0, 0), (0.1, 1), (0.28, 2), (0.29, 3), (0.4, 3)])
def test_the_trimmed_mean_is_that_of_sorted_values(fraction: float, drop: int) -> None:
    updates = updates_of(START)
    for name, tensor in TrimmedMean(fraction).aggregate(START, updates).items():
        kept = np.sort(stacked(updates, name), axis=0)[drop : len(updates) - drop]
        assert_close(tensor, kept.mean(axis=0), name)


def test_the_share_is_rounded_up_as_it_is_written() -> None:
    assert TrimmedMean(0.07)._dropped(100, 1) == 7
    assert TrimmedMean(0.1)._dropped(30, 1) == 3
    assert TrimmedMean(0.1)._dropped(31, 1) == 4
    assert TrimmedMean(0.1)._dropped(4, 1) == 1
    assert TrimmedMean(1e-9)._dropped(3, 1) == 1


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 1), (0.1, 2), (0.34, 4), (0.49, 7)])
def test_nobody_left_is_refused(fraction: float, count: int) -> None:
    with pytest.raises(TrainingError, match=rf"Round 1.*{count} clients leaves nobody.*fraction {fraction}"):
        TrimmedMean(fraction).aggregate(START, updates_of(START)[:count])


@pytest.mark.parametrize("aggregator", [CoordinateMedian(), TrimmedMean(0.4)])
def test_three_liars_of_seven_move_nothing_beyond_the_honest(aggregator: CoordinateMedian | TrimmedMean) -> None:
    updates = updates_of(START)
    honest = updates[:4]
    for liar, value in zip(updates[4:], (1e30, -1e30, 1e30), strict=True):
        for name in ("0.weight", "1.running_var", "precise"):
            liar.state[name].fill_(value)
        liar.__dict__["num_examples"] = 10**12
    got = aggregator.aggregate(START, updates)
    for name in ("0.weight", "1.running_var", "precise"):
        values = stacked(honest, name)
        assert (got[name].double().numpy() <= values.max(axis=0) + 1e-7).all()
        assert (got[name].double().numpy() >= values.min(axis=0) - 1e-7).all()


def test_every_dtype_and_shape_goes_through() -> None:
    states = [
        {
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(float(v)),
            "flag": torch.tensor([v > 0, v > 2]),
            "byte": torch.tensor([v, 255], dtype=torch.uint8),
            "brain": torch.tensor([v, -v]).bfloat16(),
            "turned": torch.arange(6.0).reshape(2, 3).t() * v,
        }
        for v in (0, 1, 3)
    ]
    updates = [Update(c, 1, 0, s, 1, 1) for c, s in zip("abc", states, strict=True)]
    got = CoordinateMedian().aggregate(Broadcast(1, states[0]), updates)
    assert identical(got, states[1] | {"flag": torch.tensor([True, False])})
    mean = TrimmedMean(0.0).aggregate(Broadcast(1, states[0]), updates)
    assert mean["byte"].tolist() == [1, 255]
    assert mean["flag"].tolist() == [True, False]
    assert mean["brain"].dtype == torch.bfloat16


@pytest.mark.parametrize("max_bytes", [1, 1000, 3000])
@pytest.mark.parametrize("kind", [CoordinateMedian, TrimmedMean, Krum, MultiKrum])
def test_little_memory_means_more_passes_and_the_same_bits(
    kind: type[CoordinateMedian], max_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = kind().aggregate(START, updates_of(START))
    monkeypatch.setattr(kind, "max_bytes", max_bytes)
    if max_bytes == 1:  # a pass per number: keep it short
        start = Broadcast(1, {n: t for n, t in START.state.items() if n in ("0.bias", "1.running_mean")})
        few = [Update(u.client, 1, 0, {n: u.state[n] for n in start.state}, 1, 1) for u in updates_of(START)]
        monkeypatch.undo()
        want = kind().aggregate(start, few)
        monkeypatch.setattr(kind, "max_bytes", max_bytes)
        assert identical(kind().aggregate(start, few), want)
        return
    lazy = Lazy(START)
    assert identical(kind().aggregate(START, lazy), want)
    assert lazy.passes > 2


@pytest.mark.parametrize("kind", [CoordinateMedian, TrimmedMean, Krum])
def test_small_blocks_give_the_same_bits(kind: type[CoordinateMedian], monkeypatch: pytest.MonkeyPatch) -> None:
    want = kind().aggregate(START, updates_of(START))
    monkeypatch.setattr("fkd_med.aggregation.slices._BLOCK", 7 * 20)
    got = kind().aggregate(START, updates_of(START))
    assert identical(got, want)


@pytest.mark.parametrize("budget", [0, 3, 8, 100, 501, 10**6])
def test_slices_cover_everything_once_within_the_budget(budget: int) -> None:
    state = START.state
    seen = {name: torch.zeros(tensor.numel(), dtype=torch.int64) for name, tensor in state.items()}
    for group in slices(state, budget):
        size = sum((part.stop - part.start) * state[part.name].element_size() for part in group)
        assert size <= budget or (len(group) == 1 and group[0].stop - group[0].start == 1)
        for part in group:
            seen[part.name][part.start : part.stop] += 1
    assert all((count == 1).all() for count in seen.values())


def test_updates_that_change_between_two_readings_are_refused() -> None:
    class Leaving:
        calls = 0

        def __iter__(self):  # type: ignore[no-untyped-def]
            self.calls += 1
            return iter([an_update(START, i) for i in range(len(CLIENTS) - (self.calls > 1))])

    with pytest.raises(TrainingError, match="6 of 7 came again"):
        CoordinateMedian().aggregate(START, Leaving())

"""The weighted mean, against NumPy and by its invariants."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fkd_med.aggregation import FedAvg, identical
from fkd_med.communication import Broadcast, State, Update
from fkd_med.errors import RunError, TrainingError


def a_state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    state = {n: torch.randn(t.shape, generator=generator) for n, t in net.state_dict().items()}
    state["0.weight"] *= 10.0 ** torch.randint(-6, 6, (8, 3, 3, 3), generator=generator)
    state["1.num_batches_tracked"] = torch.tensor(seed * 10 + 1)
    state["half"] = torch.randn(5, generator=generator).half()
    state["brain"] = torch.randn(5, generator=generator).bfloat16()
    state["zero"] = torch.tensor([0.0, -0.0])
    return state


def an_update(client: str, seed: int, num_examples: int, **changes: Any) -> Update:
    return Update(**({"client": client, "round": 0, "attempt": 0, "state": a_state(seed), "num_examples": num_examples,
                      "num_steps": 1} | changes))  # fmt: skip


BROADCAST = Broadcast(0, a_state(99))


def test_the_mean_is_weighted_by_examples_as_numpy_computes_it() -> None:
    counts = [7, 100, 1, 33]
    updates = [an_update(f"c{i}", i, n) for i, n in enumerate(counts)]
    got = FedAvg().aggregate(BROADCAST, updates)
    assert got.keys() == BROADCAST.state.keys()
    for name, tensor in got.items():
        stack = np.stack([u.state[name].to(torch.float64).numpy() for u in updates])
        want = np.average(stack, axis=0, weights=np.array(counts, dtype=np.float64))
        assert tensor.dtype == BROADCAST.state[name].dtype
        scale = np.abs(stack).max(axis=0)
        eps = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.5
        error = np.abs(tensor.to(torch.float64).numpy() - want)
        assert (error <= (eps * scale if tensor.is_floating_point() else 0.5)).all(), name


def test_the_mean_by_hand() -> None:
    like = Broadcast(0, {"w": torch.zeros(2)})
    a = Update("a", 0, 0, {"w": torch.tensor([1.0, -4.0])}, 1, 1)
    b = Update("b", 0, 0, {"w": torch.tensor([5.0, 4.0])}, 3, 1)
    assert FedAvg().aggregate(like, [a, b])["w"].tolist() == [4.0, 2.0]


def test_float64_sums_keep_what_float32_sums_lose() -> None:
    like = Broadcast(0, {"w": torch.zeros(1)})
    values = [1e8, 1.0, -1e8]
    updates = [Update(f"{i}", 0, 0, {"w": torch.tensor([v])}, 1, 1) for i, v in enumerate(values)]
    assert FedAvg().aggregate(like, updates)["w"].item() == pytest.approx(1 / 3, rel=1e-6)


def test_counters_stay_integers_and_are_rounded() -> None:
    like = Broadcast(0, {"n": torch.tensor(0), "flag": torch.tensor(False), "byte": torch.tensor(0, dtype=torch.uint8)})
    states = [{"n": torch.tensor(n), "flag": torch.tensor(f), "byte": torch.tensor(b, dtype=torch.uint8)}
              for n, f, b in ((10, True, 255), (13, True, 254), (13, False, 254))]  # fmt: skip
    updates = [Update(f"{i}", 0, 0, state, 1, 1) for i, state in enumerate(states)]
    got = FedAvg().aggregate(like, updates)
    assert {n: (t.item(), t.dtype) for n, t in got.items()} == {
        "n": (12, torch.int64),
        "flag": (True, torch.bool),
        "byte": (254, torch.uint8),
    }


@pytest.mark.parametrize("num_examples", [1, 3, 612, 2**40 + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_client_is_the_identity_bit_for_bit(num_examples: int, dtype: torch.dtype) -> None:
    state = {n: t.to(dtype) if t.dtype == torch.float32 else t for n, t in a_state(5).items()}
    got = FedAvg().aggregate(Broadcast(0, state), [an_update("a", 5, num_examples, state=state)])
    assert identical(got, state)
    assert all(got[name] is not state[name] for name in state)


def test_equal_clients_are_the_identity_bit_for_bit() -> None:
    updates = [an_update(name, 5, n) for name, n in (("a", 3), ("b", 7), ("c", 11))]
    got = FedAvg().aggregate(BROADCAST, updates)
    assert all(torch.equal(got[name], tensor) for name, tensor in a_state(5).items())


def test_the_order_of_clients_changes_no_bit() -> None:
    updates = [an_update(f"c{i}", i, n) for i, n in enumerate((7, 100, 33))]
    first = FedAvg().aggregate(BROADCAST, updates)
    assert all(identical(first, FedAvg().aggregate(BROADCAST, list(p))) for p in itertools.permutations(updates))


def test_scaling_all_weights_changes_no_bit() -> None:
    one = FedAvg().aggregate(BROADCAST, [an_update(f"c{i}", i, n) for i, n in enumerate((7, 100, 33))])
    other = FedAvg().aggregate(BROADCAST, [an_update(f"c{i}", i, 3 * n) for i, n in enumerate((7, 100, 33))])
    assert identical(one, other)


def test_the_number_of_threads_changes_no_bit() -> None:
    state = {"w": torch.randn(300_001)}
    updates = [Update(f"{i}", 0, 0, {"w": torch.randn(300_001)}, i + 1, 1) for i in range(3)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(FedAvg().aggregate(Broadcast(0, state), updates))
    finally:
        torch.set_num_threads(before)
    assert identical(results[0], results[1])
    assert identical(results[0], results[2])


def test_updates_are_streamed_one_at_a_time() -> None:
    alive: list[int] = []

    class Tracked(dict[str, torch.Tensor]):
        def __init__(self, state: State) -> None:
            super().__init__(state)
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    def lazily() -> Iterator[Update]:
        for i in range(20):
            assert len(alive) <= 1
            yield an_update(f"c{i:02}", i, 1, state=Tracked(a_state(i)))

    got = FedAvg().aggregate(BROADCAST, lazily())
    assert identical(got, FedAvg().aggregate(BROADCAST, [an_update(f"c{i:02}", i, 1) for i in range(20)]))


def test_inputs_are_left_alone() -> None:
    updates = [an_update("a", 1, 1), an_update("b", 2, 5)]
    FedAvg().aggregate(BROADCAST, updates)
    assert identical(updates[0].state, a_state(1))
    assert identical(updates[1].state, a_state(2))
    assert identical(BROADCAST.state, a_state(99))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_number_names_client_and_tensor(value: float) -> None:
    bad = an_update("b", 2, 5)
    bad.state["1.running_var"][3] = value
    with pytest.raises(TrainingError, match=r"Client 'b', round 0: tensor '1\.running_var'"):
        FedAvg().aggregate(BROADCAST, [an_update("a", 1, 1), bad])


@pytest.mark.parametrize("count", [0, -4])
def test_counts_that_are_not_positive_are_refused(count: int) -> None:
    with pytest.raises(TrainingError, match=f"Client 'b'.*{count}"):
        FedAvg().aggregate(BROADCAST, [an_update("a", 1, 1), an_update("b", 2, count)])


def test_no_update_is_refused() -> None:
    with pytest.raises(TrainingError, match="no client sent"):
        FedAvg().aggregate(BROADCAST, iter([]))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("half"), "'half' is missing"),
        (lambda s: s.update(teacher=torch.zeros(1)), "'teacher' is unknown"),
        (lambda s: s.update(half=torch.zeros(6).half()), "'half' is torch.float16 .6,"),
        (lambda s: s.update(half=torch.zeros(5)), "'half' is torch.float32"),
    ],
)
def test_another_students_state_is_refused(change: Any, named: str) -> None:
    bad = an_update("b", 2, 5)
    change(bad.state)
    with pytest.raises(TrainingError, match=f"Client 'b'.*{named}"):
        FedAvg().aggregate(BROADCAST, [an_update("a", 1, 1), bad])


def test_lazy_updates_out_of_order_and_doubled_clients_and_other_rounds_are_refused() -> None:
    a, b = an_update("a", 1, 1), an_update("b", 2, 5)
    with pytest.raises(TrainingError, match="sorted"):
        FedAvg().aggregate(BROADCAST, iter([b, a]))
    with pytest.raises(TrainingError, match="one for each"):
        FedAvg().aggregate(BROADCAST, [a, b, a])
    with pytest.raises(TrainingError, match="another round than 0"):
        FedAvg().aggregate(BROADCAST, [an_update("a", 1, 1, round=1)])


def test_it_keeps_no_state_and_refuses_anothers() -> None:
    assert FedAvg().state_dict() == {}
    FedAvg().load_state_dict({})
    with pytest.raises(RunError, match=r"momentum.*FedAvg"):
        FedAvg().load_state_dict({"momentum": {}})
    assert FedAvg.required_sections == frozenset()

"""FedAvgM, FedAdam, FedYogi, FedAdagrad against the papers' equations in float64 NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from aggregation_cases import COUNTER, COUNTS, PARAMETERS, STATISTICS, a_state, assert_close, numbers, updates_of

from fkd_med.aggregation import Aggregator, FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi
from fkd_med.communication import Broadcast, Update
from fkd_med.errors import TrainingError

Array = np.ndarray[Any, np.dtype[np.float64]]


class Momentum:
    """Hsu et al., 2019, section 4.3: v <- beta v + sum_k n_k/n (w - w_k); w <- w - lr v."""

    def __init__(self, beta: float, lr: float, nesterov: bool) -> None:
        self.beta, self.lr, self.nesterov = beta, lr, nesterov
        self.v: Array | float = 0.0

    def __call__(self, w: Array, clients: list[Array], shares: Array) -> Array:
        gradient = sum(share * (w - client) for share, client in zip(shares, clients, strict=True))
        self.v = self.beta * self.v + gradient
        return w - self.lr * (gradient + self.beta * self.v if self.nesterov else self.v)


class Adaptive:
    """Reddi et al., 2021, Algorithm 2, as printed."""

    def __init__(self, kind: str, lr: float, beta1: float, beta2: float, tau: float) -> None:
        self.kind, self.lr, self.beta1, self.beta2, self.tau = kind, lr, beta1, beta2, tau
        self.m: Array | float = 0.0
        self.v: Array | float = tau**2

    def __call__(self, x: Array, clients: list[Array], shares: Array) -> Array:
        delta = sum(share * (client - x) for share, client in zip(shares, clients, strict=True))
        self.m = self.beta1 * self.m + (1 - self.beta1) * delta
        if self.kind == "adagrad":
            self.v = self.v + delta**2
        elif self.kind == "yogi":
            self.v = self.v - (1 - self.beta2) * delta**2 * np.sign(self.v - delta**2)
        else:
            self.v = self.beta2 * self.v + (1 - self.beta2) * delta**2
        return x + self.lr * self.m / (np.sqrt(self.v) + self.tau)


EXAMPLES = np.array(COUNTS) / sum(COUNTS)
UNIFORM = np.full(len(COUNTS), 1 / len(COUNTS))
CASES = {
    "momentum": (FedAvgM(0.8, 0.5), lambda: Momentum(0.8, 0.5, False), EXAMPLES),
    "nesterov": (FedAvgM(0.8, 0.5, nesterov=True), lambda: Momentum(0.8, 0.5, True), EXAMPLES),
    "adam": (FedAdam(0.02, 0.8, 0.95, 1e-2), lambda: Adaptive("adam", 0.02, 0.8, 0.95, 1e-2), EXAMPLES),
    "adam uniform": (
        FedAdam(0.02, 0.8, 0.95, 1e-2, "uniform"),
        lambda: Adaptive("adam", 0.02, 0.8, 0.95, 1e-2),
        UNIFORM,
    ),
    "adam defaults": (FedAdam(), lambda: Adaptive("adam", 0.01, 0.9, 0.99, 1e-3), EXAMPLES),
    "yogi": (FedYogi(0.02, 0.8, 0.9, 2e-2), lambda: Adaptive("yogi", 0.02, 0.8, 0.9, 2e-2), EXAMPLES),
    "adagrad": (FedAdagrad(0.05, 0.5, 1e-2), lambda: Adaptive("adagrad", 0.05, 0.5, 0.0, 1e-2), EXAMPLES),
}


@pytest.mark.parametrize("case", CASES)
def test_several_rounds_are_those_of_the_paper(case: str) -> None:
    aggregator, make, shares = CASES[case]
    references = {name: make() for name in PARAMETERS}
    state = a_state(99)
    for round in range(1, 7):
        start = Broadcast(round, state)
        updates = updates_of(start)
        state = aggregator.aggregate(start, updates)
        for name, tensor in state.items():
            clients = [numbers(update.state[name]) for update in updates]
            if name in PARAMETERS:
                want = references[name](numbers(start.state[name]), clients, shares)
            else:
                want = sum(share * client for share, client in zip(shares, clients, strict=True))
            assert_close(tensor, want, name)


def test_yogi_follows_from_both_sides() -> None:
    """The sign matters only where delta^2 exceeds v: both must have happened in the case above."""
    aggregator = FedYogi(tau=0.1, beta2=0.9)
    for round, value in ((1, 0.5), (2, 0.01)):
        start = Broadcast(round, {"w": torch.zeros(1, dtype=torch.float64)})
        update = Update("a", round, 0, {"w": torch.tensor([value], dtype=torch.float64)}, 1, 1)
        aggregator.aggregate(start, [update])
    assert aggregator.second_moment["w"].item() == pytest.approx(0.01 + 0.1 * 0.25 - 0.1 * 1e-4, rel=1e-12)


def test_adam_by_hand_in_its_first_round() -> None:
    start = Broadcast(1, {"w": torch.tensor([1.0])})
    updates = [Update("a", 1, 0, {"w": torch.tensor([1.3])}, 1, 1), Update("b", 1, 0, {"w": torch.tensor([0.7])}, 3, 1)]
    got = FedAdam(server_lr=0.1, beta1=0.9, beta2=0.99, tau=0.1).aggregate(start, updates)
    delta = -0.15  # (0.3 - 3 * 0.3) / 4; no bias correction, v from tau^2
    assert got["w"].item() == pytest.approx(1 + 0.1 * 0.1 * delta / ((0.99 * 0.01 + 0.01 * delta**2) ** 0.5 + 0.1))


def test_without_momentum_it_is_federated_averaging() -> None:
    start = Broadcast(1, a_state(99))
    one, other = (a.aggregate(start, updates_of(start)) for a in (FedAvg(), FedAvgM(server_momentum=0.0)))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-7, atol=0)


@pytest.mark.parametrize("aggregator", [FedAvgM(), FedAdam(), FedYogi(), FedAdagrad()])
def test_only_parameters_are_remembered_in_float64(aggregator: Aggregator) -> None:
    start = Broadcast(1, a_state(99))
    aggregator.aggregate(start, updates_of(start))
    for attribute in aggregator.memory:
        held = getattr(aggregator, attribute)
        assert set(held) == set(PARAMETERS)
        assert not set(held) & {*STATISTICS, COUNTER}
        assert all(tensor.dtype == torch.float64 for tensor in held.values())


@pytest.mark.parametrize(("aggregator", "named"), [(FedAvgM(server_lr=1e7), "half"), (FedAdam(server_lr=1e7), "half")])
def test_a_step_out_of_range_names_the_tensor_not_a_client(aggregator: Aggregator, named: str) -> None:
    start = Broadcast(4, a_state(99))
    with pytest.raises(TrainingError, match=rf"Round 4: .*'{named}'.*Lower the aggregator's server_lr"):
        aggregator.aggregate(start, updates_of(start))

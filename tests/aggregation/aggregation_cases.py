"""A student, its updates and every aggregator, for the tests of this room."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from fkd_med.aggregation import (
    Aggregator,
    CoordinateMedian,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedNova,
    FedYogi,
    Krum,
    MultiKrum,
    NormClippedMean,
    Scaffold,
    TrimmedMean,
)
from fkd_med.communication import Broadcast, State, Update

COUNTS = (7, 100, 1, 33, 12, 250, 60)
CLIENTS = tuple(f"c{i}" for i in range(len(COUNTS)))
STATISTICS = ("1.running_mean", "1.running_var")
COUNTER = "1.num_batches_tracked"
PARAMETERS = ("0.weight", "0.bias", "1.weight", "1.bias", "precise", "half")

EVERY: dict[str, Callable[[], Aggregator]] = {
    "FedAvg": FedAvg,
    "FedAvgM": FedAvgM,
    "Nesterov": lambda: FedAvgM(nesterov=True),
    "FedAdam": FedAdam,
    "FedYogi": FedYogi,
    "FedAdagrad": FedAdagrad,
    "FedNova": FedNova,
    "Scaffold": lambda: Scaffold(clients=9),
    "CoordinateMedian": CoordinateMedian,
    "TrimmedMean": TrimmedMean,
    "Krum": lambda: Krum(byzantine=2),
    "MultiKrum": MultiKrum,
    "NormClippedMean": NormClippedMean,
    "NormClippedMean absolute": lambda: NormClippedMean(max_norm=0.5),
}
REMEMBERING = ("FedAvgM", "Nesterov", "FedAdam", "FedYogi", "FedAdagrad", "Scaffold")


def a_state(seed: int) -> State:
    """A convolution, a BatchNorm with its counter, a float64 and a float16 tensor."""
    generator = torch.Generator().manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    state = {n: torch.randn(t.shape, generator=generator) for n, t in net.state_dict().items()}
    state["1.running_var"] = state["1.running_var"].square()
    state[COUNTER] = torch.tensor(seed * 10 + 1)
    state["precise"] = torch.randn(11, generator=generator, dtype=torch.float64)
    state["half"] = torch.randn(5, generator=generator).half()
    return state


def moved(start: State, seed: int, size: float = 0.1) -> State:
    """What training might make of `start`: every floating tensor moves a little, variances stay positive."""
    other = a_state(seed)
    state = {n: (t.double() + size * (other[n].double() - t.double())).to(t.dtype) for n, t in start.items()}
    return state | {COUNTER: start[COUNTER] + seed % 5 + 1}


def an_update(start: Broadcast, index: int, **changes: Any) -> Update:
    """The update of client number `index` to a broadcast, with the sections of every client rule."""
    seed = 1000 * start.round + index
    generator = torch.Generator().manual_seed(seed)
    drift = {n: 0.01 * torch.randn(start.state[n].shape, generator=generator) for n in PARAMETERS}
    extras = {"scaffold": drift, "fednova": {"a_norm": torch.tensor(float(3 + 2 * (index % 3)))}}
    fields = {"client": CLIENTS[index], "round": start.round, "attempt": 0, "state": moved(start.state, seed),
              "num_examples": COUNTS[index], "num_steps": 5, "extras": extras}  # fmt: skip
    return Update(**(fields | changes))


def updates_of(start: Broadcast) -> list[Update]:
    """The updates of all clients to a broadcast."""
    return [an_update(start, index) for index in range(len(CLIENTS))]


def run(aggregator: Aggregator, rounds: range, state: State) -> list[State]:
    """Return the state after each of some rounds with all clients."""
    states = []
    for round in rounds:
        start = Broadcast(round, state, aggregator.broadcast_extras())
        state = aggregator.aggregate(start, updates_of(start))
        states.append(state)
    return states


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    loaded: dict[str, Any] = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    return loaded


def numbers(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a tensor as float64 NumPy."""
    return tensor.to(torch.float64).numpy()


def stacked(updates: list[Update], name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return all clients' values of a tensor, (clients, ...), float64."""
    return np.stack([numbers(update.state[name]) for update in updates])


def plain_mean(updates: list[Update], name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return NumPy's mean weighted by training images."""
    weights = np.array([update.num_examples for update in updates], dtype=np.float64)
    return np.average(stacked(updates, name), axis=0, weights=weights)


def assert_close(got: torch.Tensor, want: Any, name: str) -> None:
    """Check a tensor against float64 numbers, to the last bits of its dtype; integers must be the rounded number."""
    if not got.is_floating_point():
        assert got.item() == round(float(want)), name
        return
    eps = torch.finfo(got.dtype).eps
    np.testing.assert_allclose(numbers(got), want, rtol=2 * eps, atol=2 * eps, err_msg=name)


class Lazy:
    """Updates made anew whenever they are read; counts how many states are alive at once."""

    def __init__(self, start: Broadcast) -> None:
        self.start = start
        self.alive = 0
        self.most = 0
        self.passes = 0

    def __iter__(self) -> Iterator[Update]:
        self.passes += 1
        for index in range(len(CLIENTS)):
            yield an_update(self.start, index, state=Tracked(self, an_update(self.start, index).state))


class Tracked(dict[str, torch.Tensor]):
    """A state that tells its owner when it comes and goes."""

    def __init__(self, owner: Lazy, state: State) -> None:
        super().__init__(state)
        self.owner = owner
        owner.alive += 1
        owner.most = max(owner.most, owner.alive)

    def __del__(self) -> None:
        self.owner.alive -= 1

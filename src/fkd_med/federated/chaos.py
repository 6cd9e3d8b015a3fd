"""Trouble by configuration, to see how a federation bears it: clients that vanish, come late, fail or lie.

Only decides and falsifies; the loop acts on it. What happens to a client in a round depends on (seed, round, client)
alone, so a run with trouble is as repeatable as one without.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fkd_med.aggregation.state import is_buffer
from fkd_med.communication import Broadcast, State, Update
from fkd_med.errors import ConfigError
from fkd_med.federated.participation import check_names, check_span
from fkd_med.seeding import derive_seed

Lie: TypeAlias = Literal["nan", "scale", "flip", "random"]
Event: TypeAlias = Literal["fine", "dropout", "late", "fail"]


class Chaos:
    """Simulates clients in trouble.

    A lie concerns the floating parameters: integers and BatchNorm statistics stay true, as a negative variance would
    make every lie the same NaN.

    Args:
        dropout: probability that a chosen client does not answer.
        straggle: probability that its answer comes too late.
        fail: probability that its training raises an error.
        seconds: how long a late client really keeps the round waiting; 0 only marks it as late.
        liars: client -> what it sends instead of its update: ``nan`` puts one NaN into one tensor; ``scale`` multiplies
            its change by `scale`; ``flip`` turns the sign of its change; ``random`` sends normal noise, each tensor of
            the norm of the true one.
        scale: factor of the lie ``scale``.
        rounds: [first, last] round with trouble, both included; null for all.

    Raises:
        ConfigError: probabilities out of range or of a sum above 1, an unknown lie, an impossible factor or span.
    """

    def __init__(
        self,
        dropout: float = 0.0,
        straggle: float = 0.0,
        fail: float = 0.0,
        seconds: float = 0.0,
        liars: dict[str, Lie] | None = None,
        scale: float = 100.0,
        rounds: list[int] | None = None,
    ) -> None:
        self.chances: dict[Event, float] = {"dropout": dropout, "late": straggle, "fail": fail}
        _check_chances({"dropout": dropout, "straggle": straggle, "fail": fail})
        for name, value in (("seconds", seconds), ("scale", scale)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"Chaos: {name} is {value}: give a number of 0 or above.")
        self.seconds = seconds
        self.liars = _checked_lies(liars or {})
        self.scale = scale
        if rounds is not None:
            check_span(rounds, "Chaos: rounds")
        self.rounds = rounds

    def check(self, clients: list[str]) -> None:
        """Refuse a liar that the data do not have.

        Raises:
            ConfigError: naming the liar and the client most like it.
        """
        check_names(self.liars, clients, "Chaos: liars")

    def happens(self, client: str, seed: int, round: int) -> Event:
        """Return what befalls a client in a round."""
        if not self._is_on(round):
            return "fine"
        drawn = np.random.default_rng(derive_seed(seed, "chaos", round, client)).random()  # in [0, 1)
        edge = 0.0
        for event, chance in self.chances.items():
            edge += chance
            if drawn < edge:
                return event
        return "fine"

    def corrupt(self, update: Update, broadcast: Broadcast, seed: int) -> Update:
        """Return what a client sends: its update, or a liar's falsified copy of it.

        Args:
            update: the true update; never changed.
            broadcast: what it started from.
            seed: the run's seed.
        """
        lie = self.liars.get(update.client)
        if lie is None or not self._is_on(update.round):
            return update
        names = [name for name, tensor in sorted(update.state.items()) if _is_parameter(name, tensor)]
        own = (seed, "lie", update.round, update.client)
        if lie == "nan":
            told = _one_nan(update.state, names, derive_seed(*own))
        elif lie == "random":
            told = {name: _noise_like(update.state[name], derive_seed(*own, name)) for name in names}
        else:
            factor = -1.0 if lie == "flip" else self.scale
            told = {name: _stretched(update.state[name], broadcast.state[name], factor) for name in names}
        return replace(update, state=update.state | told)

    def _is_on(self, round: int) -> bool:
        return self.rounds is None or self.rounds[0] <= round <= self.rounds[1]


def _check_chances(chances: dict[str, float]) -> None:
    for name, chance in chances.items():
        if not 0 <= chance <= 1:
            raise ConfigError(f"Chaos: {name} is {chance}: give a probability, 0 to 1.")
    if (total := math.fsum(chances.values())) > 1:
        raise ConfigError(f"Chaos: {', '.join(chances)} add up to {total:g}: only one can happen, so 1 at most.")


def _checked_lies(liars: dict[str, Lie]) -> dict[str, Lie]:
    for client, lie in liars.items():
        if lie not in ("nan", "scale", "flip", "random"):
            raise ConfigError(f"Chaos: the lie of client '{client}' is {lie!r}: give nan, scale, flip or random.")
    return dict(liars)


def _is_parameter(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0 and not is_buffer(name)


def _one_nan(state: State, names: list[str], seed: int) -> State:
    """Return a copy of one tensor with one NaN in it: the least there is to find."""
    if not names:
        return {}
    generator = np.random.default_rng(seed)
    name = names[generator.integers(len(names))]
    tensor = state[name].clone(memory_format=torch.contiguous_format)
    tensor.view(-1)[generator.integers(tensor.numel())] = math.nan
    return {name: tensor}


def _stretched(tensor: Tensor, base: Tensor, factor: float) -> Tensor:
    """Return ``base + factor * (tensor - base)``."""
    base64 = base.double()
    return (base64 + factor * (tensor.double() - base64)).to(tensor.dtype)


def _noise_like(tensor: Tensor, seed: int) -> Tensor:
    """Return normal noise of the shape, dtype and L2 norm of `tensor`."""
    noise: Tensor = torch.from_numpy(np.random.default_rng(seed).standard_normal(tuple(tensor.shape)))
    noise *= torch.linalg.vector_norm(tensor.double()) / torch.linalg.vector_norm(noise)
    return noise.to(tensor.dtype)

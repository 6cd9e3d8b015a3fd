"""The round recipe users write in YAML: who takes part, what a client does, how updates become one model."""

from __future__ import annotations

import os
from typing import Literal

import numpy as np
from jsonargparse import lazy_instance
from lightning import Callback

from fkd_med.aggregation import Aggregator, FedAvg
from fkd_med.errors import ConfigError
from fkd_med.seeding import derive_seed


class Federation:
    """What happens inside one communication round, and how many there are.

    Args:
        rounds: communication rounds; the trainer's ``max_epochs`` follows from it.
        local_epochs: epochs over its own training images that a client does per round.
        local_steps: optimizer steps per round instead of `local_epochs`.
        aggregator: how updates become the next global weights; null is local-only training: nothing travels
            and every client keeps its own student.
        fraction: share of the clients drawn each round, above 0 and up to 1.
        optimizer_state: whether a client's optimizer starts afresh each round or keeps its moments.
        client_callbacks: Lightning callbacks for every client's Trainer (batches, gradients, optimizers).
        local_baseline: after the run, also train each client alone with the same budget, for the end table.
        threads: CPU threads torch uses for training; results are bit-identical only for the same number.
    """

    def __init__(
        self,
        rounds: int = 20,
        local_epochs: int = 1,
        local_steps: int | None = None,
        aggregator: Aggregator | None = lazy_instance(FedAvg),  # noqa: B008 - made when first used
        fraction: float = 1.0,
        optimizer_state: Literal["reset", "keep"] = "reset",
        client_callbacks: list[Callback] | None = None,
        local_baseline: bool = False,
        threads: int | None = None,
    ) -> None:
        self.rounds = _positive("rounds", rounds)
        self.local_epochs = _positive("local_epochs", local_epochs)
        self.local_steps = None if local_steps is None else _positive("local_steps", local_steps)
        if not 0 < fraction <= 1:
            raise ConfigError(f"federation.fraction is {fraction}: give a share above 0 and up to 1.")
        if optimizer_state not in ("reset", "keep"):
            raise ConfigError(f"federation.optimizer_state is {optimizer_state!r}: give reset or keep.")
        self.aggregator = aggregator
        self.fraction = fraction
        self.optimizer_state = optimizer_state
        self.client_callbacks = client_callbacks or []
        self.local_baseline = local_baseline
        self.threads = threads if threads is None else _positive("threads", threads)

    @property
    def is_local(self) -> bool:
        """Whether every client trains alone: everything is personal and nothing travels."""
        return self.aggregator is None

    def select(self, clients: list[str], seed: int, round: int) -> list[str]:
        """Draw the clients of a round, in the order of their names; it depends on nothing but its arguments."""
        count = max(1, round_half_up(self.fraction * len(clients)))
        generator = np.random.default_rng(derive_seed(seed, "select", round))
        chosen = generator.choice(len(clients), size=count, replace=False)
        return [sorted(clients)[i] for i in sorted(chosen)]

    def personal_names(self, names: list[str]) -> set[str]:
        """Return which tensors of the student stay with a client."""
        return set(names) if self.is_local else set()

    def apply_threads(self) -> int:
        """Set torch's number of CPU threads if one is configured; return the number in force."""
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)
            os.environ["OMP_NUM_THREADS"] = str(self.threads)
        return torch.get_num_threads()


def round_half_up(value: float) -> int:
    """Round to the nearest whole number, halves up: 0.5 x 3 clients are 2."""
    return int(np.floor(value + 0.5))


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"federation.{name} is {value}: give 1 or more.")
    return value

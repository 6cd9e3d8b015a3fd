"""The round recipe users write in YAML: who takes part, what a client does, how updates become one model."""

from __future__ import annotations

import copy
import math
import os
from typing import Literal

from jsonargparse import lazy_instance
from lightning import Callback
from torch import nn

from fkd_med.aggregation import Aggregator, FedAvg, Firewall
from fkd_med.communication import Packing
from fkd_med.errors import ConfigError, RunError
from fkd_med.federated.chaos import Chaos
from fkd_med.federated.participation import Fraction, Participation
from fkd_med.federated.policy import BatchNormPolicy, TensorPolicy
from fkd_med.federated.rules import ClientRule, supplied


class Federation:
    """What happens inside one communication round, and how many there are.

    Args:
        rounds: communication rounds; the trainer's ``max_epochs`` follows from it.
        local_epochs: epochs over its own training images that a client does per round.
        local_steps: optimizer steps per round instead of `local_epochs`.
        aggregator: how updates become the next global weights; null is local-only training: nothing travels
            and every client keeps its own student.
        fraction: share of the clients drawn each round, above 0 and up to 1.
        participation: another way to choose the clients of a round, instead of `fraction`.
        quorum: share of a round's clients whose updates must be usable; with fewer the run stops, everything saved.
        firewall: sets harmful updates aside, so that the round goes on if the quorum holds; null lets them through to
            the aggregator.
        client_rules: what an algorithm changes in the clients' training: FedProx, ScaffoldRule, FedNovaRule.
        uplink: how updates are packed: codec, weights or deltas, compression; plain float32 when left out.
        downlink: how broadcasts are packed; of weights, since a client may have missed the last broadcast.
        batch_norm: ``average`` combines BatchNorm's tensors as all others; ``local`` keeps them with each client
            (FedBN); ``recalibrate`` sends its weights but no statistics: each client computes them afresh from its
            training images.
        personal: name patterns (``network.head.*``) of further tensors that stay with each client.
        frozen: name patterns of tensors that are not trained and do not travel.
        optimizer_state: whether a client's optimizer starts afresh each round or keeps its moments.
        client_callbacks: Lightning callbacks for every client's Trainer (batches, gradients, optimizers).
        chaos: simulated trouble, for teaching and for tests; null for none.
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
        participation: Participation | None = None,
        quorum: float = 1.0,
        firewall: Firewall | None = lazy_instance(Firewall),  # noqa: B008 - made when first used
        client_rules: list[ClientRule] | None = None,
        uplink: Packing | None = None,
        downlink: Packing | None = None,
        batch_norm: BatchNormPolicy = "average",
        personal: list[str] | None = None,
        frozen: list[str] | None = None,
        optimizer_state: Literal["reset", "keep"] = "reset",
        client_callbacks: list[Callback] | None = None,
        chaos: Chaos | None = None,
        local_baseline: bool = False,
        threads: int | None = None,
    ) -> None:
        self.rounds = _positive("rounds", rounds)
        self.local_epochs = _positive("local_epochs", local_epochs)
        self.local_steps = None if local_steps is None else _positive("local_steps", local_steps)
        for name, share in (("fraction", fraction), ("quorum", quorum)):
            if not 0 < share <= 1:
                raise ConfigError(f"federation.{name} is {share}: give a share above 0 and up to 1.")
        if participation is not None and fraction != 1:
            raise ConfigError("federation.fraction and federation.participation both choose the clients: keep one.")
        if optimizer_state not in ("reset", "keep"):
            raise ConfigError(f"federation.optimizer_state is {optimizer_state!r}: give reset or keep.")
        self.aggregator = aggregator
        self.participation = participation or Fraction(fraction)
        self.quorum, self.firewall, self.chaos = quorum, firewall, chaos
        if downlink is not None and (downlink.of == "delta" or downlink.error_feedback):
            raise ConfigError(
                "federation.downlink: a delta, or error feedback, needs clients that got every broadcast; use "
                "`of: weights` without error_feedback."
            )
        self.uplink, self.downlink = uplink, downlink
        self.client_rules = client_rules or []
        self.policy = TensorPolicy(batch_norm, personal or [], frozen or [], everything_stays=aggregator is None)
        self.optimizer_state = optimizer_state
        self.client_callbacks = client_callbacks or []
        self.local_baseline = local_baseline
        self.threads = threads if threads is None else _positive("threads", threads)
        self._check_rules()

    def _check_rules(self) -> None:
        """Refuse an aggregator without the client rule it needs, and rules nobody listens to."""
        if self.aggregator is None:
            return  # alone, rules change the training and nothing is sent
        missing = sorted(self.aggregator.required_sections - supplied(self.client_rules))
        name = self.aggregator_name
        if missing:
            raise ConfigError(
                f"{name} needs the section '{missing[0]}' from every client: add the client rule that supplies it to "
                f"federation.client_rules (fkd_med.federated.{_SUPPLIERS.get(missing[0], 'a rule of your own')})."
            )
        unheard = sorted(supplied(self.client_rules) - self.aggregator.required_sections)
        if unheard:
            raise ConfigError(
                f"federation.client_rules sends the section '{unheard[0]}', which {name} does not use: choose the "
                "aggregator that goes with the rule, or leave the rule out."
            )

    def begin(self, student: nn.Module, clients: list[str], rounds: int) -> None:
        """Refuse, before any work, what some later round would refuse; tell the aggregator how many clients there are.

        Args:
            student: the module that is federated.
            clients: all clients of the run.
            rounds: how many rounds there will be.

        Raises:
            ConfigError: names the setting, the client or the tensor, and the remedy.
        """
        self.policy.check(student)
        self.participation.check(clients, rounds)
        if self.chaos is not None:
            self.chaos.check(clients)
        if self.aggregator is not None:
            self.aggregator.begin(len(clients))

    @property
    def aggregator_name(self) -> str:
        """The aggregator's class, or ``null``; of a default that jsonargparse makes late, what it stands for."""
        return "null" if self.aggregator is None else type(self.aggregator).__name__.removeprefix("LazyInstance_")

    def check_aggregator(self, stored: str) -> None:
        """Refuse to go on with another aggregator than a checkpoint's, even one that remembers nothing.

        Args:
            stored: `aggregator_name` of the run that wrote the checkpoint.

        Raises:
            RunError: names both, and the remedy.
        """
        if stored != self.aggregator_name:
            raise RunError(
                f"This run was started with federation.aggregator {stored} and would go on with "
                f"{self.aggregator_name}: set it back to {stored}, or start a run of its own with --run_dir."
            )

    @property
    def is_local(self) -> bool:
        """Whether every client trains alone: everything is personal and nothing travels."""
        return self.aggregator is None

    @property
    def sections(self) -> frozenset[str]:
        """What may travel beside the student, up or down."""
        return self.aggregator.required_sections | self.aggregator.down_sections if self.aggregator else frozenset()

    def alone(self) -> Federation:
        """Return the recipe with the same training and nobody to send to."""
        recipe = copy.copy(self)
        recipe.aggregator, recipe.local_baseline, recipe.chaos = None, False, None
        recipe.policy = TensorPolicy("average", [], self.policy.frozen, everything_stays=True)
        return recipe

    def select(self, clients: list[str], seed: int, round: int, sizes: dict[str, int] | None = None) -> list[str]:
        """Choose the clients of a round, in the order of their names; it depends on nothing but its arguments."""
        return self.participation.select(clients, seed, round, sizes or dict.fromkeys(clients, 1))

    def needed(self, chosen: int) -> int:
        """Return how many of a round's clients must send a usable update."""
        return max(1, math.ceil(self.quorum * chosen - 1e-9))

    def apply_threads(self) -> int:
        """Set torch's number of CPU threads if one is configured; return the number in force."""
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)
            os.environ["OMP_NUM_THREADS"] = str(self.threads)
        return torch.get_num_threads()


_SUPPLIERS = {"scaffold": "ScaffoldRule", "fednova": "FedNovaRule"}


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"federation.{name} is {value}: give 1 or more.")
    return value

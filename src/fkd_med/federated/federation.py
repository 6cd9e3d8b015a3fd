"""The round recipe users write in YAML: who takes part, what a client does, how updates become one model."""

from __future__ import annotations

import copy
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from jsonargparse import lazy_instance
from lightning import Callback
from torch import nn

from fkd_med.aggregation import Aggregator, FedAvg, Firewall
from fkd_med.communication import PUBLIC_LOGITS, Link, Packing, PublicLogits, Rates
from fkd_med.errors import ConfigError
from fkd_med.federated.chaos import Chaos
from fkd_med.federated.client_data import public_images
from fkd_med.federated.participation import Fraction, Participation
from fkd_med.federated.policy import BatchNormPolicy, TensorPolicy
from fkd_med.federated.public_digest import shared_logits
from fkd_med.federated.rules import ClientRule, supplied
from fkd_med.federated.server_distillation import ServerDistillation
from fkd_med.federated.sharing import check_consent

# Made when first used. jsonargparse looks for the calling module, hence the lambda, through every frame of the stack,
# which takes two seconds of an import's deep one, and nothing of a thread's.
with ThreadPoolExecutor(1) as _thread:
    _AGGREGATOR, _FIREWALL = _thread.map(lambda kind: lazy_instance(kind), (FedAvg, Firewall))


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
        server_distillation: how the server goes on training the aggregated student, on the images of `data.public`:
            FedDF; null for no such training.
        client_rules: what an algorithm changes in the clients' training: FedProx, ScaffoldRule, FedNovaRule.
        share_logits: consent of all clients to send their students' logits on the images of `data.public` (FedMD);
            without it, whatever would send them is refused.
        uplink: how updates are packed: codec, weights or deltas, compression; plain float32 when left out.
        downlink: how broadcasts are packed; of weights, since a client may have missed the last broadcast.
        uplink_mbps: speed of the clients' links to the server in Mbit/s, one number or one by client: what the bytes
            that are counted would take in seconds. Nothing is slowed down.
        downlink_mbps: the same from the server to the clients; as `uplink_mbps` when left out.
        batch_norm: ``average`` combines BatchNorm's tensors as all others; ``local`` keeps them with each client
            (FedBN); ``recalibrate`` sends its weights but no statistics: each client computes them afresh from its
            training images.
        personal: name patterns (``network.head.*``) of further tensors that stay with each client.
        frozen: name patterns of tensors that are not trained and do not travel.
        optimizer_state: whether a client's optimizer starts afresh each round or keeps its moments.
        share_teachers: the partners' consent that every client's teacher goes to all others, once, before the first
            round; for a teacher source that shares them (EnsembleTeachers), and only with it.
        client_callbacks: Lightning callbacks for every client's Trainer (batches, gradients, optimizers).
        chaos: simulated trouble, for teaching and for tests; null for none.
        local_baseline: after the run, also train each client alone with the same budget, for the end table.
        threads: CPU threads torch uses for training; results are bit-identical only for the same number.
        parallel: how many clients train at the same time, each in a process of its own with `threads` threads; the
            results are those of one after the other. For one device per client.
    """

    def __init__(
        self,
        rounds: int = 20,
        local_epochs: int = 1,
        local_steps: int | None = None,
        aggregator: Aggregator | None = _AGGREGATOR,
        fraction: float = 1.0,
        participation: Participation | None = None,
        quorum: float = 1.0,
        firewall: Firewall | None = _FIREWALL,
        server_distillation: ServerDistillation | None = None,
        client_rules: list[ClientRule] | None = None,
        share_logits: bool = False,
        uplink: Packing | None = None,
        downlink: Packing | None = None,
        uplink_mbps: Rates = 10.0,
        downlink_mbps: Rates | None = None,
        batch_norm: BatchNormPolicy = "average",
        personal: list[str] | None = None,
        frozen: list[str] | None = None,
        optimizer_state: Literal["reset", "keep"] = "reset",
        share_teachers: bool = False,
        client_callbacks: list[Callback] | None = None,
        chaos: Chaos | None = None,
        local_baseline: bool = False,
        threads: int | None = None,
        parallel: int = 1,
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
        self.aggregator, self.server_distillation = aggregator, server_distillation
        self.participation = participation or Fraction(fraction)
        self.quorum, self.firewall, self.chaos = quorum, firewall, chaos
        if downlink is not None and (downlink.of == "delta" or downlink.error_feedback):
            raise ConfigError(
                "federation.downlink: a delta, or error feedback, needs clients that got every broadcast; use "
                "`of: weights` without error_feedback."
            )
        self.uplink, self.downlink = uplink, downlink
        self.link = Link(uplink_mbps, downlink_mbps)
        self.client_rules = client_rules or []
        self.policy = TensorPolicy(batch_norm, personal or [], frozen or [], everything_stays=not _sends(aggregator))
        self.share_logits = share_logits
        self.logits: PublicLogits | None = None
        """What logits on public images look like; known once a run begins that shares them."""
        self.public: str = ""
        """Hash of the public images, once a run begins that learns from them."""
        self.optimizer_state = optimizer_state
        if share_teachers and aggregator is None:
            raise ConfigError("federation.share_teachers: true, and with `aggregator: null` nothing travels: keep one.")
        self.share_teachers = share_teachers
        self.client_callbacks = client_callbacks or []
        self.local_baseline = local_baseline
        self.threads = threads if threads is None else _positive("threads", threads)
        self.parallel = _positive("parallel", parallel)
        self._check_rules()

    def _check_rules(self) -> None:
        """Refuse an aggregator without the client rule it needs, and rules nobody listens to."""
        if self.server_distillation is not None and not _sends(self.aggregator):
            raise ConfigError(
                f"federation.server_distillation: {type(self.server_distillation).__name__} trains the aggregated "
                "student, and here no weights are aggregated: choose an aggregator such as FedAvg, or leave it out."
            )
        for rule in self.client_rules:
            if rule.starts_afresh and self.optimizer_state == "keep":
                raise ConfigError(
                    f"{type(rule).__name__} is defined for optimizers that begin each round anew, and with "
                    "federation.optimizer_state: keep moments of earlier rounds are carried over: set it to reset."
                )
        self._check_consent()
        if self.aggregator is None:
            return  # alone, rules change the training and nothing is sent
        missing = sorted(self.aggregator.required_sections - supplied(self.client_rules))
        name = aggregator_name(self.aggregator)
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

    def _check_consent(self) -> None:
        """Refuse to share logits without consent, and a consent that nobody uses."""
        shares = PUBLIC_LOGITS in self.sections or (not self.is_local and PUBLIC_LOGITS in supplied(self.client_rules))
        if shares and not self.share_logits:
            raise ConfigError(
                "This federation would send logits on public images, which say more of a client's student than an "
                "average does: set federation.share_logits: true if all clients agree."
            )
        if self.share_logits and not shares:
            raise ConfigError(
                "federation.share_logits: nothing here shares logits. Remove it, or choose the aggregator "
                "fkd_med.aggregation.LogitConsensus with the client rule fkd_med.federated.PublicDigest."
            )

    def begin(self, student: nn.Module, clients: list[str], rounds: int, data: Any = None) -> None:
        """Refuse, before any work, what some later round would refuse; tell the aggregator how many clients there are.

        Args:
            student: the module that is federated.
            clients: all clients of the run.
            rounds: how many rounds there will be.
            data: the data module, asked for public images if something needs them.

        Raises:
            ConfigError: names the setting, the client or the tensor, and the remedy.
        """
        self.policy.check(student)
        check_consent(self.share_teachers, self.is_local, student)
        self.participation.check(clients, rounds)
        self.link.check(clients)
        if self.chaos is not None:
            self.chaos.check(clients)
        if self.aggregator is not None:
            self.aggregator.begin(len(clients))
        for rule in self.acting_rules:
            rule.check(student, data)
        self.logits = shared_logits(student, data) if self.share_logits else None
        if self.server_distillation is not None:
            self.server_distillation.check(student, self.policy)
        learner = (
            "federation.share_logits" if self.server_distillation is None else type(self.server_distillation).__name__
        )
        if self.server_distillation is not None or self.share_logits:
            self.public = getattr(public_images(data, learner), "digest", "")

    @property
    def is_local(self) -> bool:
        """Whether every client trains alone: everything is personal and nothing travels."""
        return self.aggregator is None

    @property
    def acting_rules(self) -> list[ClientRule]:
        """The client rules in force: alone, those that neither send nor wait for anything, as if of one client."""
        return [rule for rule in self.client_rules if not (self.is_local and rule.sections)]

    @property
    def keeps_students(self) -> bool:
        """Whether every client keeps a whole student of its own: alone, or where no weights travel."""
        return self.policy.everything_stays

    @property
    def recalibrates(self) -> bool:
        """Whether BatchNorm's statistics neither travel nor stay, so that each look at a student needs them afresh."""
        return self.policy.batch_norm == "recalibrate" and not self.keeps_students

    @property
    def sections(self) -> frozenset[str]:
        """What may travel beside the student, up or down."""
        return self.aggregator.required_sections | self.aggregator.down_sections if self.aggregator else frozenset()

    def alone(self) -> Federation:
        """Return the recipe with the same training and nobody to send to."""
        recipe = copy.copy(self)
        recipe.aggregator, recipe.local_baseline, recipe.chaos = None, False, None
        recipe.server_distillation, recipe.share_logits, recipe.share_teachers = None, False, False
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


_SUPPLIERS = {"scaffold": "ScaffoldRule", "fednova": "FedNovaRule", PUBLIC_LOGITS: "PublicDigest"}


def aggregator_name(aggregator: Aggregator | None) -> str:
    """Return the aggregator's class, or ``null``; of a default that jsonargparse makes late, what it stands for."""
    return "null" if aggregator is None else type(aggregator).__name__.removeprefix("LazyInstance_")


def _sends(aggregator: Aggregator | None) -> bool:
    """Tell whether weights travel at all."""
    return aggregator is not None and aggregator.weights_travel


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"federation.{name} is {value}: give 1 or more.")
    return value

"""Distillation on the server: after a round's aggregation the global student learns from all that the clients sent.

Nothing more travels for it. Only tensors that travel and are trained may change; what a method does to any other is
dropped. Of several processes the first one works and the others take its result: each computing it would hold as many
global students as there are devices, if their kernels differ in a bit.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import lightning as L
from torch import nn
from torch.utils.data import DataLoader

from fkd_med.aggregation import assert_finite
from fkd_med.communication import State, Update
from fkd_med.data.datasets import collate
from fkd_med.errors import ConfigError
from fkd_med.federated.policy import TensorPolicy, recalibrated
from fkd_med.modules.teacher_cache import Surroundings
from fkd_med.seeding import global_seed, seeded

if TYPE_CHECKING:
    from fkd_med.federated.loop import FederatedLoop
    from fkd_med.federated.trainer import FederatedTrainer


@dataclass(frozen=True, eq=False)
class ServerWork:
    """What a server has at the end of a round, for its own training.

    Args:
        student: the module with the aggregated weights, in eval mode, on the device; trained in place.
        scratch: a copy of it, to be asked as one client after the other.
        updates: the usable updates of the round, lazy and sorted by client; can be iterated again and again.
        policy: which tensors travel.
        images: the public images: items with ``image`` (C, H, W), in a fixed order.
        round: the round.
        seed: the run's seed.
        around: device, precision and progress.
    """

    student: nn.Module
    scratch: nn.Module
    updates: Iterable[Update]
    policy: TensorPolicy
    images: Any
    round: int
    seed: int
    around: Surroundings

    def models(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield each client's name and model, in eval mode; it is the next client's when that one is asked for."""
        start = {name: tensor.clone() for name, tensor in self.scratch.state_dict().items()}
        for update in self.updates:
            self.scratch.load_state_dict({**start, **update.state})
            self.complete(self.scratch)
            yield update.client, self.scratch.eval()

    def complete(self, model: nn.Module) -> None:
        """Give a model its BatchNorm statistics where these never travel: those of the public images."""
        if self.policy.batch_norm == "recalibrate":
            loader: DataLoader[Any] = DataLoader(self.images, batch_size=8, collate_fn=collate)
            model.load_state_dict({**model.state_dict(), **recalibrated(model, loader)})


class ServerDistillation(ABC):
    """How the server goes on training the aggregated student, on public images."""

    needs_whole_models: ClassVar[bool] = True
    """Whether clients' models are asked for answers, which none can give of whom the server has only a part."""

    @abstractmethod
    def distil(self, work: ServerWork) -> dict[str, float]:
        """Train ``work.student`` in place, on what depends on the seed and the round only.

        Returns:
            What to log, by name.
        """

    def check(self, student: nn.Module, policy: TensorPolicy) -> None:
        """Refuse, before any work, a federation whose clients keep parts of their models.

        Raises:
            ConfigError: names a tensor that stays.
        """
        stay = policy.staying(student)
        if policy.batch_norm == "recalibrate":  # the server computes the statistics too, see `ServerWork.complete`
            stay -= {name for name, _ in student.named_buffers()}
        if self.needs_whole_models and stay:
            raise ConfigError(
                f"{type(self).__name__} asks every client's model for answers, and the server never has all of it: "
                f"{min(stay)} stays with each client. Use federation.batch_norm: average or recalibrate, and no "
                "federation.personal."
            )


def distilled(trainer: FederatedTrainer, state: State, updates: Iterable[Update]) -> State:
    """Return the aggregated state as the server's distillation leaves it, the same on every process.

    Args:
        trainer: the server's trainer, in a round.
        state: the aggregated state.
        updates: the usable updates of the round.

    Raises:
        TrainingError: a loss or a tensor is no longer finite.
    """
    federation = trainer.federation
    if federation is None or federation.server_distillation is None:
        return state
    method, loop = federation.server_distillation, cast("FederatedLoop", trainer.fit_loop)
    found = _distil(trainer, method, state, updates, loop.round) if trainer.is_global_zero else ({}, {})
    changed, metrics = trainer.strategy.broadcast(found)
    loop.gathering.metrics |= {f"server/{name}": value for name, value in metrics.items()}
    return {**state, **changed}


def _distil(
    trainer: FederatedTrainer, method: ServerDistillation, state: State, updates: Iterable[Update], round: int
) -> tuple[State, dict[str, float]]:
    """Return what changed of the state, and what to log."""
    assert trainer.federation is not None
    around, policy = Surroundings.of(trainer), trainer.federation.policy
    images = trainer.datamodule.public_images()
    student = _copied(trainer.lightning_module, state, around)
    scratch = _copied(trainer.lightning_module, state, around)
    free = set(policy.travelling(student))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in free)
    with seeded(global_seed(), "server distillation", round):
        work = ServerWork(student, scratch, updates, policy, images, round, global_seed(), around)
        work.complete(student)
        metrics = method.distil(work)
    changed = {name: p.detach().cpu().clone() for name, p in student.named_parameters() if p.requires_grad}
    assert_finite(changed, f"The server's distillation, round {round}")
    return changed, metrics


def _copied(module: L.LightningModule, state: State, around: Surroundings) -> nn.Module:
    """Return a copy of the server's module with another state; the module itself is never trained."""
    made = copy.deepcopy(module)
    made.load_state_dict({**made.state_dict(), **state})
    return made.to(around.device).eval()

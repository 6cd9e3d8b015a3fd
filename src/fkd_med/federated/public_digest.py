"""FedMD on the client: learn what all say about public images, then from one's own, then say what one thinks now."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from fkd_med.communication import PUBLIC_LOGITS, Broadcast, PublicLogits, State
from fkd_med.errors import ConfigError, TrainingError
from fkd_med.federated.client_data import public_images
from fkd_med.federated.public_learning import (
    Answers,
    Positions,
    answers,
    approach,
    check_steps,
    minibatches,
)
from fkd_med.federated.rules import ClientRule
from fkd_med.losses.tensors import check_temperature
from fkd_med.modules.settings import SharedCallable
from fkd_med.modules.teacher_cache import Surroundings
from fkd_med.networks.eval_mode import evaluating
from fkd_med.ranks import is_first_rank
from fkd_med.seeding import derive_seed

_LARGEST = torch.finfo(torch.float16).max


class PublicDigest(ClientRule):
    """FedMD's client (Li and Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", 2019, Algorithm 1).

    A round is: digest, the student is trained towards the consensus that the server sent, by KL(consensus || student)
    averaged over the pixels of public images; revisit, it is trained on its own images as ever; communicate, its
    logits on this round's public images are sent as float16. In the first round there is no consensus yet. Digestion
    has an optimizer of its own, and runs in eval mode: BatchNorm keeps the statistics of the client's own images. Goes
    with the aggregator `fkd_med.aggregation.LogitConsensus` and needs ``share_logits``.

    Args:
        images: public images per round, drawn from the seed and the round, the same for all clients; null for all.
        epochs: passes over the images of the consensus.
        batch_size: public images per step.
        temperature: softens both sides, above 0; the loss is multiplied by its square.
        optimizer: called with the student's parameters, afresh in every round.

    Raises:
        ConfigError: a setting out of its range.
    """

    sections = frozenset({PUBLIC_LOGITS})

    def __init__(
        self,
        images: int | None = None,
        epochs: int = 1,
        batch_size: int = 16,
        temperature: float = 1.0,
        optimizer: OptimizerCallable = torch.optim.Adam,
    ) -> None:
        check_steps(self, images=1 if images is None else images, epochs=epochs, batch_size=batch_size)
        check_temperature(temperature)
        self.images, self.epochs, self.batch_size, self.temperature = images, epochs, batch_size, temperature
        self.optimizer = SharedCallable(optimizer)
        self._public: Any = None
        self._consensus: State = {}
        self._said: State = {}
        self._seed = self._round = 0

    def check(self, module: nn.Module, data: Any) -> None:
        """Refuse data without public images, or with fewer than are wanted (ConfigError)."""
        count = len(public_images(data, type(self).__name__))
        if self.images is not None and self.images > count:
            raise ConfigError(
                f"PublicDigest: images is {self.images}, and data.public holds {count}: lower it, or leave it out."
            )

    def meet(self, data: Any, client: str, seed: int) -> None:
        """Take the public images and the run's seed."""
        self._public, self._seed = public_images(data, type(self).__name__), seed

    def begin(self, broadcast: Broadcast, kept: State) -> None:
        """Take the consensus of the last round, if there is one."""
        self._round, self._consensus, self._said = broadcast.round, broadcast.extras.get(PUBLIC_LOGITS, {}), {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Digest: train towards the consensus. Of several processes the first works, and the others take its result.

        Raises:
            TrainingError: the loss is not finite.
        """
        if not self._consensus:
            return
        if is_first_rank():
            self._digest(pl_module, Surroundings.of(trainer))
        if trainer.world_size > 1:
            state = {name: tensor.cpu() for name, tensor in pl_module.state_dict().items()}
            pl_module.load_state_dict(trainer.strategy.broadcast(state))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Leave the training on the client's own images as it is."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ask the trained student about this round's public images.

        Raises:
            TrainingError: it answers with NaN or infinity.
        """
        positions, around = self.chosen(len(self._public), self._seed, self._round), Surroundings.of(trainer)
        try:
            with evaluating(pl_module):
                batches = list(answers(pl_module, self._public, positions, self.batch_size, around))
        except TrainingError as error:
            raise TrainingError(f"A student {error} in round {self._round}: lower the learning rate.") from error
        self._said = as_section(positions, torch.cat(batches))

    def end(self, trained: State) -> tuple[dict[str, State], State]:
        """Return the student's logits for the server."""
        return {PUBLIC_LOGITS: self._said}, {}

    def chosen(self, count: int, seed: int, round: int) -> Positions:
        """Return the places of a round's public images, sorted, out of `count`."""
        if self.images is None:
            return np.arange(count)
        random = np.random.default_rng(derive_seed(seed, "public images", round))
        return np.sort(random.permutation(count)[: self.images])

    def _digest(self, module: nn.Module, around: Surroundings) -> None:
        targets = from_section(self._consensus)
        steps = -(-self.epochs * len(targets.positions) // self.batch_size)
        batches = minibatches(targets.positions, self.batch_size, steps, self._seed, "digest", self._round)
        optimizer = self.optimizer(p for p in module.parameters() if p.requires_grad)
        approach(module, self._public, targets, batches, optimizer, self.temperature, around, anneal=False)


def as_section(positions: Positions, logits: Tensor) -> State:
    """Return logits (n, K, H, W) as a section: float16 maps (K, H, W) by the images' places."""
    halves = logits.clamp(-_LARGEST, _LARGEST).half()
    return {str(position): own.clone() for position, own in zip(positions.tolist(), halves, strict=True)}


def from_section(section: State) -> Answers:
    """Return the answers that a section holds."""
    positions = np.array(sorted(map(int, section)), dtype=np.int64)
    return Answers(positions, torch.stack([section[str(position)] for position in positions]))


@torch.no_grad()
def shared_logits(student: nn.Module, data: Any) -> PublicLogits:
    """Return what logits on public images look like: how many there can be and their shape (K, H, W), by a dry pass."""
    images = public_images(data, "federation.share_logits")
    first = next(student.parameters())
    with evaluating(student):
        logits = student(images[0]["image"][None].to(first.device, first.dtype))
    return PublicLogits(len(images), tuple(logits.shape[1:]))

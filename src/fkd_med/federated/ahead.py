"""Who knows more of a client's own validation images, its student or a teacher: one that is behind should not teach.

A teacher trained on few images is soon outgrown by what all hospitals learn together, and from then on holds the
student back; a pretrained one may stay ahead to the end. Which it is, a schedule cannot know, and these images can.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from fkd_med.communication import Broadcast, State
from fkd_med.distillation.views import of_views
from fkd_med.errors import ConfigError
from fkd_med.evaluation import score_image
from fkd_med.federated.client_data import ClientData
from fkd_med.federated.rules import ClientRule
from fkd_med.modules import DistillationModule, MutualDistillationModule, predict_classes
from fkd_med.modules.teacher import freeze
from fkd_med.modules.teacher_cache import Surroundings
from fkd_med.networks import forward_padded
from fkd_med.networks.eval_mode import evaluating, ready
from fkd_med.ranks import of_all_ranks
from fkd_med.seeding import global_seed, seeded


class TeachWhileAhead(ClientRule):
    """Let a client's own teacher teach only in rounds that begin with a student behind it.

    Both are scored on the client's validation images at working resolution (mean Dice), the student as the round begins
    with it, personal tensors included. A teacher that is not ahead says nothing in this round, and costs nothing. Its
    score is measured once and stays with the client; the difference is logged as ``train/teacher_lead``. The rule is
    ours.

    Raises:
        ConfigError: before any training: a module that has no teacher of its own or trains it, or that would be left
            without any loss; a client without validation images.
    """

    def __init__(self) -> None:
        self._data: ClientData
        self._client = ""
        self._kept: State = {}

    def check(self, module: nn.Module, data: Any) -> None:
        """Refuse modules in which no frozen teacher teaches beside the masks, and clients without validation images."""
        if not isinstance(module, DistillationModule) or isinstance(module, MutualDistillationModule):
            raise ConfigError(
                f"TeachWhileAhead goes with fkd_med.modules.DistillationModule, whose teachers are frozen, and "
                f"{type(module).__name__} is none: remove it from federation.client_rules."
            )
        if module.supervised_weight == 0:
            raise ConfigError(
                "TeachWhileAhead would leave a student without any loss where its teacher is not ahead: set "
                "model.supervised_weight above 0, or remove the rule."
            )
        bare = [] if data is None else [c for c in data.client_names() if len(data.client_val_dataloader(c)) == 0]
        if bare:
            raise ConfigError(
                f"TeachWhileAhead compares teacher and student on validation images, and client {bare[0]!r} has none: "
                "give it some (data.val_fraction), or remove the rule."
            )

    def meet(self, data: Any, client: str, seed: int) -> None:
        """Take the client's images."""
        self._data, self._client = data, client

    def begin(self, broadcast: Broadcast, kept: State) -> None:
        """Take the teacher's score of an earlier round, if there is one."""
        self._kept = dict(kept)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare, and silence a teacher that is not ahead; all ranks see the same scores."""
        assert isinstance(pl_module, DistillationModule)
        if pl_module.active_losses and pl_module.teacher_source is not None:
            around = Surroundings.of(trainer)
            self.complete(pl_module.network)
            student = validation_dice(pl_module.network, self._data, self._client, around)
            lead = self._teachers(pl_module, around) - student
            pl_module.log("train/teacher_lead", lead, on_step=False, on_epoch=True, batch_size=1)
            pl_module.teaches = lead > 0

    def _teachers(self, module: DistillationModule, around: Surroundings) -> float:
        """Return the teacher's Dice: what the client keeps of it, if it is of this teacher, images and precision."""
        source = module.teacher_source
        assert source is not None
        views, images = module.teacher_views, self._data.fingerprint(self._client)
        scored = json.dumps([source.digest(self._client), images, views, around.precision])
        key = torch.frombuffer(bytearray(hashlib.sha256(scored.encode()).digest()), dtype=torch.uint8)
        if not torch.equal(self._kept.get("scored", torch.empty(0)), key):
            teacher = freeze(of_views(source.load(self._client), views)).to(around.device)
            dice = validation_dice(teacher, self._data, self._client, around)
            self._kept = {"scored": key, "dice": torch.tensor(dice, dtype=torch.float64)}
        return float(self._kept["dice"])

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Leave the gradients as they are: a silent teacher is not in the loss."""

    def end(self, trained: State) -> tuple[dict[str, State], State]:
        """Send nothing; keep the teacher's score."""
        return {}, self._kept


@torch.no_grad()
def validation_dice(network: nn.Module, data: ClientData, client: str, around: Surroundings) -> float:
    """Return a network's mean Dice over a client's validation images, each counted once, on any number of ranks.

    Args:
        network: images (N, C, H, W) to logits, on the device; scored in eval mode, and left as it is.
        data: gives the images at working resolution.
        client: the client.
        around: device and precision.
    """
    found: dict[str, float] = {}
    with seeded(global_seed(), "validation", client), evaluating(network), around.autocast():
        for batch in data.client_val_dataloader(client):
            logits: Tensor = forward_padded(network, ready(batch["image"], network, around.device))
            predictions = predict_classes(logits.float()).cpu().numpy()
            for name, prediction, truth in zip(batch["id"], predictions, batch["mask"].numpy(), strict=True):
                found[name] = score_image(prediction, truth, logits.shape[1], hd95=False).dice
    scores = {name: dice for part in of_all_ranks(found) for name, dice in part.items()}
    return sum(scores[name] for name in sorted(scores)) / len(scores)

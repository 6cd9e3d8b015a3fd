"""Distillation of a frozen teacher into a student, in one client or on pooled data."""

from __future__ import annotations

import re
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional

from fkd_med.errors import ConfigError, TrainingError
from fkd_med.losses import DistillationTerm, LogitKL, supervised_loss
from fkd_med.modules.segmentation import SegmentationModule
from fkd_med.modules.teacher import TeacherSource, Teaching, freeze
from fkd_med.networks import forward_padded


class DistillationModule(SegmentationModule):
    """Trains a student on masks and on what a frozen teacher answers.

    The loss is ``supervised_weight * loss + sum of weight * term``. FKD-Med (IEEE Access 2024) is
    ``supervised_weight: 0.2`` with one `LogitKL` of temperature 5 and weight 0.8.

    Args:
        network: the student: images (N, C, H, W) to logits (N, K, H, W).
        teacher: where each client's teacher comes from; none is built to validate, test or predict.
        losses: distillation terms by name; a weight of 0 turns a term off and costs nothing.
        supervised_weight: weight of the supervised loss.
        loss: the supervised loss of logits and masks (N, H, W); Dice plus cross-entropy when left out.
        optimizer: called with the parameters, afresh in every round of a federation.
        scheduler: called with the optimizer; it spans the whole run, whatever the number of rounds.
        scheduler_interval: the unit in which the scheduler counts.
    """

    def __init__(
        self,
        network: nn.Module,
        teacher: TeacherSource | None = None,
        losses: dict[str, DistillationTerm] | None = None,
        supervised_weight: float = 1.0,
        loss: nn.Module | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: str = "step",
    ) -> None:
        super().__init__(network, loss, optimizer, scheduler, scheduler_interval)
        self._teaching = Teaching(teacher)
        self.model_name = "student"
        self.losses = dict(losses) if losses is not None else {"logit_kl": LogitKL()}
        self.supervised_weight = supervised_weight
        odd = [name for name in self.losses if not re.fullmatch(r"\w+", name, re.ASCII)]
        if odd:
            raise ConfigError(f"model.losses: {', '.join(odd)} names a term; use letters, digits and '_' only.")
        if supervised_weight == 0 and not self.active_losses:
            raise ConfigError("Every weight of the loss is 0: give model.supervised_weight or a term of model.losses.")

    @property
    def active_losses(self) -> dict[str, DistillationTerm]:
        """The distillation terms whose weight is not 0."""
        return {name: term for name, term in self.losses.items() if term.weight != 0}

    @property
    def teacher_source(self) -> TeacherSource | None:
        """Where teachers come from."""
        return self._teaching.source

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher of the moment: outside the state dict, the optimizer and every checkpoint."""
        return self._teaching.network

    def attach_teacher(self, teacher: nn.Module | None) -> None:
        """Take a teacher to learn from; it is frozen. ``None`` lets go of the last one."""
        self._teaching.network = None if teacher is None else freeze(teacher)

    def on_fit_start(self) -> None:
        """Outside a federation, get the teacher of the data that is trained on, then move it to the device."""
        if not self.active_losses or getattr(self.trainer, "federation", None) is not None:
            return  # the server of a federation learns from nobody; its clients bring their teachers
        if self.teacher is None:
            self._attach_from_source()
        assert self.teacher is not None
        self.attach_teacher(self.teacher.to(self.device))

    def _attach_from_source(self) -> None:
        source = self.teacher_source
        if source is None:
            raise ConfigError("Distillation needs a teacher: give model.teacher, or use SegmentationModule.")
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        client = getattr(data, "client", None)
        source.check_names([client] if client else [])
        source.ensure(client, data, **getattr(self.trainer, "teacher_options", dict)())
        self.attach_teacher(source.load(client))

    def on_fit_end(self) -> None:
        """Let the device forget the teacher."""
        if self.teacher is not None:
            self.attach_teacher(self.teacher.cpu())

    def loss_terms(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the weighted supervised loss and distillation terms of a batch."""
        logits = self(batch["image"])
        terms = {}
        if self.supervised_weight != 0:
            terms["supervised"] = self.supervised_weight * supervised_loss(self.loss, logits, batch["mask"])
        if active := self.active_losses:
            taught = self.teach(batch, logits)
            for name, term in active.items():
                raw = term(logits, taught, batch["mask"])
                self.log(f"train/{name}_raw", raw.detach(), batch_size=len(logits), on_epoch=True)
                terms[name] = term.weight * raw
        return terms

    def teach(self, batch: dict[str, Any], like: Tensor) -> Tensor:
        """Return the teacher's logits for a batch, at the student's resolution, without gradients.

        Raises:
            TrainingError: the teacher answers with NaN or infinity; the images are named.
            ConfigError: teacher and student have different numbers of classes.
        """
        assert self.teacher is not None
        with torch.no_grad():
            logits = forward_padded(self.teacher, batch["image"])
        if logits.shape[1] != like.shape[1]:
            raise ConfigError(
                f"The teacher has {logits.shape[1]} output channels and the student {like.shape[1]}: "
                "give both networks the same `classes`."
            )
        bad = [name for name, ok in zip(batch["id"], torch.isfinite(logits).flatten(1).all(1), strict=True) if not ok]
        if bad:
            raise TrainingError(
                f"The teacher of client {batch['client'][0]} answers with NaN or infinity for {', '.join(bad[:4])}: "
                "train it again (delete it from the teacher store) or look at these images."
            )
        if logits.shape[2:] != like.shape[2:]:
            logits = functional.interpolate(logits, size=like.shape[2:], mode="bilinear", align_corners=False)
        return logits.detach()

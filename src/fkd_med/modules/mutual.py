"""Mutual distillation: a local teacher and the shared student train side by side and learn from each other (FedKD)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from fkd_med.distillation import Companions, Taps, match
from fkd_med.errors import ConfigError
from fkd_med.losses import LOGITS, DistillationTerm, LogitKL
from fkd_med.modules.distillation import DistillationModule
from fkd_med.modules.distillation_checks import check_mutual
from fkd_med.modules.labels import pixels_of, supervised_part
from fkd_med.modules.teacher import TeacherSource

TEACHER = "teacher"
SMALLEST_SUM = 1e-6  # of the task losses: two networks without any error have nothing to tell each other


class MutualDistillationModule(DistillationModule):
    """Trains a student and its teacher together: each learns from the masks and from the other.

    Source: Wu et al., "Communication-efficient federated learning via knowledge distillation" (FedKD), 2022, adaptive
    mutual distillation. With task losses L_s and L_t of student and teacher against the masks, the student's loss is
    ``L_s + sum of weight * term(student, teacher) / (L_s + L_t)`` and the teacher's
    ``L_t + sum of weight * term(teacher, student) / (L_s + L_t)``: the worse both are, the less they copy. In each,
    the other network is a constant. So is the divisor, a measure of trust: were it differentiated, a larger task loss
    would be rewarded. It is at least 1e-6.

    ``train/supervised`` and ``train/<term>`` are the student's, ``train/teacher_supervised`` and
    ``train/teacher_<term>`` the teacher's; ``train/loss`` is their sum. Only the student is validated, travels and is
    exported. Connectors are trained by the student's loss. One optimizer holds both networks, so
    ``trainer.gradient_clip_val`` clips the norm over both together.

    Args:
        network: the student: images (N, C, H, W) to logits (N, K, H, W).
        teacher: where each client's teacher comes from at first; it then trains on from round to round, and stays with
            its client. ``epochs: 0`` of a `fkd_med.federated.TeacherStage` starts with an untrained one.
        losses: distillation terms by name, applied in both directions; a weight of 0 turns a term off.
        loss: the task loss of logits and masks (N, H, W), never negative; Dice plus cross-entropy when left out.
        optimizer: called with the parameters of both, afresh in every round of a federation.
        scheduler: called with the optimizer; it spans the whole run, whatever the number of rounds.
        scheduler_interval: the unit in which the scheduler counts.
        teacher_lr: the teacher's learning rate; that of the optimizer when left out.

    Raises:
        ConfigError: a term that means nothing the other way round: of logits and features, or a connector for logits;
            teachers that partners share.
    """

    def __init__(
        self,
        network: nn.Module,
        teacher: TeacherSource | None = None,
        losses: dict[str, DistillationTerm] | None = None,
        loss: nn.Module | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: str = "step",
        teacher_lr: float | None = None,
    ) -> None:
        losses = losses if losses is not None else {"logit_kl": LogitKL(temperature=1.0)}
        super().__init__(network, teacher, losses, 1.0, loss, optimizer, scheduler, scheduler_interval, "off")
        check_mutual(self.losses, teacher_lr)
        if teacher is not None and teacher.shares:
            raise ConfigError(
                f"Mutual distillation trains each client's own teacher on, and {type(teacher).__name__} gives all the "
                "same ensemble: use fkd_med.federated.TeacherStage."
            )
        self.teacher_lr = teacher_lr
        self._teacher_taps: Taps | None = None

    # --- the teacher, a companion of the student ------------------------------------------------------------------

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher of the moment: trained, but outside the state dict, every message and every export."""
        return self.companions.of(TEACHER)

    def attach_teacher(self, teacher: nn.Module | None) -> None:
        """Take a copy of a teacher to train on; ``None`` lets go of the last one.

        Raises:
            ConfigError: it has no parameter that may be trained.
        """
        self._teaching.attach(None)
        self._remove_taps()
        if TEACHER in self.companions:
            del self.companions[TEACHER]
        if teacher is None:
            return
        if not any(parameter.requires_grad for parameter in teacher.parameters()):
            raise ConfigError(
                f"Mutual distillation trains the teacher, and {type(teacher).__name__} is frozen: unfreeze it, or use "
                "fkd_med.modules.DistillationModule."
            )
        self.companions[TEACHER] = copy.deepcopy(teacher).train().to(self.device)

    def teachers_after(self, kept: Callable[[str | None], Mapping[str, Tensor]]) -> TeacherSource | None:
        """Return the teachers as they are after each client's last round."""
        return None if self.teacher_source is None else GrownTeachers(self.teacher_source, kept)

    def check_teachers(self, clients: Sequence[str | None]) -> None:
        """Refuse clients that do not exist; a teacher may be untrained, since it learns here."""
        assert self.teacher_source is not None
        self.teacher_source.check_names([client for client in clients if client])

    def on_fit_start(self) -> None:
        """Do nothing: a companion has come to the device with the module."""

    def on_fit_end(self) -> None:
        """Take the hooks off; the teacher stays, as the student does."""
        self._let_go()

    def _let_go(self) -> None:
        self._remove_taps()
        self._teaching.is_prepared = False

    def _remove_taps(self) -> None:
        for taps in (self._student_taps, self._teacher_taps):
            if taps is not None:
                taps.remove()
        self._student_taps = self._teacher_taps = None

    # --- training -------------------------------------------------------------------------------------------------

    def trained_parameters(self) -> Any:
        """Return the parameters of both networks; in two groups if the teacher has a learning rate of its own."""
        own = [] if self.teacher is None else [p for p in self.teacher.parameters() if p.requires_grad]
        if self.teacher_lr is None or not own:
            return super().trained_parameters()
        theirs = {id(parameter) for parameter in own}
        ours = [p for p in self.parameters() if p.requires_grad and id(p) not in theirs]
        return [{"params": ours}, {"params": own, "lr": self.teacher_lr}]

    def loss_terms(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the terms of both losses of a batch: the student's under their names, the teacher's after `teacher_`.

        Raises:
            ConfigError: there is no teacher, or a task loss is negative.
        """
        if not self.active_losses:
            return super().loss_terms(batch)
        weights = self.term_weights
        batch = self.learned_part(batch, by_terms=bool(weights))
        student, teacher = self._look(batch["image"])
        terms = {
            "supervised": supervised_part(self.loss, student[LOGITS], batch),
            "teacher_supervised": supervised_part(self.loss, teacher[LOGITS], batch),
        }
        trust = trust_of(terms["supervised"], terms["teacher_supervised"])
        pixels = pixels_of(batch, student[LOGITS])
        for name, weight in weights.items():
            term, connector = self.losses[name], self.companions.of(name)
            ours, theirs, seen = match(
                term, student[term.student_tap], teacher[term.teacher_tap], pixels, None, connector
            )
            for whose, learner, other in (("", ours, theirs), ("teacher_", theirs, ours)):
                raw = term(learner, other.detach(), seen)
                self.log(f"train/{whose}{name}_raw", raw.detach(), batch_size=len(batch["image"]), on_epoch=True)
                terms[f"{whose}{name}"] = weight * trust * raw
        self._keep_in_graph(terms, student[LOGITS], weights)
        return terms

    def _look(self, image: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what student and teacher answer, by tap."""
        if self.teacher is None:
            raise ConfigError("Mutual distillation needs a teacher: give model.teacher, or attach_teacher(network).")
        if self._student_taps is None or self._teacher_taps is None:
            self._remove_taps()
            active = self.active_losses.values()
            self._student_taps = Taps(self.network, [term.student_tap for term in active], "the student")
            self._teacher_taps = Taps(self.teacher, self.teacher_taps, f"the teacher {type(self.teacher).__name__}")
        return self._student_taps(image, self), self._teacher_taps(image)


class GrownTeachers(TeacherSource):
    """Teachers that have trained on beside the student, as they are now.

    Args:
        source: gave them at first, and still does for a client that never took part.
        kept: gives the tensors of a client's companions.
    """

    def __init__(self, source: TeacherSource, kept: Callable[[str | None], Mapping[str, Tensor]]) -> None:
        self.source, self.kept = source, kept

    def ensure(self, client: str | None, data: Any, **options: Any) -> Path:
        """Return the checkpoint that the client's teacher started from."""
        return self.source.ensure(client, data, **options)

    def load(self, client: str | None) -> nn.Module:
        """Return the client's teacher network as it is now, on the CPU."""
        companions = Companions()
        companions[TEACHER] = self.source.load(client)
        companions.load_tensors({n: t for n, t in self.kept(client).items() if n.startswith(f"{TEACHER}.")})
        return companions[TEACHER]


def trust_of(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 / (sum of both task losses), a constant: how far the networks may copy each other.

    Raises:
        ConfigError: a loss is negative, so that the sum says nothing of the error.
    """
    both = torch.stack([student.detach(), teacher.detach()])
    if bool((both < 0).any()):
        raise ConfigError(
            f"Mutual distillation divides by the sum of the task losses, and one is {float(both.min()):.4g}: choose a "
            "model.loss that is never negative."
        )
    return 1 / both.sum().clamp(min=SMALLEST_SUM)

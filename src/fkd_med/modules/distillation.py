"""Distillation of a frozen teacher into a student, in one client or on pooled data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from fkd_med.distillation import Companions, Taps, TeacherMaps, match, rehearse, sample_image
from fkd_med.distillation.views import Views, check_square, of_views
from fkd_med.errors import ConfigError
from fkd_med.losses import LOGITS, DistillationTerm, LogitKL
from fkd_med.modules.distillation_checks import (
    check_companions_fit,
    check_connectors_known,
    check_settings,
    weights_at,
)
from fkd_med.modules.labels import pixels_of, supervised_part
from fkd_med.modules.schedule import progress_of
from fkd_med.modules.segmentation import SegmentationModule
from fkd_med.modules.teacher import TeacherSource, Teaching, freeze
from fkd_med.modules.teacher_cache import Surroundings, check_carries, check_precision, ensure_maps, refuse_non_finite
from fkd_med.seeding import global_seed, seeded

TeacherCache = Literal["off", "logits", "taps"]


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
        teacher_cache: ``logits`` asks the teacher once per training image and keeps its logits on disk; ``taps`` keeps
            tapped features too; ``off`` runs the teacher at every step, on the augmented image.
        teacher_views: over how many views of an image the teacher's logits are averaged: 1, the image as it is; 2, it
            and its mirror; 4, its flips; 8, its flips and quarter turns. A cached teacher is asked that often once, a
            live one at every step.
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
        teacher_cache: TeacherCache | Literal[False] = "logits",  # False: what YAML makes of an unquoted off
        teacher_views: Views = 1,
    ) -> None:
        super().__init__(network, loss, optimizer, scheduler, scheduler_interval)
        self._teaching = Teaching(teacher)
        self._student_taps: Taps | None = None
        self.companions = Companions()
        self.model_name = "student"
        self.losses = dict(losses) if losses is not None else {"logit_kl": LogitKL()}
        self.supervised_weight = supervised_weight
        self.teacher_cache = teacher_cache or "off"
        self.teacher_views = teacher_views
        self.teaches = True  # whether the teacher is listened to; a client rule may silence it for a round
        check_settings(self.losses, supervised_weight, self.teacher_cache, teacher_views)
        if teacher is not None:
            teacher.check_taps(self.teacher_taps)

    # --- what is distilled, and from whom -----------------------------------------------------------------------

    @property
    def active_losses(self) -> dict[str, DistillationTerm]:
        """The distillation terms whose weight is not 0."""
        return {name: term for name, term in self.losses.items() if term.weight != 0}

    @property
    def teacher_taps(self) -> list[str]:
        """What the terms need of a teacher besides its logits."""
        return sorted({term.teacher_tap for term in self.active_losses.values()} - {LOGITS})

    @property
    def teacher_source(self) -> TeacherSource | None:
        """Where teachers come from."""
        return self._teaching.source

    def teachers_after(self, kept: Callable[[str | None], Mapping[str, Tensor]]) -> TeacherSource | None:
        """Return the teachers as a training has left them: those of the source, since nobody trains them further.

        Args:
            kept: gives the tensors of a client's companions after its last round.
        """
        return self.teacher_source

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher of the moment: outside the state dict, the optimizer and every checkpoint."""
        return self._teaching.network

    def learn_alone(self) -> None:
        """Learn without partners from now on: where nothing travels, no teacher is shared."""
        if self._teaching.source is not None:
            self._teaching.source = self._teaching.source.alone()

    def attach_teacher(self, teacher: nn.Module | None) -> None:
        """Take a teacher to learn from, in `teacher_views`; it is frozen. ``None`` lets go of the last one."""
        self._teaching.attach(None if teacher is None else freeze(of_views(teacher, self.teacher_views)))

    def check_teachers(self, clients: Sequence[str | None]) -> None:
        """Refuse, before any training, a source that cannot give these clients teachers to learn from."""
        assert self.teacher_source is not None
        self.teacher_source.check_names([client for client in clients if client])
        self.teacher_source.check_trained(clients)

    def check_data(self, data: Any, around: Surroundings) -> None:
        """Refuse data and precisions that cannot carry the cached maps that the configuration asks for."""
        source = self.teacher_source
        if self.teacher_cache != "off" and source is not None and source.maps_folder() and not around.is_trial:
            check_carries(data)
            check_precision(around.precision)

    def learn_from(self, client: str | None, data: Any, maps: TeacherMaps | None) -> None:
        """Take a client's teacher: its cached maps, which training batches of `data` then bring, or the network.

        Args:
            client: the client; None is the pool of all. The source has its teacher (`TeacherSource.ensure`).
            data: the data module.
            maps: the cached maps (`ensure_maps`); None for a teacher that runs at every step.
        """
        source = self.teacher_source
        assert source is not None
        if maps is not None or hasattr(data, "teacher_maps"):
            data.teacher_maps = maps
        self.attach_teacher(source.load(client) if maps is None else None)
        self._teaching.is_prepared, self._teaching.is_cached = True, maps is not None

    # --- before and after training ------------------------------------------------------------------------------

    def rehearse(self, image: Tensor, teacher: nn.Module | None = None) -> None:
        """Check by one dry pass that all taps exist and all terms can compare what they get; build the connectors.

        Args:
            image: one image (1, C, H, W).
            teacher: a network of the teacher's architecture; the source's or the attached one when left out.

        Raises:
            ConfigError: names the term, the taps and the shapes, or the modules nearest to a wrong tap; images that are
                not square cannot be seen in 8 views.
        """
        check_square(self.teacher_views, image)
        architecture = self.teacher_source.architecture() if self.teacher_source is not None else None
        teacher = teacher or self.teacher or architecture
        if teacher is None:
            return
        with seeded(global_seed(), "connectors"):
            found = rehearse(self.network, teacher, self.active_losses, image)
        for name, layer in found.items():  # in the order of the terms, on every rank and in every run
            if name not in self.companions:
                self.companions[name] = layer.to(self.device)

    def setup(self, stage: str) -> None:
        """Make the dry pass before training outside a federation; the server of one has made it for its clients."""
        super().setup(stage)
        if stage != "fit" or self._learns_elsewhere or self._is_clients_copy:
            return
        self._let_go()  # of what an interrupted fit left behind
        data = getattr(self.trainer, "datamodule", None)
        if self.teacher is None:
            self.check_data(data, Surroundings.of(self.trainer))
        image = sample_image(data)
        if image is not None:
            self.rehearse(image)
        check_connectors_known(self.active_losses, self.companions)
        if self.teacher is None:  # now, since a scheduler may ask for the training batches before `on_fit_start`
            self._learn_from_source()

    @property
    def _learns_elsewhere(self) -> bool:
        """The server of a federation learns from nobody; its clients bring their teachers."""
        return not self.active_losses or getattr(self.trainer, "federation", None) is not None

    @property
    def _is_clients_copy(self) -> bool:
        """Whether a federation has made this copy for one client's round, and given it its teacher."""
        return self._teaching.is_prepared and getattr(self.trainer, "datamodule", None) is None

    def on_fit_start(self) -> None:
        """Move the teacher, if it runs at every step, to the device."""
        if not self._learns_elsewhere and self.teacher is not None:
            self._teaching.network = self.teacher.to(self.device)

    def _learn_from_source(self) -> None:
        source = self.teacher_source
        if source is None:
            raise ConfigError("Distillation needs a teacher: give model.teacher, or use SegmentationModule.")
        trainer = self.trainer
        data = getattr(trainer, "datamodule", None)
        client = getattr(data, "client", None)
        self.check_teachers([client])
        source.ensure(client, data, **getattr(trainer, "teacher_options", dict)())
        maps = None
        if self.teacher_cache != "off":
            around = Surroundings.of(trainer)
            maps = ensure_maps(source, client, data, self.teacher_taps, around, self.teacher_views)
        self.learn_from(client, data, maps)

    def on_fit_end(self) -> None:
        """Take the hooks off, and let the device and the data forget the teacher."""
        if self.teacher is not None:
            self._teaching.network = self.teacher.cpu()
        self._let_go()

    def _let_go(self) -> None:
        """Forget a teacher that came from the source, and what was set up to learn from it."""
        if self._student_taps is not None:
            self._student_taps.remove()
            self._student_taps = None
        if self._learns_elsewhere:
            return
        if self._teaching.is_prepared:
            self.attach_teacher(None)
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "teacher_maps"):
            data.teacher_maps = None

    # --- training -----------------------------------------------------------------------------------------------

    @property
    def term_weights(self) -> dict[str, float]:
        """The terms that the teacher has in the loss at this moment, with their weights; none while it is silent."""
        return weights_at(self.losses, progress_of(self.clock, self._trainer)) if self.teaches else {}

    def loss_terms(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the weighted supervised loss and distillation terms of a batch."""
        weights = self.term_weights
        batch = self.learned_part(batch, by_terms=bool(weights))
        if self._student_taps is None:
            self._student_taps = Taps(self.network, [t.student_tap for t in self.active_losses.values()], "the student")
        shown = self._student_taps(batch["image"], self)
        logits, terms = shown[LOGITS], {}
        if self.supervised_weight != 0:
            terms["supervised"] = self.supervised_weight * supervised_part(self.loss, logits, batch)
        answers = self.teach(batch) if weights else {}
        coordinates = batch.get("coordinates") if "teacher" in batch else None  # a live teacher saw this very image
        pixels = pixels_of(batch, logits)
        for name, weight in weights.items():
            term = self.losses[name]
            ours, theirs = shown[term.student_tap], answers[term.teacher_tap]
            raw = term(*match(term, ours, theirs, pixels, coordinates, self.companions.of(name)))
            self.log(f"train/{name}_raw", raw.detach(), batch_size=len(logits), on_epoch=True)
            terms[name] = weight * raw
        self._keep_in_graph(terms, logits, weights)
        return terms

    def _keep_in_graph(self, terms: dict[str, Tensor], logits: Tensor, weights: dict[str, float]) -> None:
        """Give parameters that no term uses in this round a gradient of 0: DDP waits for every one of them."""
        if self._trainer is None or self.trainer.world_size == 1:
            return
        idle = [self.companions.of(name) for name in self.active_losses if name not in weights]
        unused = [p.sum() for layer in idle if layer is not None for p in layer.parameters()]
        first = next(iter(terms))
        terms[first] = terms[first] + 0 * torch.stack([logits.sum(), *unused]).sum()

    def teach(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the teacher's maps for a batch by tap, without gradients: those it brings, or the teacher's answers.

        Raises:
            TrainingError: the teacher answers with NaN or infinity; the images are named.
        """
        if "teacher" in batch:
            cached: dict[str, Tensor] = batch["teacher"]
            return cached
        taps = self._teaching.taps(self.teacher_taps)
        dtype = next((p.dtype for p in taps.network.parameters()), batch["image"].dtype)
        with torch.no_grad():
            maps = taps(batch["image"].to(dtype))
        refuse_non_finite(maps, batch)
        return maps

    # --- checkpoints --------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the companions, for a resume of a run without federation; those of a federation stay with its clients."""
        super().on_save_checkpoint(checkpoint)
        if len(self.companions) and not self._learns_elsewhere:
            checkpoint["fkd_med"]["companions"] = self.companions.tensors()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the companions back."""
        super().on_load_checkpoint(checkpoint)
        stored = checkpoint.get("fkd_med", {}).get("companions", {})
        fits = self._trainer is not None and self.trainer.state.fn == "fit" and not self._learns_elsewhere
        if fits:
            check_companions_fit(stored, self.companions)
        self.companions.load_tensors(stored)

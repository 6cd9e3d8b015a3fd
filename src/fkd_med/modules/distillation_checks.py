"""What a distillation's configuration must make sense of before anything trains: names, weights, taps, connectors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor, nn

from fkd_med.distillation import Companions
from fkd_med.distillation.views import NUMBERS
from fkd_med.errors import ConfigError
from fkd_med.losses import LOGITS, DistillationTerm

Terms = Mapping[str, DistillationTerm]


def weights_at(losses: Terms, progress: float) -> dict[str, float]:
    """Return the weights that are not 0 when this share of the run has passed, 0 to 1, by term."""
    weights = {name: term.weight_at(progress) for name, term in losses.items()}
    return {name: weight for name, weight in weights.items() if weight != 0}


def check_settings(losses: Terms, supervised_weight: float, teacher_cache: str, views: int) -> None:
    """Refuse terms, weights, caches and views that do not go together; ConfigError names the key and the remedy."""
    _check_losses(losses, supervised_weight)
    _check_taps_are_cached(losses, teacher_cache)
    _check_views(views, losses)


def _check_losses(losses: Terms, supervised_weight: float) -> None:
    """Refuse names that terms cannot have, and weights that leave no loss at some time of the run.

    Raises:
        ConfigError: names the term or the time.
    """
    odd = [name for name in losses if not re.fullmatch(r"\w+", name, re.ASCII)]
    if odd:
        raise ConfigError(f"model.losses: {', '.join(odd)} names a term; use letters, digits and '_' only.")
    taken = [name for name in losses if name in ("supervised", "loss") or hasattr(nn.ModuleDict, name)]
    if taken:
        raise ConfigError(f"model.losses: {taken[0]!r} is taken by something else; give the term another name.")
    if supervised_weight != 0:
        return
    if all(term.weight == 0 for term in losses.values()):
        raise ConfigError("Every weight of the loss is 0: give model.supervised_weight or a term of model.losses.")
    idle = [share for share in range(101) if not weights_at(losses, share / 100)]
    if idle:
        raise ConfigError(
            f"After {idle[0]} % of the run every weight of the loss is 0, by the schedules of model.losses: "
            "give model.supervised_weight, or let a term stay."
        )


def _check_taps_are_cached(losses: Terms, teacher_cache: str) -> None:
    """Refuse terms on features of the teacher when its cache keeps only logits.

    Raises:
        ConfigError: names the term and the remedy.
    """
    tapping = [name for name, term in losses.items() if term.weight != 0 and term.teacher_tap != LOGITS]
    if teacher_cache == "logits" and tapping:
        raise ConfigError(
            f"model.losses.{tapping[0]} taps features of the teacher, and model.teacher_cache: logits keeps only "
            "its logits. Set it to taps (they may need much disk; the size is said before), or to off."
        )


def _check_views(views: int, losses: Terms) -> None:
    """Refuse numbers of views that make no group, and features of a teacher that is seen in several.

    Raises:
        ConfigError: names the number or the term, and the remedy.
    """
    if views not in NUMBERS:
        raise ConfigError(
            f"model.teacher_views is {views}: give 1 (the image as it is), 2 (and its mirror), 4 (its flips) or 8 "
            "(and quarter turns)."
        )
    tapping = [name for name, term in losses.items() if term.weight != 0 and term.teacher_tap != LOGITS]
    if views > 1 and tapping:
        raise ConfigError(
            f"model.losses.{tapping[0]} taps features of the teacher, and model.teacher_views: {views} averages over "
            "flipped images: logits flip with the image, channels of features need not. Leave teacher_tap at logits, "
            "or set teacher_views: 1."
        )


def check_connectors_known(losses: Terms, companions: Companions) -> None:
    """Refuse to train while a term's connector has no size.

    Raises:
        ConfigError: names the term and says how it gets one.
    """
    missing = [name for name, term in losses.items() if term.connector is not None and name not in companions]
    if missing:
        raise ConfigError(
            f"model.losses.{missing[0]} has a connector, whose size nobody knows yet: call rehearse(image) of the "
            "module before fit, or train with fkd_med.data.FederatedDataModule."
        )


def check_companions_fit(stored: Mapping[str, Tensor], companions: Companions) -> None:
    """Refuse to go on from a checkpoint with connectors of other terms, or with another teacher that trains.

    Raises:
        ConfigError: names the first tensors that differ.
    """
    before = {(name, tensor.shape) for name, tensor in stored.items()}
    now = {(name, tensor.shape) for name, tensor in companions.tensors().items()}
    if differ := sorted({name for name, _ in before ^ now}):
        raise ConfigError(
            f"The checkpoint and model.losses or model.teacher differ in what trains beside the student, connectors "
            f"or a teacher ({', '.join(differ[:3])}): resume with the terms and networks the run was started with."
        )


def check_mutual(losses: Terms, teacher_lr: float | None) -> None:
    """Refuse terms that mean nothing when teacher and student change places, and a rate that is none.

    Raises:
        ConfigError: names the term or the rate, and the remedy.
    """
    if teacher_lr is not None and not 0 < teacher_lr < math.inf:
        raise ConfigError(f"model.teacher_lr is {teacher_lr}: give a learning rate above 0, or null for the student's.")
    for name, term in losses.items():
        if name.startswith(("teacher", "student")):
            raise ConfigError(f"model.losses: {name!r} would be logged as another value: give the term another name.")
        of_logits = LOGITS in (term.student_tap, term.teacher_tap)
        if of_logits and (term.student_tap != term.teacher_tap or term.connector is not None):
            raise ConfigError(
                f"model.losses.{name} compares logits with features, or has a connector for logits, and mutual "
                "distillation applies it both ways: tap logits of both networks without connector, or modules of both."
            )

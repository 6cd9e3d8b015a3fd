"""What all distillation terms have in common: where they look, how much they weigh, and how they are called.

A term returns its raw loss; the module multiplies it by its weight and logs both. YAML holds terms in a dict by name,
``{kd: {class_path: fkd_med.losses.LogitKL, init_args: {temperature: 2.0}}}``. Each loss has its own file: a pure
function of tensors, and a term that applies it. Getting the maps out of the networks, to one size and through a
connector is not done here.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Self, get_args

from torch import Tensor

from fkd_med.errors import ConfigError
from fkd_med.losses.connectors import Connector
from fkd_med.losses.pixels import Pixels
from fkd_med.losses.schedule import WeightSchedule
from fkd_med.losses.tensors import blank, class_probabilities

Resize = Literal["student", "teacher", "none"]
LOGITS = "logits"


class DistillationTerm(ABC):
    """One distillation loss with its weight and the places it compares: a callable of two maps and the pixels.

    Args:
        weight: factor the module applies to the raw loss; 0 turns the term off.
        student_tap: what to take from the student: "logits", or the dotted path of a module inside the network, such
            as encoder.layer4 or decoder.blocks.0, or encoder[3] for one map of a module that returns several.
        teacher_tap: the same for the teacher.
        resize: "student" samples the teacher's map at the student's resolution, "teacher" brings the student's map to
            the teacher's, "none" wants them equal.
        connector: makes a small network that brings the student's channels to the teacher's, trained with the
            student: the import path of a callable of both numbers of channels, such as fkd_med.losses.pointwise.
        schedule: changes the weight in the course of the run; constant when left out.

    Raises:
        ConfigError: for a weight that is negative or not finite, an unknown resize, an empty tap, or a feature tap or
            connector for a loss of logits.
    """

    logits_only: ClassVar[bool] = False
    """Whether the loss means something for logits only, not for features."""

    def __init__(
        self,
        weight: float = 1.0,
        student_tap: str = LOGITS,
        teacher_tap: str = LOGITS,
        resize: Resize = "student",
        connector: Connector | None = None,
        schedule: WeightSchedule | None = None,
    ) -> None:
        self.weight = weight
        self.student_tap, self.teacher_tap, self.resize = student_tap, teacher_tap, resize
        self.connector, self.schedule = connector, schedule
        self._check_settings()

    @abstractmethod
    def __call__(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Return the raw, unweighted scalar loss of two maps (N, C, H, W) and the pixels at the same H and W."""

    def needs_masks(self) -> bool:
        """Whether the loss looks at the masks, so that images without one must not count."""
        return False

    def weight_at(self, progress: float) -> float:
        """Return the weight at a share of the run: 0 in the first round, 1 in the last."""
        return self.weight if self.schedule is None else self.weight * self.schedule(progress)

    def as_probabilities(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> tuple[Tensor, Tensor]:
        """Return both maps, class probabilities (N, max(2, K), H, W) in place of logits; features stay.

        What a connector returns are features, wherever it got them from.
        """
        if self.student_tap == LOGITS and self.connector is None:
            student = class_probabilities(blank(student, pixels.valid))
        if self.teacher_tap == LOGITS:
            teacher = class_probabilities(blank(teacher, pixels.valid))
        return student, teacher

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the settings, but share the connector's maker: one built by the command line holds the whole parser."""
        memo[id(self.connector)] = self.connector
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _check_settings(self) -> None:
        name = type(self).__name__
        if not 0 <= self.weight < math.inf:
            raise ConfigError(f"{name}: weight must be 0 (off) or above and finite, not {self.weight}.")
        if self.resize not in get_args(Resize):
            raise ConfigError(f"{name}: resize must be one of {', '.join(get_args(Resize))}, not '{self.resize}'.")
        for key, tap in (("student_tap", self.student_tap), ("teacher_tap", self.teacher_tap)):
            if not tap.strip():
                raise ConfigError(f"{name}: {key} is empty: give 'logits' or the path of a module, as encoder.layer4.")
            if self.logits_only and tap != LOGITS:
                raise ConfigError(
                    f"{name} compares logits; for features use CWD, AttentionTransfer, PairwiseAffinity, IFVD, "
                    f"RegionAffinity or HintMSE. Here {key} is {tap}."
                )
        if self.logits_only and self.connector is not None:
            raise ConfigError(f"{name} compares logits, which need no connector: leave it out.")

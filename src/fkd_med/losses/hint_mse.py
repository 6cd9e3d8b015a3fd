"""FitNets' hint: the student's features should be the teacher's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fkd_med.errors import ConfigError
from fkd_med.losses.connectors import Connector, pointwise
from fkd_med.losses.distillation import DistillationTerm
from fkd_med.losses.pixels import Pixels
from fkd_med.losses.tensors import blank, check_mask, mean_where, precise


def hint_mse(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Return the mean squared difference of two tensors of one shape.

    Where features differ in channels, a 1 x 1 convolution brings the student's to the teacher's first. No gradient
    reaches the teacher. Source: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, eq. 3.

    Args:
        student: features (N, C, H, W).
        teacher: features of the same shape.
        valid: which pixels count, bool (N, H, W): the others might as well not exist; all of them when left out.

    Raises:
        ConfigError: for shapes that differ.
    """
    if student.shape != teacher.shape:
        raise ConfigError(
            f"Distillation: the student's features {tuple(student.shape)} and the teacher's {tuple(teacher.shape)} "
            "must have one shape."
        )
    if valid is not None:
        check_mask(valid, student, "map of valid pixels")
    student, teacher = blank(student, valid), blank(teacher.detach(), valid)
    with torch.autocast(student.device.type, enabled=False):
        square = (precise(student) - precise(teacher)).square()
        return square.mean() if valid is None else mean_where(square.mean(dim=1), valid)


class HintMSE(DistillationTerm):
    """Bring the student's features to the teacher's own values (FitNets, Romero et al. 2015).

    Args:
        weight: factor beside the supervised loss; 0 turns the term off. 10 to 100 in reference code.
        connector: makes a small network that brings the student's channels to the teacher's, trained with the
            student; null if they have the same features channel by channel.
        where: student_tap, teacher_tap, resize and schedule, as in `DistillationTerm`.

    Raises:
        ConfigError: for a negative weight.
    """

    def __init__(self, weight: float = 10.0, connector: Connector | None = pointwise, **where: Any) -> None:
        super().__init__(weight, connector=connector, **where)

    def __call__(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Return the raw, unweighted loss of two maps (N, C, H, W), a scalar; no mask is needed."""
        return hint_mse(student, teacher, valid=pixels.valid)

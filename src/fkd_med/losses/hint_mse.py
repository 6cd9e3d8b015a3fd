"""FitNets' hint: the student's features should be the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from fkd_med.errors import ConfigError
from fkd_med.losses.tensors import precise


def hint_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of two tensors of one shape.

    Where features differ in channels, a 1 x 1 convolution brings the student's to the teacher's first. No gradient
    reaches the teacher. Source: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, eq. 3.

    Args:
        student: features (N, C, H, W).
        teacher: features of the same shape.

    Raises:
        ConfigError: for shapes that differ.
    """
    if student.shape != teacher.shape:
        raise ConfigError(
            f"Distillation: the student's features {tuple(student.shape)} and the teacher's {tuple(teacher.shape)} "
            "must have one shape."
        )
    with torch.autocast(student.device.type, enabled=False):
        return (precise(student) - precise(teacher.detach())).square().mean()

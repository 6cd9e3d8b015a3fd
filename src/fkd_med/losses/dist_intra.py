"""DIST, the intra-class part: a student's probabilities need only rise and fall with the teacher's.

DIST's inter-class part is not here: with two classes it is the correlation of two points, +-1 with noise for a
gradient. Nor is DKD, whose non-target part is 0 with two classes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fkd_med.losses.distillation import DistillationTerm
from fkd_med.losses.pixels import Pixels
from fkd_med.losses.tensors import (
    blank,
    check_logits,
    check_temperature,
    class_probabilities,
    mean_where,
    precise,
    unit,
)


def dist_intra(student: Tensor, teacher: Tensor, temperature: float = 1.0, *, valid: Tensor | None = None) -> Tensor:
    """Return temperature^2 times 1 - Pearson's correlation over pixels, the mean over classes.

    The correlation is between the softened probabilities of student and teacher, class by class, over all pixels of
    the batch. That of a constant map counts as 0 (loss 1, no gradient). One logit z is taken as two classes, (0, z).
    No gradient reaches the teacher. Source: Huang et al., "Knowledge Distillation from A Stronger Teacher" (DIST),
    2022, eq. 9.

    Args:
        student: raw logits (N, K, H, W).
        teacher: raw logits of the same shape.
        temperature: softens both distributions; above 0.
        valid: which pixels count, bool (N, H, W): the others might as well not exist; all of them when left out.

    Raises:
        ConfigError: for a temperature not above 0, or shapes that differ.
    """
    check_temperature(temperature)
    check_logits(student, teacher, valid)
    with torch.autocast(student.device.type, enabled=False):
        a, b = (_standardised(x, temperature, valid) for x in (student, teacher.detach()))
        loss = temperature**2 * (1 - (a * b).sum(dim=1)).mean()
        return loss if valid is None else loss * valid.any()


class DISTIntra(DistillationTerm):
    """Let each class's probability rise and fall over the pixels with the teacher's (DIST-intra, Huang et al. 2022).

    Args:
        temperature: softens both distributions, above 0; the loss is multiplied by its square.
        weight: factor beside the supervised loss; 0 turns the term off. The authors' is 1.
        where: resize and schedule, as in `DistillationTerm`; its taps stay "logits".

    Raises:
        ConfigError: for a temperature not above 0, a negative weight or feature taps.
    """

    logits_only: ClassVar[bool] = True

    def __init__(self, temperature: float = 1.0, weight: float = 1.0, **where: Any) -> None:
        super().__init__(weight, **where)
        check_temperature(temperature)
        self.temperature = temperature

    def __call__(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Return the raw, unweighted loss of student and teacher logits (N, K, H, W), a scalar; no mask is needed."""
        return dist_intra(student, teacher, self.temperature, valid=pixels.valid)


def _standardised(logits: Tensor, temperature: float, valid: Tensor | None) -> Tensor:
    """Return each class's probabilities, centred and of length 1 (K, N * H * W); zeros for a constant map."""
    probabilities = class_probabilities(precise(blank(logits, valid)) / temperature)
    values = blank(probabilities, valid).transpose(0, 1).flatten(1)
    counted = None if valid is None else valid.flatten().unsqueeze(0)
    centred = values - _mean(values, counted)
    if counted is not None:
        centred = torch.where(counted, centred, 0.0)
    # Rounding leaves a little of a constant: a spread below a millionth of the largest value is none.
    spread = _mean(centred.detach().square(), counted).sqrt()
    centred = torch.where(spread > 1e-6 * values.detach().amax(dim=1, keepdim=True), centred, 0.0)
    return unit(centred, dim=1, eps=1e-15)


def _mean(values: Tensor, counted: Tensor | None) -> Tensor:
    """Return the mean over the pixels that count (K, 1)."""
    return values.mean(dim=1, keepdim=True) if counted is None else mean_where(values, counted, dim=1).unsqueeze(1)

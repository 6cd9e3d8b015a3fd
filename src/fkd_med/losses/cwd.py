"""CWD, channel-wise distillation: where in the image does each channel speak loudest?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fkd_med.errors import ConfigError
from fkd_med.losses.distillation import DistillationTerm
from fkd_med.losses.pixels import Pixels
from fkd_med.losses.tensors import check_maps, check_temperature, mean_where, precise


def cwd(student: Tensor, teacher: Tensor, temperature: float = 4.0, *, valid: Tensor | None = None) -> Tensor:
    """Return the channel-wise distillation loss: each channel is a distribution over the pixels of its image.

    ``T^2 / C sum_c sum_i phi_t log(phi_t / phi_s)``, phi the softmax of a channel over space, averaged over the
    images. A constant added to a channel changes nothing, so CWD cannot teach a threshold. One logit is one channel:
    the formula needs channels, not classes (with (0, z), the constant channel would only halve the loss). No gradient
    reaches the teacher. Source: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", 2021, eq. 3-5.

    Args:
        student: logits or features (N, C, H, W).
        teacher: the same of the same shape.
        temperature: softens both distributions; above 0.
        valid: which pixels count, bool (N, H, W): the others might as well not exist; all of them when left out.

    Raises:
        ConfigError: for a temperature not above 0, or shapes that differ.
    """
    check_temperature(temperature)
    check_maps(student, teacher, valid)
    if student.shape[1] != teacher.shape[1]:
        raise ConfigError(
            f"Distillation: CWD compares channel with channel, and the student's maps {tuple(student.shape)} have "
            f"{student.shape[1]}, the teacher's {tuple(teacher.shape)} {teacher.shape[1]}."
        )
    with torch.autocast(student.device.type, enabled=False):
        log_p, log_q = (_log_softmax(x, temperature, valid) for x in (teacher.detach(), student))
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=2)  # (N, C)
        if valid is None:
            return temperature**2 * kl.mean()
        return temperature**2 * mean_where(kl.mean(dim=1), valid.flatten(1).any(dim=1))


class CWD(DistillationTerm):
    """Match, channel by channel, where in the image the teacher's answers are high (Shu et al. 2021).

    Args:
        temperature: softens both distributions, above 0; the loss is multiplied by its square.
        weight: factor beside the supervised loss; 0 turns the term off. The paper's is 3 for logits, 50 for features.
        where: student_tap, teacher_tap, resize, connector and schedule, as in `DistillationTerm`.

    Raises:
        ConfigError: for a temperature not above 0 or a negative weight.
    """

    def __init__(self, temperature: float = 4.0, weight: float = 3.0, **where: Any) -> None:
        super().__init__(weight, **where)
        check_temperature(temperature)
        self.temperature = temperature

    def __call__(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Return the raw, unweighted loss of two maps (N, C, H, W), a scalar; no mask is needed."""
        return cwd(student, teacher, self.temperature, valid=pixels.valid)


def _log_softmax(x: Tensor, temperature: float, valid: Tensor | None) -> Tensor:
    scaled = precise(x).flatten(2) / temperature  # (N, C, H * W)
    if valid is not None:
        # Its exponential is 0, yet it is finite, so that 0 times it is 0; half of it can be shifted without overflow.
        nowhere = torch.finfo(scaled.dtype).min / 2
        scaled = torch.where(valid.flatten(1).unsqueeze(1), scaled, nowhere)
    return scaled.log_softmax(dim=2)

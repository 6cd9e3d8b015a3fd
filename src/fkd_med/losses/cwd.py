"""CWD, channel-wise distillation: where in the image does each channel speak loudest?"""

from __future__ import annotations

import torch
from torch import Tensor

from fkd_med.losses.distillation import DistillationTerm
from fkd_med.losses.tensors import check_logits, check_temperature, precise


def cwd(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Return the channel-wise distillation loss: each channel is a distribution over the pixels of its image.

    ``T^2 / C sum_c sum_i phi_t log(phi_t / phi_s)``, phi the softmax of a channel over space, averaged over the
    images. A constant added to a channel changes nothing, so CWD cannot teach a threshold. One logit is one channel:
    the formula needs channels, not classes (with (0, z), the constant channel would only halve the loss). No gradient
    reaches the teacher. Source: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", 2021, eq. 3-5.

    Args:
        student: logits or features (N, C, H, W).
        teacher: the same of the same shape.
        temperature: softens both distributions; above 0.

    Raises:
        ConfigError: for a temperature not above 0, or shapes that differ.
    """
    check_temperature(temperature)
    check_logits(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        log_p, log_q = (_log_softmax(x, temperature) for x in (teacher.detach(), student))
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=2)  # (N, C)
        return temperature**2 * kl.mean()


class CWD(DistillationTerm):
    """Match, channel by channel, where in the image the teacher's logits are high (Shu et al. 2021).

    Args:
        temperature: softens both distributions, above 0; the loss is multiplied by its square.
        weight: factor beside the supervised loss; 0 turns the term off. The paper's is 3 for logits.

    Raises:
        ConfigError: for a temperature not above 0 or a negative weight.
    """

    def __init__(self, temperature: float = 4.0, weight: float = 3.0) -> None:
        super().__init__(weight)
        check_temperature(temperature)
        self.temperature = temperature

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Return the raw, unweighted loss of student and teacher logits (N, K, H, W), a scalar; no mask is needed."""
        return cwd(student, teacher, self.temperature)


def _log_softmax(x: Tensor, temperature: float) -> Tensor:
    return (precise(x).flatten(2) / temperature).log_softmax(dim=2)  # (N, C, H * W)

"""Logit KL: the student learns the teacher's softened class distribution at every pixel."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fkd_med.errors import ConfigError
from fkd_med.losses.distillation import DistillationTerm
from fkd_med.losses.tensors import check_logits, check_temperature, precise

Reduction = Literal["pixel", "mean", "batchmean"]


def logit_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, reduction: Reduction = "pixel") -> Tensor:
    """Return temperature^2 times the Kullback-Leibler divergence of teacher and student, KL(teacher || student).

    One logit is a Bernoulli distribution per pixel, K >= 2 logits are a softmax over the channels; both are softened
    by `temperature`. No gradient reaches the teacher. Computed in float32 (float64 stays) from log-probabilities, so
    logits of +-1e4 and far beyond stay finite. Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a
    Neural Network", 2015, eq. 1 and sec. 2.

    Args:
        student: raw logits (N, K, H, W).
        teacher: raw logits of the same shape.
        temperature: softens both distributions; above 0.
        reduction: "pixel", the mean over N, H and W (default); "mean", over N, K, H and W, K times smaller, as in the
            published FKD-Med code; "batchmean", the sum over pixels averaged over N only, H * W times larger.

    Raises:
        ConfigError: for a temperature not above 0, an unknown reduction, or shapes that differ.
    """
    return _reduce(kl_map(student, teacher, temperature), student.shape[1], reduction)


def kl_map(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return temperature^2 KL(teacher || student) of each pixel (N, H, W); arguments and errors as in `logit_kl`."""
    check_temperature(temperature)
    check_logits(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        return temperature**2 * _divergence(precise(teacher.detach()) / temperature, precise(student) / temperature)


class LogitKL(DistillationTerm):
    """Match the teacher's softened class distribution at every pixel (Hinton et al. 2015).

    Args:
        temperature: softens both distributions, above 0; the loss is multiplied by its square.
        weight: factor beside the supervised loss; 0 turns the term off.
        reduction: "pixel" is the mean over pixels; "mean" (also over classes) and "batchmean" (sum over pixels) are
            for parity with other code: 1 : 1/K : H*W.

    Raises:
        ConfigError: for a temperature not above 0, a negative weight or an unknown reduction.
    """

    def __init__(self, temperature: float = 2.0, weight: float = 1.0, reduction: Reduction = "pixel") -> None:
        super().__init__(weight)
        check_temperature(temperature)
        _check_reduction(reduction)
        self.temperature, self.reduction = temperature, reduction

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Return the raw, unweighted loss of student and teacher logits (N, K, H, W), a scalar; no mask is needed."""
        return logit_kl(student, teacher, self.temperature, self.reduction)


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher || student) per pixel (N, H, W) of softened logits (N, K, H, W)."""
    if student.shape[1] == 1:  # p log(p/q) + (1-p) log((1-p)/(1-q)), with logs that cannot overflow
        on = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
        off = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
        return (on + off).squeeze(1)
    log_p, log_q = teacher.log_softmax(dim=1), student.log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def _reduce(kl: Tensor, classes: int, reduction: str) -> Tensor:
    _check_reduction(reduction)
    if reduction == "batchmean":
        return kl.sum() / kl.shape[0]
    return kl.mean() / classes if reduction == "mean" else kl.mean()


def _check_reduction(reduction: str) -> None:
    if reduction not in ("pixel", "mean", "batchmean"):
        raise ConfigError(f"Distillation: reduction must be pixel, mean or batchmean, not '{reduction}'.")

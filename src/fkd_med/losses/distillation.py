"""What a student learns from a teacher: distillation terms as functions of two tensors.

A term returns its raw loss; the module multiplies it by `weight` and logs both. YAML holds terms in a dict by name,
``{kd: {class_path: fkd_med.losses.LogitKL, init_args: {temperature: 2.0}}}``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fkd_med.errors import ConfigError

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
    _check_temperature(temperature)
    _check_shapes(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        kl = _divergence(_full(teacher.detach()) / temperature, _full(student) / temperature)  # (N, H, W)
        return temperature**2 * _reduce(kl, student.shape[1], reduction)


class DistillationTerm(ABC):
    """One distillation loss with its weight: a callable of student and teacher logits.

    Args:
        weight: factor the module applies to the raw loss; 0 turns the term off.

    Raises:
        ConfigError: for a negative weight.
    """

    def __init__(self, weight: float = 1.0) -> None:
        if not weight >= 0:
            raise ConfigError(f"{type(self).__name__}: weight must be 0 (off) or above, not {weight}.")
        self.weight = weight

    @abstractmethod
    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the raw, unweighted scalar loss of student and teacher logits (N, K, H, W)."""


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
        _check_temperature(temperature)
        _check_reduction(reduction)
        self.temperature, self.reduction = temperature, reduction

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the raw, unweighted loss of student and teacher logits (N, K, H, W), a scalar."""
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


def _full(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"Distillation: temperature must be above 0 and finite, not {temperature}; 1 to 5 is usual.")


def _check_reduction(reduction: str) -> None:
    if reduction not in ("pixel", "mean", "batchmean"):
        raise ConfigError(f"Distillation: reduction must be pixel, mean or batchmean, not '{reduction}'.")


def _check_shapes(student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 4 or teacher.ndim != 4:
        raise ConfigError(
            f"Distillation: logits must be (N, K, H, W); the student's are {tuple(student.shape)}, the teacher's "
            f"{tuple(teacher.shape)}."
        )
    if student.shape[1] != teacher.shape[1]:
        raise ConfigError(
            f"Distillation: the student predicts {student.shape[1]} classes (logits {tuple(student.shape)}), the "
            f"teacher {teacher.shape[1]} (logits {tuple(teacher.shape)}): give both networks the same `classes`."
        )
    if student.shape != teacher.shape:
        raise ConfigError(
            f"Distillation: the student's logits {tuple(student.shape)} and the teacher's {tuple(teacher.shape)} do "
            "not match: run both networks on the same images at the same size."
        )

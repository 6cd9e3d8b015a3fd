"""Logit KL: the student learns the teacher's softened class distribution at every pixel."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fkd_med.errors import ConfigError
from fkd_med.losses.distillation import DistillationTerm
from fkd_med.losses.pixels import Pixels
from fkd_med.losses.tensors import blank, check_logits, check_temperature, mean_where, precise
from fkd_med.losses.trust import Trust, believed, check_trust

Reduction = Literal["pixel", "mean", "batchmean"]


def logit_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    reduction: Reduction = "pixel",
    *,
    valid: Tensor | None = None,
    trust: Trust = "all",
    mask: Tensor | None = None,
) -> Tensor:
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
        valid: which pixels count, bool (N, H, W): the others might as well not exist; all of them when left out.
        trust: which pixels the teacher is believed at, see `trust_map`; their sum is still divided by all that count.
        mask: class indices (N, H, W), for `trust`.

    Raises:
        ConfigError: for a temperature not above 0, an unknown reduction, shapes that differ, or trust without a mask.
    """
    kl = believed(kl_map(student, teacher, temperature, valid=valid), teacher, mask, trust, valid)
    return _reduce(kl, student.shape[1], reduction, valid)


def kl_map(student: Tensor, teacher: Tensor, temperature: float = 1.0, *, valid: Tensor | None = None) -> Tensor:
    """Return temperature^2 KL(teacher || student) of each pixel (N, H, W), 0 outside of `valid`; as in `logit_kl`."""
    check_temperature(temperature)
    check_logits(student, teacher, valid)
    student, teacher = blank(student, valid), blank(teacher.detach(), valid)
    with torch.autocast(student.device.type, enabled=False):
        return temperature**2 * _divergence(precise(teacher) / temperature, precise(student) / temperature)


class LogitKL(DistillationTerm):
    """Match the teacher's softened class distribution at every pixel (Hinton et al. 2015).

    Args:
        temperature: softens both distributions, above 0; the loss is multiplied by its square.
        weight: factor beside the supervised loss; 0 turns the term off.
        reduction: "pixel" is the mean over pixels; "mean" (also over classes) and "batchmean" (sum over pixels) are
            for parity with other code: 1 : 1/K : H*W.
        trust: "all" pixels; "correct", those whose class the teacher gets right; "true_class", each as far as the
            probability that the teacher gives to its class. The mean stays one over all pixels.
        where: resize and schedule, as in `DistillationTerm`; its taps stay "logits".

    Raises:
        ConfigError: for a temperature not above 0, a negative weight, an unknown reduction or trust, or feature taps.
    """

    logits_only: ClassVar[bool] = True

    def __init__(
        self,
        temperature: float = 2.0,
        weight: float = 1.0,
        reduction: Reduction = "pixel",
        trust: Trust = "all",
        **where: Any,
    ) -> None:
        super().__init__(weight, **where)
        check_temperature(temperature)
        _check_reduction(reduction)
        check_trust(trust)
        self.temperature, self.reduction, self.trust = temperature, reduction, trust

    def needs_masks(self) -> bool:
        """Whether the loss looks at the masks: only to tell where the teacher is right."""
        return self.trust != "all"

    def __call__(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Return the raw, unweighted loss of student and teacher logits (N, K, H, W), a scalar."""
        return logit_kl(
            student, teacher, self.temperature, self.reduction, valid=pixels.valid, trust=self.trust, mask=pixels.mask
        )


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher || student) per pixel (N, H, W) of softened logits (N, K, H, W)."""
    if student.shape[1] == 1:  # p log(p/q) + (1-p) log((1-p)/(1-q)), with logs that cannot overflow
        on = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
        off = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
        return (on + off).squeeze(1)
    log_p, log_q = teacher.log_softmax(dim=1), student.log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def _reduce(kl: Tensor, classes: int, reduction: str, valid: Tensor | None) -> Tensor:
    _check_reduction(reduction)
    if reduction == "batchmean":
        return kl.sum() / kl.shape[0]  # the pixels that do not count are 0
    mean = kl.mean() if valid is None else mean_where(kl, valid)
    return mean / classes if reduction == "mean" else mean


def _check_reduction(reduction: str) -> None:
    if reduction not in ("pixel", "mean", "batchmean"):
        raise ConfigError(f"Distillation: reduction must be pixel, mean or batchmean, not '{reduction}'.")

"""Losses of tensors: segmentation (what the masks say) and distillation (what the teacher says)."""

from fkd_med.losses.distillation import DistillationTerm, LogitKL, logit_kl
from fkd_med.losses.segmentation import DiceCE, supervised_loss

__all__ = ["DiceCE", "DistillationTerm", "LogitKL", "logit_kl", "supervised_loss"]

"""Losses of tensors: segmentation (what the masks say) and distillation (what the teacher says)."""

from fkd_med.losses.attention_transfer import AttentionTransfer, attention_transfer
from fkd_med.losses.boundary_kl import BoundaryKL, boundary_kl
from fkd_med.losses.connectors import Connector, pointwise
from fkd_med.losses.cwd import CWD, cwd
from fkd_med.losses.dist_intra import DISTIntra, dist_intra
from fkd_med.losses.distillation import LOGITS, DistillationTerm, Resize
from fkd_med.losses.hint_mse import HintMSE, hint_mse
from fkd_med.losses.ifvd import IFVD, ifvd
from fkd_med.losses.logit_kl import LogitKL, logit_kl
from fkd_med.losses.pairwise_affinity import PairwiseAffinity, pairwise_affinity
from fkd_med.losses.pixels import Pixels
from fkd_med.losses.region_affinity import RegionAffinity, region_affinity
from fkd_med.losses.schedule import Ramp, WeightSchedule
from fkd_med.losses.segmentation import DiceCE, supervised_loss
from fkd_med.losses.trust import Trust, trust_map

__all__ = [
    "CWD",
    "IFVD",
    "LOGITS",
    "AttentionTransfer",
    "BoundaryKL",
    "Connector",
    "DISTIntra",
    "DiceCE",
    "DistillationTerm",
    "HintMSE",
    "LogitKL",
    "PairwiseAffinity",
    "Pixels",
    "Ramp",
    "RegionAffinity",
    "Resize",
    "Trust",
    "WeightSchedule",
    "attention_transfer",
    "boundary_kl",
    "cwd",
    "dist_intra",
    "hint_mse",
    "ifvd",
    "logit_kl",
    "pairwise_affinity",
    "pointwise",
    "region_affinity",
    "supervised_loss",
    "trust_map",
]

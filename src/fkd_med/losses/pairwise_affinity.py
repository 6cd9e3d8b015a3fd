"""Pair-wise affinity (SKD): which parts of an image does the teacher find alike?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fkd_med.errors import ConfigError
from fkd_med.losses.distillation import DistillationTerm
from fkd_med.losses.tensors import check_maps, class_probabilities, precise, unit


def pairwise_affinity(student: Tensor, teacher: Tensor, pool: float = 0.5) -> Tensor:
    """Return the mean squared difference of cosine affinities between all pairs of pooled patches.

    ``mean (a_s - a_t)^2``, a_ij the cosine of the vectors of patches i and j; the mean is over pairs and images. A
    vector of zeros has cosine 0. Channels of student and teacher may differ. No gradient reaches the teacher. Source:
    Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", 2019, eq. 2-3; max-pooled as in the
    authors' code.

    Args:
        student: features (N, C, H, W).
        teacher: features (N, C', H, W).
        pool: height and width of a patch as a share of the map's, above 0, at most 1: 0.5 leaves 2 x 2 patches.
            Memory grows with the fourth power of 1 / pool.

    Raises:
        ConfigError: for a pool out of range, or shapes that do not match.
    """
    _check_pool(pool)
    check_maps(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        return (_affinity(precise(student), pool) - _affinity(precise(teacher.detach()), pool)).square().mean()


class PairwiseAffinity(DistillationTerm):
    """Match which parts of an image are alike for the teacher (SKD, Liu et al. 2019), on class probabilities.

    Logits are defined up to a constant and one logit has no direction, so cosines are taken of the softmax, which is
    (1 - p, p) for one logit.

    Args:
        pool: height and width of a patch as a share of the image's; 0.5 leaves 2 x 2 patches. 1 leaves one: loss 0.
        weight: factor beside the supervised loss; 0 turns the term off. The authors' is 10.

    Raises:
        ConfigError: for a pool out of range or a negative weight.
    """

    def __init__(self, pool: float = 0.5, weight: float = 10.0) -> None:
        super().__init__(weight)
        _check_pool(pool)
        self.pool = pool

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Return the raw, unweighted loss of student and teacher logits (N, K, H, W), a scalar; no mask is needed."""
        return pairwise_affinity(class_probabilities(student), class_probabilities(teacher), self.pool)


def _affinity(features: Tensor, pool: float) -> Tensor:
    patch = [max(1, int(size * pool)) for size in features.shape[2:]]
    vectors = unit(F.max_pool2d(features, patch, ceil_mode=True).flatten(2), dim=1)  # (N, C, patches)
    return vectors.transpose(1, 2) @ vectors


def _check_pool(pool: float) -> None:
    if not 0 < pool <= 1:
        raise ConfigError(f"PairwiseAffinity: pool must be above 0 and at most 1, not {pool}; 0.5 is usual.")

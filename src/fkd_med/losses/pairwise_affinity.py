"""Pair-wise affinity (SKD): which parts of an image does the teacher find alike?"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fkd_med.errors import ConfigError
from fkd_med.losses.distillation import DistillationTerm
from fkd_med.losses.pixels import Pixels
from fkd_med.losses.tensors import check_maps, mean_of_images, precise, unit


def pairwise_affinity(student: Tensor, teacher: Tensor, pool: float = 0.5, *, valid: Tensor | None = None) -> Tensor:
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
        valid: which pixels count, bool (N, H, W): the others might as well not exist; all of them when left out.
            A patch is the maximum over those that count; one without any is left out.

    Raises:
        ConfigError: for a pool out of range, or shapes that do not match.
    """
    _check_pool(pool)
    check_maps(student, teacher, valid)
    with torch.autocast(student.device.type, enabled=False):
        a, b = (_patches(precise(x), pool, valid) for x in (student, teacher.detach()))
        square = (_affinity(a) - _affinity(b)).square().flatten(1)  # (N, patches^2)
        return mean_of_images(square, None if valid is None else _pairs(valid, pool))


class PairwiseAffinity(DistillationTerm):
    """Match which parts of an image are alike for the teacher (SKD, Liu et al. 2019).

    Features are compared as they are. Logits are defined up to a constant and one logit has no direction, so their
    cosines are taken of the softmax, which is (1 - p, p) for one logit.

    Args:
        pool: height and width of a patch as a share of the image's; 0.5 leaves 2 x 2 patches. 1 leaves one: loss 0.
        weight: factor beside the supervised loss; 0 turns the term off. The authors' is 10.
        where: student_tap, teacher_tap, resize, connector and schedule, as in `DistillationTerm`.

    Raises:
        ConfigError: for a pool out of range or a negative weight.
    """

    def __init__(self, pool: float = 0.5, weight: float = 10.0, **where: Any) -> None:
        super().__init__(weight, **where)
        _check_pool(pool)
        self.pool = pool

    def __call__(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Return the raw, unweighted loss of two maps (N, C, H, W), a scalar; no mask is needed."""
        student, teacher = self.as_probabilities(student, teacher, pixels)
        return pairwise_affinity(student, teacher, self.pool, valid=pixels.valid)


def _patches(features: Tensor, pool: float, valid: Tensor | None) -> Tensor:
    """Return the highest value of each channel in each patch (N, C, patches); 0 in patches that do not count."""
    if valid is None:
        return _highest(features, pool)
    highest = _highest(torch.where(valid.unsqueeze(1), features, torch.finfo(features.dtype).min), pool)
    return torch.where(_counted(valid, pool), highest, 0.0)


def _affinity(patches: Tensor) -> Tensor:
    vectors = unit(patches, dim=1)
    return vectors.transpose(1, 2) @ vectors


def _pairs(valid: Tensor, pool: float) -> Tensor:
    """Return which pairs of patches count, bool (N, patches^2)."""
    counted = _counted(valid, pool)
    return (counted.transpose(1, 2) & counted).flatten(1)


def _counted(valid: Tensor, pool: float) -> Tensor:
    """Return which patches hold a pixel that counts, bool (N, 1, patches)."""
    return _highest(valid.unsqueeze(1).float(), pool) > 0


def _highest(maps: Tensor, pool: float) -> Tensor:
    patch = [max(1, int(size * pool)) for size in maps.shape[2:]]
    return F.max_pool2d(maps, patch, ceil_mode=True).flatten(2)


def _check_pool(pool: float) -> None:
    if not 0 < pool <= 1:
        raise ConfigError(f"PairwiseAffinity: pool must be above 0 and at most 1, not {pool}; 0.5 is usual.")

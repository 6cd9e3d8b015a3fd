"""RAD, region affinity: how far apart does the teacher hold foreground and background?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fkd_med.losses.distillation import DistillationTerm
from fkd_med.losses.pixels import Pixels
from fkd_med.losses.regions import class_means, region_difference
from fkd_med.losses.tensors import unit


def region_affinity(
    student: Tensor, teacher: Tensor, mask: Tensor, classes: int = 2, *, valid: Tensor | None = None
) -> Tensor:
    """Return the squared difference of the cosines between the mean vectors of two classes.

    ``(cos(mu_0, mu_1)_s - cos(mu_0, mu_1)_t)^2``, mu_k the mean over the pixels of class k; with more classes, the
    mean over all pairs. The mean is over the images that hold every class; without one the loss is 0. A vector of
    zeros has cosine 0. Channels of student and teacher may differ. No gradient reaches the teacher. Source: Qin et
    al., "Efficient Medical Image Segmentation Based on Knowledge Distillation" (EMKD), 2021, sec. III.

    Args:
        student: features (N, C, H, W).
        teacher: features (N, C', H, W).
        mask: class indices (N, H, W).
        classes: number of classes, the background included.
        valid: which pixels count, bool (N, H, W): the others might as well not exist; all of them when left out.

    Raises:
        ConfigError: for shapes that do not match.
    """
    return region_difference(_affinity, student, teacher, mask, classes, valid=valid)


class RegionAffinity(DistillationTerm):
    """Match how alike the classes' regions are for the teacher (RAD of EMKD, Qin et al. 2021).

    Features are compared as they are. Logits are defined up to a constant and one logit has no direction, so their
    cosines are taken of the softmax, which is (1 - p, p) for one logit. Images in which a class has no pixel are
    skipped.

    Args:
        weight: factor beside the supervised loss; 0 turns the term off. The authors' is 0.9.
        where: student_tap, teacher_tap, resize, connector and schedule, as in `DistillationTerm`.

    Raises:
        ConfigError: for a negative weight.
    """

    def __init__(self, weight: float = 0.9, **where: Any) -> None:
        super().__init__(weight, **where)

    def needs_masks(self) -> bool:
        """Whether the loss looks at the masks: it does."""
        return True

    def __call__(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Return the raw, unweighted loss of two maps (N, C, H, W) and the pixels' classes, a scalar."""
        student, teacher = self.as_probabilities(student, teacher, pixels)
        return region_affinity(student, teacher, pixels.mask, pixels.classes, valid=pixels.valid)


def _affinity(features: Tensor, regions: Tensor) -> Tensor:
    """Return the cosine of each pair of classes (N, pairs)."""
    means = unit(class_means(features, regions), dim=2)  # (N, K, C)
    first, second = torch.triu_indices(means.shape[1], means.shape[1], offset=1, device=means.device)
    return (means[:, first] * means[:, second]).sum(dim=2)

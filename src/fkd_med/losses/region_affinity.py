"""RAD, region affinity: how far apart does the teacher hold foreground and background?"""

from __future__ import annotations

import torch
from torch import Tensor

from fkd_med.losses.distillation import DistillationTerm
from fkd_med.losses.regions import class_means, region_difference
from fkd_med.losses.tensors import class_probabilities, unit


def region_affinity(student: Tensor, teacher: Tensor, mask: Tensor, classes: int = 2) -> Tensor:
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

    Raises:
        ConfigError: for shapes that do not match.
    """
    return region_difference(_affinity, student, teacher, mask, classes)


class RegionAffinity(DistillationTerm):
    """Match how alike the classes' regions are for the teacher (RAD of EMKD, Qin et al. 2021), on probabilities.

    Logits are defined up to a constant and one logit has no direction, so cosines are taken of the softmax, which is
    (1 - p, p) for one logit. Images in which a class has no pixel are skipped.

    Args:
        weight: factor beside the supervised loss; 0 turns the term off. The authors' is 0.9.

    Raises:
        ConfigError: for a negative weight.
    """

    def __init__(self, weight: float = 0.9) -> None:
        super().__init__(weight)

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Return the raw, unweighted loss of logits (N, K, H, W) and class indices (N, H, W), a scalar."""
        classes = max(2, student.shape[1])
        return region_affinity(class_probabilities(student), class_probabilities(teacher), mask, classes)


def _affinity(features: Tensor, regions: Tensor) -> Tensor:
    """Return the cosine of each pair of classes (N, pairs)."""
    means = unit(class_means(features, regions), dim=2)  # (N, K, C)
    first, second = torch.triu_indices(means.shape[1], means.shape[1], offset=1, device=means.device)
    return (means[:, first] * means[:, second]).sum(dim=2)

"""IFVD, intra-class feature variation: how typical of its class is each pixel?"""

from __future__ import annotations

from torch import Tensor

from fkd_med.losses.distillation import DistillationTerm
from fkd_med.losses.regions import class_means, region_difference
from fkd_med.losses.tensors import class_probabilities, unit


def ifvd(student: Tensor, teacher: Tensor, mask: Tensor, classes: int = 2) -> Tensor:
    """Return the squared difference of maps that hold each pixel's cosine with the mean vector of its class.

    The mean is over pixels, then over images; images in which a class has no pixel are skipped, and a batch of only
    such images has loss 0. A vector of zeros has cosine 0. Channels of student and teacher may differ. No gradient
    reaches the teacher. Source: Wang et al., "Intra-class Feature Variation Distillation for Semantic Segmentation",
    2020, eq. 1-3.

    Args:
        student: features (N, C, H, W).
        teacher: features (N, C', H, W).
        mask: class indices (N, H, W).
        classes: number of classes, the background included.

    Raises:
        ConfigError: for shapes that do not match.
    """
    return region_difference(_typicality, student, teacher, mask, classes)


class IFVD(DistillationTerm):
    """Match how typical of its class each pixel is for the teacher (Wang et al. 2020), on class probabilities.

    Logits are defined up to a constant and one logit has no direction, so cosines are taken of the softmax, which is
    (1 - p, p) for one logit. Images in which a class has no pixel are skipped.

    Args:
        weight: factor beside the supervised loss; 0 turns the term off. 20 to 50 in the authors' and CIRKD's code.

    Raises:
        ConfigError: for a negative weight.
    """

    def __init__(self, weight: float = 20.0) -> None:
        super().__init__(weight)

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Return the raw, unweighted loss of logits (N, K, H, W) and class indices (N, H, W), a scalar."""
        return ifvd(class_probabilities(student), class_probabilities(teacher), mask, max(2, student.shape[1]))


def _typicality(features: Tensor, regions: Tensor) -> Tensor:
    """Return each pixel's cosine with the mean of its class (N, H * W)."""
    means = unit(class_means(features, regions), dim=2)  # (N, K, C)
    own = means.transpose(1, 2) @ regions.to(means.dtype)  # (N, C, H * W)
    return (own * unit(features.flatten(2), dim=1)).sum(dim=1)

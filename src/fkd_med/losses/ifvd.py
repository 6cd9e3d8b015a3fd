"""IFVD, intra-class feature variation: how typical of its class is each pixel?"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fkd_med.losses.distillation import DistillationTerm
from fkd_med.losses.pixels import Pixels
from fkd_med.losses.regions import class_means, region_difference
from fkd_med.losses.tensors import unit


def ifvd(student: Tensor, teacher: Tensor, mask: Tensor, classes: int = 2, *, valid: Tensor | None = None) -> Tensor:
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
        valid: which pixels count, bool (N, H, W): the others might as well not exist; all of them when left out.

    Raises:
        ConfigError: for shapes that do not match.
    """
    return region_difference(_typicality, student, teacher, mask, classes, valid=valid, per_pixel=True)


class IFVD(DistillationTerm):
    """Match how typical of its class each pixel is for the teacher (Wang et al. 2020).

    Features are compared as they are. Logits are defined up to a constant and one logit has no direction, so their
    cosines are taken of the softmax, which is (1 - p, p) for one logit. Images in which a class has no pixel are
    skipped.

    Args:
        weight: factor beside the supervised loss; 0 turns the term off. 20 to 50 in the authors' and CIRKD's code.
        where: student_tap, teacher_tap, resize, connector and schedule, as in `DistillationTerm`.

    Raises:
        ConfigError: for a negative weight.
    """

    def __init__(self, weight: float = 20.0, **where: Any) -> None:
        super().__init__(weight, **where)

    def needs_masks(self) -> bool:
        """Whether the loss looks at the masks: it does."""
        return True

    def __call__(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Return the raw, unweighted loss of two maps (N, C, H, W) and the pixels' classes, a scalar."""
        student, teacher = self.as_probabilities(student, teacher, pixels)
        return ifvd(student, teacher, pixels.mask, pixels.classes, valid=pixels.valid)


def _typicality(features: Tensor, regions: Tensor) -> Tensor:
    """Return each pixel's cosine with the mean of its class (N, H * W)."""
    means = unit(class_means(features, regions), dim=2)  # (N, K, C)
    own = means.transpose(1, 2) @ regions.to(means.dtype)  # (N, C, H * W)
    return (own * unit(features.flatten(2), dim=1)).sum(dim=1)

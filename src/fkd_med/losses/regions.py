"""The mean feature of each class in each image, which IFVD and RAD compare."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fkd_med.losses.tensors import check_maps, check_mask, precise


def region_difference(
    measure: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, mask: Tensor, classes: int
) -> Tensor:
    """Return the squared difference of what `measure` says of the student's and the teacher's regions.

    The mean is over each image, then over the images that hold every class; 0 if none does. No gradient reaches the
    teacher. Computed in float32 at least, also under autocast.

    Args:
        measure: maps features (N, C, H, W) and regions (N, K, H * W) to numbers (N, M).
        student: features (N, C, H, W).
        teacher: features (N, C', H, W).
        mask: class indices (N, H, W).
        classes: number of classes, the background included.

    Raises:
        ConfigError: for shapes that do not match.
    """
    check_maps(student, teacher)
    check_mask(mask, student)
    with torch.autocast(student.device.type, enabled=False):
        regions = class_regions(mask, classes)
        difference = measure(precise(student), regions) - measure(precise(teacher.detach()), regions)
        return mean_of_complete(difference.square().mean(dim=1), regions)


def class_regions(mask: Tensor, classes: int) -> Tensor:
    """Return class indices (N, H, W) as float one-hot maps (N, K, H * W)."""
    return F.one_hot(mask.flatten(1), classes).transpose(1, 2).float()


def class_means(features: Tensor, regions: Tensor) -> Tensor:
    """Return the mean vector of each class (N, K, C) of features (N, C, H, W); zeros for a class without a pixel."""
    regions = regions.to(features.dtype)
    total = regions @ features.flatten(2).transpose(1, 2)
    return total / regions.sum(dim=2, keepdim=True).clamp_min(1)


def mean_of_complete(per_image: Tensor, regions: Tensor) -> Tensor:
    """Return the mean over the images that hold every class, of losses (N,); 0 if none does."""
    complete = regions.any(dim=2).all(dim=1)
    return (per_image * complete).sum() / complete.sum().clamp_min(1)

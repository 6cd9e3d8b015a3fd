"""The mean feature of each class in each image, which IFVD and RAD compare."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fkd_med.losses.tensors import blank, check_maps, check_mask, mean_where, precise


def region_difference(
    measure: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    classes: int,
    *,
    valid: Tensor | None = None,
    per_pixel: bool = False,
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
        valid: which pixels count, bool (N, H, W): the others might as well not exist; all of them when left out.
        per_pixel: the numbers of an image are its pixels' (M = H * W), so only those that count are averaged.

    Raises:
        ConfigError: for shapes that do not match.
    """
    check_maps(student, teacher, valid)
    check_mask(mask, student)
    student, teacher = blank(student, valid), blank(teacher.detach(), valid)
    with torch.autocast(student.device.type, enabled=False):
        regions = class_regions(mask, classes, valid)
        square = (measure(precise(student), regions) - measure(precise(teacher), regions)).square()
        counted = valid.flatten(1) if per_pixel and valid is not None else None
        per_image = square.mean(dim=1) if counted is None else mean_where(square, counted, dim=1)
        return mean_of_complete(per_image, regions)


def class_regions(mask: Tensor, classes: int, valid: Tensor | None = None) -> Tensor:
    """Return class indices (N, H, W) as float one-hot maps (N, K, H * W), all 0 at pixels that do not count."""
    regions = F.one_hot(mask.flatten(1), classes).transpose(1, 2).float()
    return regions if valid is None else regions * valid.flatten(1).unsqueeze(1)


def class_means(features: Tensor, regions: Tensor) -> Tensor:
    """Return the mean vector of each class (N, K, C) of features (N, C, H, W); zeros for a class without a pixel."""
    regions = regions.to(features.dtype)
    total = regions @ features.flatten(2).transpose(1, 2)
    return total / regions.sum(dim=2, keepdim=True).clamp_min(1)


def mean_of_complete(per_image: Tensor, regions: Tensor) -> Tensor:
    """Return the mean over the images that hold every class, of losses (N,); 0 if none does."""
    return mean_where(per_image, regions.any(dim=2).all(dim=1))

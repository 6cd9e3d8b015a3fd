"""The mean feature of each class in each image, which IFVD and RAD compare."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
